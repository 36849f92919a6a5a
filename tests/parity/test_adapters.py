"""Ports that are modules of Linen, or functions with their parameters: as those of NNX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jattn import nn
from jattn.interop import Rule
from jattn.parity import assert_matches, diff
from jattn.parity.fixtures import Fixture, load
from tests.parity.tagger import FIXTURE, D, H, N, run_lstm, turn


@pytest.fixture(scope="module")
def recorded():
    return load(FIXTURE)


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x, mask):
        def heads(name):
            return linen.Dense(D, name=name)(x).reshape(*x.shape[:2], N, H).swapaxes(1, 2)

        scores = turn(heads("query")) @ turn(heads("key")).swapaxes(2, 3) / H**0.5
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        output = jax.nn.softmax(scores, axis=-1) @ heads("value")
        return linen.Dense(D, name="out")(output.swapaxes(1, 2).reshape(x.shape))


class Block(linen.Module):
    epsilon: float = 1e-5
    deterministic: bool = True

    @linen.compact
    def __call__(self, x, mask):
        drop = linen.Dropout(0.1, deterministic=self.deterministic)
        x = linen.LayerNorm(self.epsilon)(x + drop(Attention()(x, mask)))
        y = linen.Dense(D)(jax.nn.gelu(linen.Dense(2 * D)(x), approximate=False))
        return linen.LayerNorm(self.epsilon)(x + drop(y))


class LSTM(linen.Module):
    @linen.compact
    def __call__(self, x):
        def weight(name, *shape):
            return self.param(name, jax.nn.initializers.normal(), shape)

        inner, outer = weight("weight_ih", 6, 4 * D), weight("weight_hh", D, 4 * D)
        bias = weight("bias_ih", 4 * D), weight("bias_hh", 4 * D)

        def gates(x, h):
            return jnp.split(x @ inner + bias[0] + h @ outer + bias[1], 4, axis=-1)

        return run_lstm(x, gates)


class Tagger(linen.Module):
    epsilon: float = 1e-5
    deterministic: bool = True

    @linen.compact
    def __call__(self, x, mask):
        x = Block()(LSTM()(x), mask)
        return linen.Dense(3)(Block(self.epsilon, self.deterministic)(x, mask))


@pytest.fixture(scope="module")
def report(recorded):
    return diff(recorded, Tagger())


def test_a_module_of_linen_is_held_layer_by_layer(report):
    assert report.passed, str(report)
    assert report.pairs["blocks.1.attention.query"] == "Block_1.Attention_0.query"
    assert len(report.layers) > 15
    assert all(row.alone < 1e-12 and row.error < 1e-12 for row in report.layers)
    assert sum(row.gradient is not None for row in report.layers) > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "layer", "hint"),
    [
        ({"epsilon": 1e-6}, "Block_1.LayerNorm_0", "matches with eps 1e-05"),
        ({"deterministic": False}, "Block_1", "matches with dropout off: dropout was on"),
    ],
)
def test_a_fault_in_a_module_of_linen_is_found_and_mended(recorded, wrong, layer, hint):
    report = diff(recorded, Tagger(**wrong))
    assert not report.passed and report.first.flax == layer
    assert hint in report.hints


@pytest.fixture(scope="module")
def params(recorded):
    inputs = (jnp.asarray(recorded.inputs[name]) for name in ("x", "mask"))
    with jax.numpy_dtype_promotion("standard"):
        return Tagger().init(jax.random.key(0), *inputs)["params"]


def test_a_function_takes_its_parameters_first(recorded, report, params):
    def tagger(params, x, mask):
        return Tagger().apply({"params": params}, x, mask)

    # Without layers their weights have only names and shapes, of which several are alike here
    assert_matches(recorded, tagger, params=params, rules=report.rules)


@pytest.mark.slow
def test_a_module_of_linen_that_has_its_variables(recorded, params):
    assert_matches(recorded, Tagger().bind({"params": params}))
    assert_matches(recorded, Tagger(), params={"params": params})


X = np.random.default_rng(0).normal(size=(5, 3))
W = np.random.default_rng(1).normal(size=(2, 2, 3))
TWO = Fixture(
    "yours/two", "two", inputs={"x": X}, parameters={"a.weight": W[0], "b.weight": W[1]},
    outputs={"output": np.tanh(X @ W[0].T) * (X @ W[1].T)},
)  # fmt: skip


def test_no_parameters_and_a_number_are_parameters_too():
    fixture = Fixture("yours/double", "double", inputs={"x": X}, outputs={"output": 2 * X})
    assert_matches(fixture, lambda params, x: 2 * x, params={})
    scaled = dataclasses.replace(fixture, parameters={"scale": np.array(2.0)})
    assert_matches(scaled, lambda params, x: params["scale"] * x, params={"scale": 1.0})


def test_parameters_may_be_in_lists():
    def function(params, x):
        first, second = params["layers"]
        return jnp.tanh(x @ first["kernel"]) * (x @ second["kernel"])

    params = {"layers": [{"kernel": np.zeros((3, 2))}, {"kernel": np.zeros((3, 2))}]}
    report = diff(TWO, function, params=params)
    assert report.passed, str(report)
    assert [rule.flax for rule in report.rules] == ["layers.0.kernel", "layers.1.kernel"]


def test_a_hint_names_a_parameter_of_a_function_as_the_function_does():
    weight = np.random.default_rng(2).normal(size=(3, 3))
    square = Fixture(
        "yours/square", "square", inputs={"x": X}, parameters={"weight": weight},
        outputs={"output": X @ weight.T},
    )  # fmt: skip
    rules = [Rule("weight", "w")]
    wrong = diff(square, lambda params, x: x @ params["w"], params={"w": weight}, rules=rules)
    assert wrong.hints == ("matches if w is transposed",)


def test_a_module_of_ours_within_one_of_linen():
    class Port(linen.Module):
        @linen.compact
        def __call__(self, x):
            attention = nnx.bridge.to_linen(nn.SelfAttention, 3, 4, use_bias=False, name="inner")
            return attention(x)

    weights = {
        f"att.W_{name}.weight": np.random.default_rng(7).normal(size=(4, 3)) for name in "qkv"
    }
    query, key, value = (X @ weights[f"att.W_{name}.weight"].T for name in "qkv")
    scores = np.exp(query @ key.T / 2)
    output = scores / scores.sum(-1, keepdims=True) @ value
    fixture = Fixture(
        "yours/attention", "attention", inputs={"x": X}, parameters=weights,
        outputs={"output": output}, modules={"att[0]": output}, module_inputs={"att[0]": X},
    )  # fmt: skip
    assert_matches(fixture, Port())


def test_what_is_no_port():
    with pytest.raises(TypeError, match="expected a module of Flax or a function, got int"):
        diff(TWO, 3)
    with pytest.raises(TypeError, match="a module of NNX has its own"):
        diff(TWO, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), params={})
    with pytest.raises(ValueError, match="the port cannot be called with the inputs x"):
        diff(TWO, Tagger())
    with pytest.raises(ValueError, match="pairs: the port has no layer 'nowhere'"):
        layered = dataclasses.replace(TWO, modules={"a[0]": X @ W[0].T})
        diff(layered, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), pairs={"a": "nowhere"})
