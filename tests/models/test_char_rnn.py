"""Numbers and gradients: the fixtures prove them; here is what a fixture cannot show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.models.char_rnn import CharCell, CharRNN, Config, EmbeddedCharRNN

CONFIG = Config(5, embedding_features=7, hidden_features=3, num_layers=2)
TOKENS = np.array([[1, 0, 2, 2, 3, 4], [3, 3, 0, 1, 2, 0]])
KINDS = [CharCell, CharRNN, EmbeddedCharRNN]


def test_the_loop_is_the_network():
    cell, network = CharCell(CONFIG, rngs=nnx.Rngs(0)), CharRNN(CONFIG, rngs=nnx.Rngs(1))
    nnx.update(network.rnn.layers[0], nnx.state(cell.cell))
    np.testing.assert_allclose(
        network(TOKENS), cell(TOKENS), rtol=0, atol=40 * np.finfo(np.float32).eps
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_depends_on_those_before_it_alone(kind):
    model = kind(CONFIG, rngs=nnx.Rngs(0))
    other = TOKENS.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 5
    changed = np.abs(model(TOKENS) - model(other)).max(axis=(0, 2)) > 0
    assert changed.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [-1, 5])
def test_an_unknown_id_that_jit_cannot_see_gives_no_number(kind, token):
    model, tokens = kind(CONFIG, rngs=nnx.Rngs(0)), TOKENS.copy()
    tokens[0, 0] = token
    logits = jax.jit(model)(tokens)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "message", "tokens"),
    [
        (ValueError, "tokens must lie in 0 … 4", np.full((2, 3), 5)),
        (ValueError, "tokens must be", np.ones(3, int)),
        (ValueError, "at least one step", np.ones((2, 0), int)),
        (TypeError, "tokens must be integers", np.ones((2, 3))),
    ],
)
def test_bad_input_is_named(kind, error, message, tokens):
    with pytest.raises(error, match=message):
        kind(CONFIG, rngs=nnx.Rngs(0))(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_runs(kind):
    model = kind(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert jax.eval_shape(lambda: model(TOKENS)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["vocabulary", "hidden_features", "num_layers"])
def test_bad_configs_are_named(name):
    with pytest.raises(ValueError, match=name):
        Config(**{"vocabulary": 5, name: 0})
