import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jattn.functional.recurrence import gru_step, lstm_step
from jattn.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

B, T, D, F, P = 5, 7, 3, 11, 2
LENGTHS = np.array([7, 1, 3, 5, 2])
# States stay within 1 and the first state (relu's are tested small); a step adds a rounding error
# for each product.
TOLERANCE = 4 * T * (D + F) * np.finfo(np.float64).eps
KINDS = {
    "rnn": (RNN, {}),
    "relu": (RNN, {"activation": jax.nn.relu}),
    "lstm": (LSTM, {}),
    "proj": (LSTM, {"proj_features": P}),
    "gru": (GRU, {}),
}
BOTH = {"num_layers": 2, "bidirectional": True}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle_step(cell, x, state):
    """PyTorch's documented equations for one example, one unit at a time."""
    W, U = np.asarray(cell.input_kernel), np.asarray(cell.hidden_kernel)
    b, d = (
        np.zeros(W.shape[1]) if a is None else np.asarray(a)
        for a in (cell.input_bias, cell.hidden_bias)
    )
    h, *c = state
    width = W.shape[1] // cell.gates
    after, cells = np.empty(width), np.empty(width)
    for unit in range(width):
        rows = [gate * width + unit for gate in range(cell.gates)]
        x_gates, h_gates = (
            [W[:, row] @ x + b[row] for row in rows],
            [U[:, row] @ h + d[row] for row in rows],
        )
        if isinstance(cell, GRUCell):
            r, z = sigmoid(x_gates[0] + h_gates[0]), sigmoid(x_gates[1] + h_gates[1])
            after[unit] = (1 - z) * np.tanh(x_gates[2] + r * h_gates[2]) + z * h[unit]
        elif isinstance(cell, LSTMCell):
            i, f, g, o = np.add(x_gates, h_gates)
            cells[unit] = sigmoid(f) * c[0][unit] + sigmoid(i) * np.tanh(g)
            after[unit] = sigmoid(o) * np.tanh(cells[unit])
        else:
            after[unit] = (
                max(x_gates[0] + h_gates[0], 0)
                if cell.activation is jax.nn.relu
                else np.tanh(x_gates[0] + h_gates[0])
            )
    after = after if cell.proj_kernel is None else after @ np.asarray(cell.proj_kernel)
    return [after, cells][: len(state)]


def oracle(network, inputs, state, lengths):
    """Example by example, without padding; the backward direction reads the example reversed."""
    final = [np.array(part) for part in state]
    directions = 2 if network.backward_layers else 1
    outputs = np.zeros((B, T, directions * final[0].shape[-1]))
    for example, length in enumerate(lengths):
        below = list(inputs[example, :length])
        for layer in range(len(network.layers)):
            sides = []
            for side, cells in enumerate([network.layers, network.backward_layers][:directions]):
                row, seen = layer * directions + side, []
                own = [part[example, row] for part in state]
                for x in below[:: 1 - 2 * side]:
                    own = oracle_step(cells[layer], x, own)
                    seen.append(own[0])
                sides.append(seen[:: 1 - 2 * side])
                for part, last in zip(final, own, strict=True):
                    part[example, row] = last
            below = [np.concatenate(step) for step in zip(*sides, strict=True)]
        outputs[example, :length] = below
    return outputs, final


@nnx.jit
def run(network, inputs, state=None, lengths=None):
    return network(inputs, state, lengths=lengths)


def build(kind="gru", **options):
    network, own = KINDS[kind]
    return network(D, F, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **own, **options)


def states(network, rng):
    """A random state as a call takes it."""
    rows = len(network.layers) + len(network.backward_layers)
    widths = [P if network.layers[0].proj_kernel is not None else F, F]
    parts = [rng.normal(size=(B, rows, width)) for width in widths]
    return tuple(parts) if isinstance(network, LSTM) else parts[0]


def parts_of(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize(("kind", "options"), [
    ("rnn", BOTH), ("relu", {}), ("lstm", {}), ("proj", BOTH), ("gru", BOTH),
    ("gru", {"use_bias": False}),
], ids=str)  # fmt: skip
def test_equals_a_loop(x64, rng, kind, options):
    network = build(kind, **options)
    inputs, state = rng.normal(size=(B, T, D)), states(network, rng)
    lengths = LENGTHS if options else None
    outputs, final = run(network, inputs, state, lengths)
    expected, expected_final = oracle(
        network, inputs, parts_of(state), [T] * B if lengths is None else lengths
    )
    scale = max(np.abs(expected).max(), *(np.abs(part).max() for part in expected_final))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=TOLERANCE * scale)
    for part, expected_part in zip(parts_of(final), expected_final, strict=True):
        np.testing.assert_allclose(part, expected_part, rtol=0, atol=TOLERANCE * scale)


def test_the_first_state_is_zero_unless_given(x64, rng):
    network, inputs = build("proj"), rng.normal(size=(B, T, D))
    zero = jax.tree.map(np.zeros_like, states(network, rng))
    chex.assert_trees_all_equal(run(network, inputs), run(network, inputs, zero))


def test_full_lengths_are_no_lengths(x64, rng):
    network, inputs = build("lstm", **BOTH), rng.normal(size=(B, T, D))
    chex.assert_trees_all_equal(run(network, inputs, lengths=np.full(B, T)), run(network, inputs))


def test_both_directions_are_two_runs_one_of_them_reversed_within_the_lengths(x64, rng):
    both, inputs = build("lstm", bidirectional=True), rng.normal(size=(B, T, D))
    forward, backward = build("lstm"), build("lstm")
    nnx.update(forward.layers[0], nnx.state(both.layers[0]))
    nnx.update(backward.layers[0], nnx.state(both.backward_layers[0]))
    flip = np.maximum(LENGTHS[:, None] - 1 - np.arange(T), 0)[..., None]
    outputs, (h, c) = run(both, inputs, lengths=LENGTHS)
    ahead, (h_ahead, c_ahead) = run(forward, inputs, lengths=LENGTHS)
    back, (h_back, c_back) = run(backward, np.take_along_axis(inputs, flip, 1), lengths=LENGTHS)
    inside = np.arange(T)[:, None] < LENGTHS[:, None, None]
    expected = np.concatenate(
        [ahead, np.where(inside, np.take_along_axis(np.asarray(back), flip, 1), 0)], -1
    )
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(h, np.concatenate([h_ahead, h_back], 1), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(c, np.concatenate([c_ahead, c_back], 1), rtol=0, atol=TOLERANCE)


def test_the_unit_projection_is_none(x64, rng):
    plain, inputs = build("lstm"), rng.normal(size=(B, T, D))
    projected = LSTM(D, F, proj_features=F, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    nnx.update(projected.layers[0], nnx.state(plain.layers[0]))
    projected.layers[0].proj_kernel[...] = jnp.eye(F)
    chex.assert_trees_all_close(run(projected, inputs), run(plain, inputs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", [RNNCell, LSTMCell, GRUCell])
def test_one_step_is_the_cell(x64, rng, cell):
    network = build(cell.__name__[:-4].lower())
    inputs, state = rng.normal(size=(B, 1, D)), states(network, rng)
    outputs, final = network(inputs, state)
    assert isinstance(network.layers[0], cell)
    after = parts_of(network.layers[0](inputs[:, 0], jax.tree.map(lambda part: part[:, 0], state)))
    np.testing.assert_allclose(outputs[:, 0], after[0], rtol=0, atol=TOLERANCE)
    for part, expected in zip(parts_of(final), after, strict=True):
        np.testing.assert_allclose(
            part[:, 0], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
        )


@pytest.mark.parametrize("kind", ["proj", "gru"])
def test_steps_one_by_one_are_the_sequence(x64, rng, kind):
    network, inputs = build(kind, num_layers=2), rng.normal(size=(B, T, D))
    state = jax.tree.map(jnp.zeros_like, states(network, rng))
    outputs, final = run(network, inputs)
    for t in range(T):
        state = network.step(network.layers[0].project(inputs[:, t]), state)
        np.testing.assert_allclose(outputs[:, t], parts_of(state)[0][:, -1], rtol=0, atol=TOLERANCE)
    chex.assert_trees_all_close(state, final, rtol=0, atol=TOLERANCE)


def test_a_sequence_in_two_parts_is_the_whole(x64, rng):
    network, inputs = build("lstm", num_layers=2), rng.normal(size=(B, T, D))
    first, state = run(network, inputs[:, :3])
    second, final = run(network, inputs[:, 3:], state)
    expected = run(network, inputs)
    np.testing.assert_allclose(
        jnp.concatenate([first, second], axis=1), expected[0], rtol=0, atol=TOLERANCE
    )
    chex.assert_trees_all_close(final, expected[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["proj", pytest.param("gru", marks=pytest.mark.slow)])
def test_what_lies_past_the_end_is_not_seen(x64, rng, kind):
    network, clean = build(kind, **BOTH), rng.normal(size=(B, T, D))
    dirty = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], clean, np.nan)

    def total(network, inputs, state):
        outputs, final = network(inputs, state, lengths=LENGTHS)
        return jnp.sum(outputs**2) + sum(jnp.sum(part**3) for part in parts_of(final)), outputs

    gradient = nnx.jit(nnx.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    state = jax.tree.map(jnp.asarray, states(network, rng))
    (_, outputs), from_clean = gradient(network, jnp.asarray(clean), state)
    (_, dirty_outputs), from_dirty = gradient(network, jnp.asarray(dirty), state)
    np.testing.assert_array_equal(outputs, dirty_outputs)
    chex.assert_trees_all_equal(from_clean, from_dirty)
    past = np.arange(T) >= LENGTHS[:, None]
    assert not outputs[past].any() and not from_dirty[1][past].any()
    assert all(np.abs(part).min() > 0 for part in parts_of(from_dirty[2])), (
        "no gradient reaches the first state"
    )


@pytest.mark.parametrize(
    ("kind", "order", "lengths"),
    [("rnn", 2, LENGTHS[:2]), ("proj", 1, LENGTHS[:2]), ("gru", 1, None)],
)
def test_gradients_are_differences(x64, rng, kind, order, lengths):
    """Of the inputs, the state and every weight."""
    network = KINDS[kind][0](
        2, 3, bidirectional=order == 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **KINDS[kind][1]
    )
    structure, parameters, rest = nnx.split(network, nnx.Param, ...)
    state = jax.tree.map(lambda part: part[:2, :, :3], states(network, rng))

    @jax.jit
    def outputs(parameters, inputs, state):
        return nnx.merge(structure, parameters, rest)(inputs, state, lengths=lengths)

    arguments = (nnx.to_pure_dict(parameters), rng.normal(size=(2, T, 2)), state)
    check_grads(outputs, jax.tree.map(jnp.asarray, arguments), order=order, modes=["rev"])


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_any_leading_axes(x64, rng, lead):
    network, inputs = build("lstm", num_layers=2), rng.normal(size=(*lead, T, D))
    lengths = np.asarray(rng.integers(1, T + 1, lead))
    flat = run(network, inputs.reshape(-1, T, D), lengths=lengths.reshape(-1))
    expected = jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), flat)
    chex.assert_trees_all_close(
        run(network, inputs, lengths=lengths), expected, rtol=0, atol=TOLERANCE
    )


def test_vmap_jit_and_checkpoint_agree_with_the_batch(x64, rng):
    network, inputs = build("proj", bidirectional=True), jnp.asarray(rng.normal(size=(B, T, D)))

    def loss(inputs, lengths):
        outputs, final = network(inputs, lengths=lengths)
        return jnp.sum(jnp.sin(outputs)) + sum(jnp.sum(part**2) for part in parts_of(final))

    expected = jax.jit(jax.grad(loss))(inputs, LENGTHS)
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(inputs, LENGTHS)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("step", "shapes"), [
    (lstm_step, [(B, 4 * F), (B, F)]),
    (gru_step, [(B, 3 * F), (B, 3 * F), (B, F)]),
])  # fmt: skip
def test_gradients_of_a_step_are_its_differences(x64, rng, step, shapes):
    check_grads(jax.jit(step), [jnp.asarray(rng.normal(size=shape)) for shape in shapes], order=1)


def test_shut_gates_keep_the_state(x64, rng):
    state, one = rng.normal(size=(B, F)), np.ones((B, F))
    gates = np.concatenate([0 * one, 50 * one, one], axis=-1)
    np.testing.assert_allclose(gru_step(gates, 0 * gates, state), state, rtol=0, atol=1e-15)
    gates = np.concatenate([-50 * one, 50 * one, one, -50 * one], axis=-1)
    h, cell = lstm_step(gates, state)
    np.testing.assert_allclose(cell, state, rtol=0, atol=1e-15)
    assert np.abs(h).max() < 1e-15


def test_weights_begin_uniform_within_the_root_of_the_width():
    cell = LSTMCell(503, 97, proj_features=89, rngs=nnx.Rngs(0))
    for parameter in (cell.input_kernel, cell.hidden_kernel, cell.proj_kernel):
        values = np.asarray(parameter)
        assert np.abs(values).max() <= 97**-0.5
        # The mean of n such numbers has standard deviation bound / sqrt(3 n); five of them leave
        # room for chance.
        assert abs(values.mean()) < 5 * 97**-0.5 / np.sqrt(3 * values.size)
        np.testing.assert_allclose(
            values.std(), 97**-0.5 / np.sqrt(3), rtol=5 / np.sqrt(values.size)
        )


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
    runs = [
        run(GRU(D, F, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0)), inputs) for _ in range(2)
    ]
    chex.assert_trees_all_equal(*runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
def test_half_precision_stays_half(kind, dtype):
    network, own = KINDS[kind]
    network = network(D, F, param_dtype=dtype, rngs=nnx.Rngs(0), **own)
    result = jax.eval_shape(
        lambda inputs: network(inputs, lengths=LENGTHS), jnp.ones((B, T, D), dtype)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}


def test_a_length_that_jit_cannot_see_gives_no_number():
    network = LSTM(D, F, bidirectional=True, rngs=nnx.Rngs(0))
    final = jax.jit(lambda lengths: network(jnp.ones((B, T, D)), lengths=lengths)[1])(
        jnp.array([0, 1, T, T + 1, -1])
    )
    for part in final:
        assert np.isnan(part).all(axis=(1, 2)).tolist() == [True, False, False, True, True]
        assert np.isfinite(part[1:3]).all()


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


H, C = np.ones((B, 1, P)), np.ones((B, 1, F))


@pytest.mark.parametrize(
    ("error", "message", "state"),
    [
        (ValueError, "state must be a pair of h and c, got ndarray", C),
        (ValueError, "state must be a pair of h and c, got a tuple of 3", (H, C, C)),
        (ValueError, r"state\[0\] must be", (C, C)),
        (ValueError, r"state\[1\] must be", (H, H)),
        (TypeError, r"state\[1\] must be floating", (H, C.astype(int))),
    ],
)
def test_a_bad_pair_is_named(x64, error, message, state):
    with pytest.raises(error, match=message):
        build("proj")(np.ones((B, T, D)), state)
    with pytest.raises(error, match=message):
        build("proj").layers[0](np.ones((B, D)), jax.tree.map(lambda part: part[:, 0], state))


@pytest.mark.parametrize(
    ("step", "name", "shapes"),
    [
        (gru_step, "projected", [(B, 3 * F), (B, 3 * F), (B, F + 1)]),
        (gru_step, "state", [(B, 3 * F), (B, 3 * F), ()]),
        (gru_step, "projected", [(1, 3 * F), (B, 3 * F), (B, F)]),
        (gru_step, "hidden", [(B, 3 * F), (B, F), (B, F)]),
        (lstm_step, "gates", [(B, 3 * F), (B, F)]),
        (lstm_step, "gates", [(B, 4 * F), (1, F)]),
        (lstm_step, "gates", [(4 * F,), (B, F)]),
    ],
)
def test_a_step_names_what_does_not_fit(step, name, shapes):
    with pytest.raises(ValueError, match=f"{name} must be"):
        step(*[jnp.ones(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("in_features", {"in_features": 0}),
        ("hidden_features", {"hidden_features": -1}),
        ("num_layers", {"num_layers": 0}),
        ("dropout_rate", {"dropout_rate": 1.5}),
        ("proj_features", {"proj_features": 0}),
    ],
)
def test_bad_sizes_are_named(name, arguments):
    with pytest.raises(ValueError, match=name):
        LSTM(**{"in_features": D, "hidden_features": F, "rngs": nnx.Rngs(0), **arguments})


def test_both_directions_have_no_single_step(x64):
    with pytest.raises(ValueError, match="bidirectional"):
        build(**BOTH).step(np.ones((B, 3 * F)), np.ones((B, 4, F)))


@pytest.mark.parametrize("kind", [RNN, LSTM, GRU])
def test_second_derivatives_agree_in_all_orders_of_forward_and_reverse(x64, rng, kind):
    network = kind(2, 3, bidirectional=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(network)
    x, tangent = rng.standard_normal((2, 2, 4, 2))

    def loss(x):
        return jnp.sin(nnx.merge(graphdef, state)(x, lengths=jnp.array([4, 2]))[0]).sum()

    @jax.jit
    def products(x, tangent):
        along = lambda function: jax.jvp(function, (x,), (tangent,))[1]  # noqa: E731
        forward_over_reverse = along(jax.grad(loss))
        reverse_over_reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) * tangent))(x)
        reverse_over_forward = jax.grad(lambda x: jax.jvp(loss, (x,), (tangent,))[1])(x)
        step = 1e-5 * tangent
        difference = (jax.grad(loss)(x + step) - jax.grad(loss)(x - step)) / 2e-5
        return difference, forward_over_reverse, reverse_over_reverse, reverse_over_forward

    x, tangent = (np.stack([part, part[::-1]]) for part in (x[0], tangent[0]))
    difference, *orders = products(x, tangent)
    for product in orders:
        np.testing.assert_allclose(product, difference, rtol=1e-6, atol=1e-8)


def test_an_activation_may_capture_what_is_traced(x64, rng):
    x = rng.standard_normal((2, 4, 3))

    def last(slope):
        activation = lambda y: jnp.tanh(slope * y)  # noqa: E731
        rnn = RNN(3, 3, activation=activation, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        return rnn(x)[0][:, -1].sum()

    difference = (last(0.7 + 1e-6) - last(0.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(last))(0.7), difference, rtol=1e-7)


class Slope(nnx.Module):
    """tanh(a y) with a learned a."""

    def __init__(self):
        self.a = nnx.Param(jnp.array(0.7))

    def __call__(self, y):
        return jnp.tanh(self.a * y)


def test_an_activation_may_be_a_module_whose_parameter_learns(x64, rng):
    x = rng.standard_normal((2, 4, 3))
    rnn = RNN(3, 3, activation=Slope(), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    cell = rnn.layers[0]

    def loss(rnn):
        return rnn(x)[0].sum()

    found = nnx.jit(nnx.grad(loss))(rnn)
    found = found["layers"][0]["activation"]["a"][...]
    ends = []
    for a in 0.7 + 1e-6, 0.7 - 1e-6:
        cell.activation.a[...] = jnp.array(a)
        ends.append(loss(rnn))
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-7)


def test_a_projection_keeps_to_the_dtype_of_its_cell_and_to_its_inputs():
    gru = GRU(3, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    projected = gru.layers[0].project(jnp.ones((1, 3)))
    assert gru.step(projected, jnp.zeros((1, 1, 5))).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="inputs"):
        gru.layers[0].project(jnp.ones((1, 3), int))
    with pytest.raises(ValueError, match="from feature -3"):
        gru.layers[0].project(jnp.ones((1, 2)), first=-3)


def test_an_activation_of_another_dtype_leaves_the_dtype_of_the_network():
    activation = lambda y: jnp.tanh(y.astype(jnp.float32))  # noqa: E731
    rnn = RNN(3, 5, activation=activation, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert rnn(jnp.ones((1, 4, 3)))[0].dtype == jnp.bfloat16
