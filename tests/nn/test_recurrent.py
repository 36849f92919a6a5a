import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jattn.nn.recurrent import GRU, GRUCell, gru_step

B, T, D, F = 5, 7, 3, 11
LENGTHS = np.array([7, 1, 3, 5, 2])
# States stay within 1 and the first state; every step adds a rounding error for each of its D + F products.
TOLERANCE = 4 * T * (D + F) * np.finfo(np.float64).eps


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle_step(weights, x, h):
    """PyTorch's documented equations for one example, one unit at a time."""
    input_kernel, hidden_kernel, input_bias, hidden_bias = weights
    after = np.empty(len(h))
    for unit in range(len(h)):
        rows = [gate * len(h) + unit for gate in range(3)]
        inputs = [input_kernel[:, row] @ x + input_bias[row] for row in rows]
        hidden = [hidden_kernel[:, row] @ h + hidden_bias[row] for row in rows]
        r, z = sigmoid(inputs[0] + hidden[0]), sigmoid(inputs[1] + hidden[1])
        n = np.tanh(inputs[2] + r * hidden[2])
        after[unit] = (1 - z) * n + z * h[unit]
    return after


def oracle(gru, inputs, state, lengths):
    outputs, final = np.zeros((*inputs.shape[:2], state.shape[-1])), state.copy()
    weights = [[np.asarray(w) for w in (c.input_kernel, c.hidden_kernel)] for c in gru.layers]
    for own, cell in zip(weights, gru.layers, strict=True):
        own += [np.zeros(3 * F) if b is None else np.asarray(b) for b in (cell.input_bias, cell.hidden_bias)]
    for example in range(len(inputs)):
        for t in range(lengths[example]):
            below = inputs[example, t]
            for layer, own in enumerate(weights):
                below = final[example, layer] = oracle_step(own, below, final[example, layer])
            outputs[example, t] = below
    return outputs, final


@nnx.jit
def run(gru, inputs, state=None, lengths=None):
    return gru(inputs, state, lengths=lengths)


def build(**options):
    return GRU(D, F, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"use_bias": False}], ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_equals_a_loop(x64, rng, options, lengths):
    gru = build(**options)
    inputs, state = rng.normal(size=(B, T, D)), rng.normal(size=(B, len(gru.layers), F))
    outputs, final = run(gru, inputs, state, lengths)
    expected = oracle(gru, inputs, state, [T] * B if lengths is None else lengths)
    np.testing.assert_allclose(outputs, expected[0], rtol=0, atol=TOLERANCE * np.abs(state).max())
    np.testing.assert_allclose(final, expected[1], rtol=0, atol=TOLERANCE * np.abs(state).max())


def test_the_first_state_is_zero_unless_given(x64, rng):
    gru, inputs = build(num_layers=2), rng.normal(size=(B, T, D))
    chex.assert_trees_all_equal(run(gru, inputs), run(gru, inputs, np.zeros((B, 2, F))))


def test_full_lengths_are_no_lengths(x64, rng):
    gru, inputs = build(num_layers=2), rng.normal(size=(B, T, D))
    chex.assert_trees_all_equal(run(gru, inputs, lengths=np.full(B, T)), run(gru, inputs))


def test_one_step_is_the_cell(x64, rng):
    gru, inputs, state = build(), rng.normal(size=(B, 1, D)), rng.normal(size=(B, 1, F))
    outputs, final = gru(inputs, state)
    expected = gru.layers[0](inputs[:, 0], state[:, 0])
    np.testing.assert_allclose(outputs[:, 0], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(final, outputs)


def test_steps_one_by_one_are_the_sequence(x64, rng):
    gru, inputs, state = build(num_layers=2), rng.normal(size=(B, T, D)), jnp.zeros((B, 2, F))
    outputs, final = run(gru, inputs)
    for t in range(T):
        state = gru.step(gru.layers[0].project(inputs[:, t]), state)
        np.testing.assert_allclose(outputs[:, t], state[:, -1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(final, state, rtol=0, atol=TOLERANCE)


def test_a_sequence_in_two_parts_is_the_whole(x64, rng):
    gru, inputs = build(num_layers=2), rng.normal(size=(B, T, D))
    first, state = run(gru, inputs[:, :3])
    second, final = run(gru, inputs[:, 3:], state)
    expected = run(gru, inputs)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), expected[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(final, expected[1], rtol=0, atol=TOLERANCE)


def test_what_lies_past_the_end_is_not_seen(x64, rng):
    gru, clean = build(num_layers=2), rng.normal(size=(B, T, D))
    dirty = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], clean, np.nan)

    def total(gru, inputs):
        outputs, final = gru(inputs, lengths=LENGTHS)
        return jnp.sum(outputs**2) + jnp.sum(final**3), outputs

    gradient = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, outputs), from_clean = gradient(gru, jnp.asarray(clean))
    (_, dirty_outputs), from_dirty = gradient(gru, jnp.asarray(dirty))
    np.testing.assert_array_equal(outputs, dirty_outputs)
    chex.assert_trees_all_equal(from_clean, from_dirty)
    past = np.arange(T) >= LENGTHS[:, None]
    assert not outputs[past].any() and not from_dirty[1][past].any()


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_any_leading_axes(x64, rng, lead):
    gru, inputs = build(num_layers=2), rng.normal(size=(*lead, T, D))
    lengths = np.asarray(rng.integers(1, T + 1, lead))
    flat = run(gru, inputs.reshape(-1, T, D), lengths=lengths.reshape(-1))
    for result, expected in zip(run(gru, inputs, lengths=lengths), flat, strict=True):
        np.testing.assert_allclose(result, expected.reshape(*lead, *expected.shape[1:]), rtol=0, atol=TOLERANCE)


def test_vmap_and_jit_agree_with_the_batch(x64, rng):
    gru, inputs = build(num_layers=2), rng.normal(size=(B, T, D))
    expected = run(gru, inputs, lengths=LENGTHS)
    mapped = jax.jit(jax.vmap(lambda inputs, length: gru(inputs, lengths=length)))(inputs, LENGTHS)
    chex.assert_trees_all_close(mapped, expected, rtol=0, atol=TOLERANCE)


def test_gradients_of_a_step_are_its_differences(x64, rng):
    shapes = [(B, 3 * F), (B, F), (F, 3 * F), (3 * F,)]
    check_grads(jax.jit(gru_step), [jnp.asarray(rng.normal(size=shape)) for shape in shapes], order=1)


def test_a_shut_update_gate_keeps_the_state(x64, rng):
    state, kernel = rng.normal(size=(B, F)), jnp.zeros((F, 3 * F))
    shut = jnp.concatenate([jnp.zeros(F), jnp.full(F, 50.0), jnp.ones(F)])
    np.testing.assert_allclose(gru_step(jnp.tile(shut, (B, 1)), state, kernel), state, rtol=0, atol=1e-15)


def test_weights_begin_uniform_within_the_root_of_the_width():
    cell = GRUCell(503, 97, rngs=nnx.Rngs(0))
    for parameter in (cell.input_kernel, cell.hidden_kernel):
        values = np.asarray(parameter)
        assert np.abs(values).max() <= 97**-0.5
        # The mean of n such numbers has standard deviation bound / sqrt(3 n); five of them leave room for chance.
        assert abs(values.mean()) < 5 * 97**-0.5 / np.sqrt(3 * values.size)
        np.testing.assert_allclose(values.std(), 97**-0.5 / np.sqrt(3), rtol=5 / np.sqrt(values.size))


def test_dropout_falls_between_layers_only(rng):
    inputs = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    single = GRU(D, F, dropout_rate=0.5, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(run(single, inputs), run(single, inputs))
    double = GRU(D, F, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    (first, state), (second, _) = run(double, inputs), run(double, inputs)
    plain, plain_state = double(inputs, deterministic=True)
    assert np.abs(first - second).max() > 0.01 and np.abs(first - plain).max() > 0.01
    np.testing.assert_array_equal(state[:, 0], plain_state[:, 0])
    double.eval()
    chex.assert_trees_all_equal(run(double, inputs), run(double, inputs))


def test_dropout_repeats_from_the_same_seed(rng):
    inputs = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    runs = [run(GRU(D, F, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0)), inputs) for _ in range(2)]
    chex.assert_trees_all_equal(*runs)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
def test_half_precision_stays_half(dtype):
    gru = GRU(D, F, param_dtype=dtype, rngs=nnx.Rngs(0))
    result = jax.eval_shape(gru, jnp.ones((B, T, D), dtype))
    assert [leaf.dtype for leaf in result] == [dtype, dtype]


def test_a_length_that_jit_cannot_see_gives_no_number():
    gru = GRU(D, F, rngs=nnx.Rngs(0))
    final = jax.jit(lambda lengths: gru(jnp.ones((B, T, D)), lengths=lengths)[1])(jnp.array([0, 1, T, T + 1, -1]))
    assert np.isnan(final).all(axis=(1, 2)).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "inputs must be", {"inputs": np.ones((B, T, D + 1))}),
        (ValueError, "inputs must be", {"inputs": np.ones(D)}),
        (ValueError, "at least one step", {"inputs": np.ones((B, 0, D))}),
        (TypeError, "inputs must be floating", {"inputs": np.ones((B, T, D), int)}),
        (ValueError, "state must be", {"state": np.ones((B, 1, F))}),
        (ValueError, "state must be", {"state": np.ones((2, B, F))}),
        (TypeError, "state must be floating", {"state": np.ones((B, 2, F), int)}),
        (ValueError, "lengths must be", {"lengths": np.ones((B, T), int)}),
        (ValueError, "lengths must lie in 1 … 7", {"lengths": np.array([1, 2, 3, 4, 0])}),
        (ValueError, "lengths must lie in 1 … 7", {"lengths": np.array([1, 2, 3, 4, 8])}),
        (TypeError, "lengths must be integers", {"lengths": np.ones(B)}),
    ],
)
def test_bad_input_is_named(x64, error, message, arguments):
    with pytest.raises(error, match=message):
        build(num_layers=2)(**{"inputs": np.ones((B, T, D)), **arguments})


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("state", [(B, 3 * F), (B, F + 1), (F, 3 * F), (3 * F,)]),
        ("projected", [(B, F), (B, F), (F, 3 * F), (3 * F,)]),
        ("projected", [(1, 3 * F), (B, F), (F, 3 * F), (3 * F,)]),
        ("hidden_kernel", [(B, 2 * F), (B, F), (F, 2 * F), (2 * F,)]),
        ("hidden_bias", [(B, 3 * F), (B, F), (F, 3 * F), (F,)]),
    ],
)
def test_a_step_names_what_does_not_fit(name, shapes):
    with pytest.raises(ValueError, match=name):
        gru_step(*[jnp.ones(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("in_features", {"in_features": 0}),
        ("hidden_features", {"hidden_features": -1}),
        ("num_layers", {"num_layers": 0}),
        ("dropout_rate", {"dropout_rate": 1.5}),
    ],
)
def test_bad_sizes_are_named(name, arguments):
    with pytest.raises(ValueError, match=name):
        GRU(**{"in_features": D, "hidden_features": F, "rngs": nnx.Rngs(0), **arguments})
