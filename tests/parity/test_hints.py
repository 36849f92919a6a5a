"""A layer that is wrong in a known way is told what is wrong, by what makes it right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.parity.hints import Layer, hints

B, T, N, H = 3, 5, 2, 4
D = N * H


@pytest.fixture
def x(rng):
    return rng.normal(size=(B, T, D))


@pytest.fixture
def weights(rng):
    names = ("query", "key", "value", "out")
    return {name: rng.normal(size=(D, D)) / 2 for name in names}


def split(x):
    return x.reshape(*x.shape[:-1], N, H).swapaxes(-2, -3)


def merge(x):
    return x.swapaxes(-2, -3).reshape(*x.shape[:-3], x.shape[-2], D)


def attention(
    weights, x, mask=None, *, scale=H**-0.5, axis=-1, split=split, merge=merge, turn=None
):
    turn = turn or (lambda x: x)
    query, key, value = (split(x @ weights[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("...td,...sd->...ts", turn(query) * scale, turn(key))
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    return merge(jax.nn.softmax(scores, axis=axis) @ value) @ weights["out"]


def of(wrong, right, weights, arrays, **options):
    """Hints for a layer `wrong` where PyTorch's is `right`."""

    def call(weights, arrays):
        return [wrong(weights, *arrays)]

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        expected = [np.asarray(right(weights, *arrays))]
        return hints(Layer(call, weights, arrays, expected, **options))


def test_a_scale(weights, x):
    def wrong(weights, x):
        return attention(weights, x, scale=1.0)

    def wronger(weights, x):
        return attention(weights, x, scale=D**-0.5)

    assert of(wrong, attention, weights, [x]) == ["matches with scale 1/√4"]
    assert of(wronger, attention, weights, [x]) == ["matches with scale 1/√4"]


def test_a_mask_that_means_the_opposite(weights, x, rng):
    mask = rng.random((T, T)) < 0.5
    mask |= np.eye(T, dtype=bool)
    mask[:, 0], mask[0, 1] = True, False

    def wrong(weights, x, mask):
        return attention(weights, x, ~mask)

    assert of(wrong, attention, weights, [x, mask]) == ["matches if the mask is inverted"]

    def own_mask(weights, x):
        return attention(weights, x, ~mask)

    def right(weights, x):
        return attention(weights, x, mask)

    assert of(own_mask, right, weights, [x]) == ["matches if the mask is inverted"]


def test_the_axis_of_a_softmax(weights, x):
    def wrong(weights, x):
        return attention(weights, x, axis=0)

    assert of(wrong, attention, weights, [x]) == ["matches with the softmax over axis -1"]


def test_heads_that_are_split_without_a_transpose(weights, x):
    def wrong(weights, x):
        return attention(
            weights, x, split=lambda x: x.reshape(B, N, T, H), merge=lambda x: x.reshape(B, T, D)
        )

    def half_wrong(weights, x):
        return attention(weights, x, merge=lambda x: x.reshape(B, T, D))

    words = ["matches with a transpose: heads were split without one"]
    assert of(wrong, attention, weights, [x]) == words
    assert of(half_wrong, attention, weights, [x]) == words


def turn(x, pairs):
    """Rotary positions of neighbouring pairs, or of halves."""
    angles = jnp.arange(x.shape[-2])[:, None] / 100.0 ** (jnp.arange(H // 2) * 2 / H)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if pairs:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@pytest.mark.parametrize("pairs", [True, False])
def test_rotary_positions_of_pairs_or_halves(weights, x, pairs):
    def wrong(weights, x):
        return attention(weights, x, turn=lambda x: turn(x, pairs))

    def right(weights, x):
        return attention(weights, x, turn=lambda x: turn(x, not pairs))

    words = ["matches if rotary positions are interleaved: pairs of neighbours for halves, or back"]
    assert of(wrong, right, weights, [x]) == words

    def alone(pairs):
        return lambda weights, x: turn(x, pairs)

    assert of(alone(pairs), alone(not pairs), {}, [split(x)]) == words


def test_a_transposed_weight(weights, x):
    def linear(weights, x):
        return x @ weights["query"]

    def wrong(weights, x):
        return x @ weights["query"].T

    weights = {"query": weights["query"]}
    assert of(wrong, linear, weights, [x]) == ["matches if query is transposed"]


def test_the_form_of_a_gelu(x):
    for approximate in (True, False):

        def layer(weights, x, approximate=approximate):
            return jax.nn.gelu(x @ weights["w"], approximate=approximate)

        def other(weights, x, approximate=approximate):
            return jax.nn.gelu(x @ weights["w"], approximate=not approximate)

        found = of(layer, other, {"w": np.eye(D)[:, :3] + 0.1}, [x])
        form = "erf" if approximate else "tanh"
        assert found == [f"matches with {form} GELU instead of the other form"]


def test_the_epsilon_of_a_norm(x):
    def norm(weights, x, epsilon=1e-5):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weights["scale"]

    def wrong(weights, x):
        return norm(weights, x, 1e-6)

    assert of(wrong, norm, {"scale": np.arange(1.0, D + 1)}, [x]) == ["matches with eps 1e-05"]


def test_a_bias_that_is_missing(weights, x, rng):
    bias = rng.normal(size=D)

    def right(weights, x):
        return x @ weights["query"] + bias

    def wrong(weights, x):
        return x @ weights["query"]

    words = ["matches with one more vector added: a bias is missing, or is another"]
    assert of(wrong, right, {"query": weights["query"]}, [x]) == words


def test_gates_in_another_order(rng, x):
    weights = {
        "kernel": rng.normal(size=(D, 4 * D)), "hidden": rng.normal(size=(D, 4 * D)),
        "bias": rng.normal(size=4 * D),
    }  # fmt: skip

    def lstm(weights, x, order=(0, 1, 2, 3)):
        def step(state, x):
            h, c = state
            gates = x @ weights["kernel"] + h @ weights["hidden"] + weights["bias"]
            parts = jnp.split(gates, 4, axis=-1)
            i, f, g, o = (parts[k] for k in order)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        begin = jnp.zeros((B, D)), jnp.zeros((B, D))
        return jax.lax.scan(step, begin, x.swapaxes(0, 1))[1]

    def wrong(weights, x):
        return lstm(weights, x, (0, 2, 1, 3))

    (found,) = of(wrong, lstm, weights, [x])
    assert found == (
        "matches if the 4 blocks (gates) of kernel, hidden, bias are permuted: (0, 2, 1, 3)"
    )


def test_dropout_that_was_on(x):
    def layer(weights, x):
        return x * weights["scale"]

    def dropped(weights, x):
        return layer(weights, x) * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)

    options = {"without_dropout": lambda weights, arrays: [layer(weights, *arrays)]}
    words = ["matches with dropout off: dropout was on"]
    assert of(dropped, layer, {"scale": np.ones(D)}, [x], **options) == words


def test_no_hint_for_what_no_known_change_makes_right(weights, x):
    def other(weights, x):
        return jnp.sin(attention(weights, x))

    assert of(attention, other, weights, [x]) == []
