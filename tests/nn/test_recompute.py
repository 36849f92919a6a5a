"""`nn.remat`: a module that computes its layers again trains as the module does, in less memory."""

import ast
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import attend, interop, masks, models, nn
from jattn.models import bert, causal_lm
from jattn.models.tokens import cross_entropy
from jattn.nn.recompute import KEEP_ATTENTION

TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 31)


def language_model(**options):
    config = causal_lm.Config(31, 16, 3, 4, 2, mlp_features=32)
    return models.CausalLM(config, rngs=nnx.Rngs(0), **options)


def loss_of_language(model, tokens):
    return cross_entropy(model(tokens, mask=masks.padding(jnp.array([24, 9]))), tokens)


def encoder():
    return models.Bert(bert.Config(31, 16, 3, 2, 32, max_length=24), rngs=nnx.Rngs(0))


def loss_of_encoder(model, tokens):
    return (model(tokens, lengths=jnp.array([24, 9])) ** 2).mean()


def stack():
    rngs = nnx.Rngs(0)
    return nn.TransformerEncoder(
        [nn.TransformerEncoderLayer(16, 2, 32, rngs=rngs) for _ in range(3)]
    )


def loss_of_stack(model, tokens):
    return (model(jax.nn.one_hot(tokens, 16), mask=masks.causal()) ** 2).mean()


CASES = {
    "CausalLM": (language_model, causal_lm.Block, loss_of_language),
    "Bert": (encoder, bert.Block, loss_of_encoder),
    "TransformerEncoder": (stack, nn.TransformerEncoderLayer, loss_of_stack),
}


NOTHING = pytest.param(None, id="nothing", marks=pytest.mark.slow)


@pytest.mark.parametrize("policy", [pytest.param(KEEP_ATTENTION, id="attention"), NOTHING])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_module_and_random_streams_move_on_alike(case, policy):
    make, layer, loss = CASES[case]
    model = make()
    copy = nn.remat(model, layer, policy=policy)
    step = nnx.jit(nnx.value_and_grad(loss))
    for _ in range(2):  # the second step draws other dropout
        (value, gradients), (other, others) = step(model, TOKENS), step(copy, TOKENS)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradients, others)
    before, after = nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(copy))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (path, one), (_, two) in zip(before, after, strict=True):
        if path[-1] == "count":
            assert one[...] == two[...]


def of_a_training_step():
    """Temporary memory and operations of a model, and of copies that keep attention or nothing."""
    config = causal_lm.Config(31, 64, 6, 4, mlp_features=256)
    blockwise = functools.partial(attend, implementation="blockwise")
    model = models.CausalLM(config, attend=blockwise, rngs=nnx.Rngs(0))
    copies = [nn.remat(model, causal_lm.Block, policy=policy) for policy in (KEEP_ATTENTION, None)]
    return [_of_a_training_step(*nnx.split(each)) for each in (model, *copies)]


def _of_a_training_step(graph, state):
    def gradients(state):
        model, tokens = nnx.merge(graph, state), jnp.zeros((2, 512), int)
        return nnx.grad(lambda model: (model(tokens) ** 2).mean())(model)

    compiled = jax.jit(gradients).lower(state).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_training_needs_less_memory_and_computes_no_attention_twice():
    program = "import runpy, sys; print(runpy.run_path(sys.argv[1])['of_a_training_step']())"
    # Only jaxlib 0.10 needs the flag, which it reads once in a process
    flags = {"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false"}
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], env={**os.environ, **flags},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (whole, once), (kept, more), (_, most) = ast.literal_eval(done.stdout)
    assert kept < 0.6 * whole
    assert once < more < most


def test_a_model_that_computes_again_writes_the_same_text_and_has_the_same_weights():
    model = language_model()
    copy = nn.remat(model, causal_lm.Block)
    assert isinstance(copy.layers[0], causal_lm.Block)
    written = [each.generate(TOKENS[:, :5], max_new_tokens=4).tokens for each in (model, copy)]
    np.testing.assert_array_equal(*written)
    one, two = interop.to_torch(model), interop.to_torch(copy)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_copy_of_a_copy_computes_its_layers_again_once():
    model = language_model()
    twice = nn.remat(nn.remat(model, causal_lm.Block, policy=None), causal_lm.Block)
    assert type(twice.layers[0]) is type(nn.remat(model, causal_lm.Block).layers[0])


def test_a_layer_that_adds_to_its_state_is_refused():
    class Sowing(nnx.Linear):
        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return super().__call__(x)

    model = nn.remat(nnx.Sequential(Sowing(3, 3, rngs=nnx.Rngs(0))), Sowing)
    with pytest.raises(ValueError, match="a Sowing whose call adds state to it, as sow does"):
        model(jnp.ones(3))


def test_a_module_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="a CausalLM holds no LSTM"):
        nn.remat(language_model(), nn.LSTM)
    with pytest.raises(ValueError, match="holds no layer: name a class"):
        nn.remat(language_model())
