"""attend beyond the contract of the kernels.

Bad input, the choice of a kernel, what is returned, second order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from jattn.functional import compat
from jattn.kernels import blockwise
from tests import oracle

B, T, S, N, K, H, V = 2, 5, 7, 6, 2, 3, 11


def operands(rng, dtype=np.float64, N=N, K=K, V=V):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


# Bad input: an error that names the argument, what was expected and what came, before anything is
# compiled


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


Q, KEY, VALUE = of(B, T, N, H), of(B, S, K, H), of(B, S, K, V)
KEYED = {"dropout_rate": 0.5, "dropout_key": None}
UNFIT = masks.from_array(of(S, T, dtype=bool))


BAD = {
    "rank of query": (
        ValueError,
        r"query must be \[..., T, N, H\], got shape \(6, 3\)",
        (of(N, H), KEY, VALUE),
        {},
    ),
    "rank of key": (ValueError, r"key must be .*got shape \(7, 2, 3\)", (Q, KEY[0], VALUE), {}),
    "rank of value": (ValueError, r"value must be .*got shape \(7, 2\)", (Q, KEY, of(S, K)), {}),
    "batch": (
        ValueError,
        r"key must be .*got shape \(3, 7, 2, 3\)",
        (Q, of(3, S, K, H), VALUE),
        {},
    ),
    "head width": (
        ValueError,
        r"query and key must have one width H.*3\).*2\)",
        (Q, KEY[..., :2], VALUE),
        {},
    ),
    "no head width": (
        ValueError,
        "head width must be at least 1",
        (Q[..., :0], KEY[..., :0], VALUE),
        {},
    ),
    "no heads": (
        ValueError,
        "heads .* must be at least 1",
        (Q, KEY[:, :, :0], VALUE[:, :, :0]),
        {},
    ),
    "heads of query": (
        ValueError,
        r"query \(N = 5\) must be a multiple .*key \(K = 2\)",
        (Q[:, :, :5], KEY, VALUE),
        {},
    ),
    "heads of value": (
        ValueError,
        r"value must be .*K = 2.*got shape \(2, 7, 1, 11\)",
        (Q, KEY, VALUE[:, :, :1]),
        {},
    ),
    "length of value": (
        ValueError,
        r"value must be .*S = 7.*got shape \(2, 6, 2, 11\)",
        (Q, KEY, VALUE[:, :6]),
        {},
    ),
    "integer query": (
        TypeError,
        "query must be floating point, got int32",
        (of(B, T, N, H, dtype=np.int32), KEY, VALUE),
        {},
    ),
    "integer key": (
        TypeError,
        "key must be floating point, got bool",
        (Q, of(B, S, K, H, dtype=bool), VALUE),
        {},
    ),
    "complex value": (
        TypeError,
        "value must be floating point, got complex64",
        (Q, KEY, of(B, S, K, V, dtype=np.complex64)),
        {},
    ),
    "mask shape": (
        ValueError,
        r"mask must broadcast to .*\(2, 6, 5, 7\), got shape \(7, 5\)",
        (Q, KEY, VALUE),
        {"mask": of(S, T, dtype=bool)},
    ),
    "mask per example": (
        ValueError,
        r"mask\[:, None\]",
        (Q, KEY, VALUE),
        {"mask": of(B, T, S, dtype=bool)},
    ),
    "mask of Hugging Face": (
        ValueError,
        r"mask must broadcast .*got shape \(2, 7\).*padding\(lengths\).*mask\[:, None, None\]",
        (Q, KEY, VALUE),
        {"mask": of(B, S, dtype=bool)},
    ),
    "mask too large": (
        ValueError,
        "mask must broadcast",
        (Q, KEY, VALUE),
        {"mask": of(2, B, N, T, S, dtype=bool)},
    ),
    "float mask": (
        TypeError,
        "mask .*must be boolean.*got float32",
        (Q, KEY, VALUE),
        {"mask": of(T, S)},
    ),
    "mask that is a modifier": (
        TypeError,
        "mask is a modifier of scores: pass it as modifier=",
        (Q, KEY, VALUE),
        {"mask": modifiers.soft_cap(3.0)},
    ),
    "modifier that is a mask": (
        TypeError,
        "modifier is a mask: pass it as mask=",
        (Q, KEY, VALUE),
        {"modifier": masks.causal()},
    ),
    "several masks": (
        TypeError,
        "mask must be one mask, got several: combine them with & or |",
        (Q, KEY, VALUE),
        {"mask": [masks.causal(), masks.no_self()]},
    ),
    "arrays without an axis of heads": (
        ValueError,
        r"got shape \(5, 3\); one head is an axis too: x\[..., None, :\]",
        (jnp.ones((5, 3)), jnp.ones((5, 3)), jnp.ones((5, 3))),
        {},
    ),
    "mask of too few arguments": (
        TypeError,
        r"mask must be a function of \(b, h, q_idx, k_idx\), got one of \(",
        (Q, KEY, VALUE),
        {"mask": lambda i, j: i >= j},
    ),
    "modifier of too many arguments": (
        TypeError,
        r"modifier must be a function of \(score, b, h, q_idx, k_idx\), got one of .*extra",
        (Q, KEY, VALUE),
        {"modifier": lambda x, b, h, i, j, extra: x},
    ),
    "modifier that returns nothing": (
        TypeError,
        "modifier must return a number, got NoneType",
        (Q, KEY, VALUE),
        {"modifier": lambda x, b, h, i, j: None},
    ),
    "mask that returns an array": (
        ValueError,
        r"mask must return one number for each entry, shape \(\), got shape \(3,\)",
        (Q, KEY, VALUE),
        {"mask": lambda b, h, i, j: np.ones(3, bool)},
    ),
    "mask that branches": (
        TypeError,
        "mask branches on a traced value .*: use jnp.where, & and |",
        (Q, KEY, VALUE),
        {"mask": lambda b, h, i, j: i >= j and h > 0},
    ),
    "mask of no kind": (TypeError, "mask.*got str", (Q, KEY, VALUE), {"mask": "causal"}),
    "nested mask": (
        ValueError,
        "mask must broadcast",
        (Q, KEY, VALUE),
        {"mask": masks.causal() | ~UNFIT},
    ),
    "negative length": (
        ValueError,
        "lengths must lie in 0 … 7 .*got -1",
        (Q, KEY, VALUE),
        {"mask": masks.padding(np.array([-1, 3]))},
    ),
    "long length": (
        ValueError,
        "lengths must lie in 0 … 7 .*got 8",
        (Q, KEY, VALUE),
        {"mask": masks.padding(np.array([0, 8]))},
    ),
    "lengths for another batch": (
        ValueError,
        "padding lengths must be",
        (Q, KEY, VALUE),
        {"mask": masks.padding(np.array([1, 2, 3]))},
    ),
    "dropout without a key": (
        ValueError,
        "dropout_rate = 0.5 needs a dropout_key, got None",
        (Q, KEY, VALUE),
        KEYED,
    ),
    "dropout rate": (
        ValueError,
        "dropout_rate must .*0.*1, got 1.5",
        (Q, KEY, VALUE),
        {"dropout_rate": 1.5},
    ),
    "negative dropout rate": (
        ValueError,
        "dropout_rate must .*got -0.1",
        (Q, KEY, VALUE),
        {"dropout_rate": -0.1},
    ),
    "NaN dropout rate": (
        ValueError,
        "dropout_rate must .*got nan",
        (Q, KEY, VALUE),
        {"dropout_rate": math.nan},
    ),
    "dropout rate of no kind": (
        (TypeError, ValueError),
        "dropout_rate",
        (Q, KEY, VALUE),
        {"dropout_rate": "0.5"},
    ),
    "dropout key of no kind": (
        (TypeError, ValueError),
        "dropout_key",
        (Q, KEY, VALUE),
        {"dropout_rate": 0.5, "dropout_key": 3},
    ),
    "several dropout keys": (
        ValueError,
        r"dropout_key must be a JAX random key .*got several of shape \(2,\)",
        (Q, KEY, VALUE),
        {"dropout_rate": 0.5, "dropout_key": np.zeros((2, 2), np.uint32)},
    ),
    "implementation": (
        ValueError,
        "implementation must be None, or one or several of .*dense.*got 'flash'",
        (Q, KEY, VALUE),
        {"implementation": "flash"},
    ),
    "score that returns a number": (
        TypeError,
        r"score must return an array \[..., T, S\] = \(2, 2, 3, 5, 7\), got a float",
        (Q, KEY, VALUE),
        {"score": lambda query, key: 0.0},
    ),
    "kernel of another platform": (
        NotImplementedError,
        "cudnn: it runs on NVIDIA GPUs, not on cpu",
        (Q, KEY, VALUE),
        {"implementation": "cudnn"},
    ),
    "score of no kind": (TypeError, "score must be .*str", (Q, KEY, VALUE), {"score": "dot"}),
    "modifier of no kind": (
        TypeError,
        "modifier must be callable.*got str",
        (Q, KEY, VALUE),
        {"modifier": "alibi"},
    ),
    "heads of modifier": (
        ValueError,
        "alibi slopes .*N = 6, got 2",
        (Q, KEY, VALUE),
        {"modifier": modifiers.alibi(of(2))},
    ),
    "one of two positions": (
        ValueError,
        "positions must be a pair",
        (Q, KEY, VALUE),
        {"positions": np.arange(T)},
    ),
    "length of positions": (
        ValueError,
        r"key positions must have shape \(7,\) or \(2, 7\), got \(5,\)",
        (Q, KEY, VALUE),
        {"positions": (np.arange(T), np.arange(T))},
    ),
    "float positions": (
        TypeError,
        "query positions must be integers, got float64",
        (Q, KEY, VALUE),
        {"positions": (np.arange(5.0), np.arange(S))},
    ),
}


@pytest.fixture
def compilations():
    """The compilations that happen during the test."""
    seen = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_seen(compilations):
    jax.jit(lambda x: x * 1.2345)(np.zeros(13, np.float32))
    assert compilations


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_compile(name, compilations):
    error, match, arrays, options = BAD[name]
    # The copy of a NumPy array to the device counts as one
    arrays = [jnp.asarray(array) for array in arrays]
    compilations.clear()
    with pytest.raises(error, match=match):
        jattn.attend(*arrays, **options)
    assert not compilations


@pytest.mark.parametrize(
    "name",
    [
        "head width",
        "integer key",
        "mask shape",
        "long length",
        "heads of query",
        "heads of modifier",
    ],
)
def test_bad_input_of_attention_weights_is_named(name):
    error, match, arrays, options = BAD[name]
    with pytest.raises(error, match=match):
        jattn.attention_weights(*arrays[:2], **options)


@pytest.mark.parametrize("swapped", ["query", "key value", "key", "value", "query key value"])
def test_swapped_length_and_head_axes_are_suspected_where_that_would_fit(swapped):
    given = {"query": Q, "key": KEY, "value": VALUE}
    for name in swapped.split():
        given[name] = given[name].swapaxes(-3, -2)
    with pytest.raises(ValueError, match=r"axes -3 and -2 .*swapped"):
        jattn.attend(*given.values())


def test_no_swap_is_suspected_where_it_would_not_help():
    with pytest.raises(ValueError, match="multiple of the heads") as error:
        jattn.attend(of(B, 5, 7, H), of(B, 11, 3, H), of(B, 11, 3, V))
    assert "swapped" not in str(error.value)


def test_a_score_of_the_wrong_shape_or_dtype_is_named():
    with pytest.raises(ValueError, match=r"score must return .*got \(2, 2, 3, 7, 5\)"):
        jattn.attend(
            Q, KEY, VALUE, score=lambda query, key: scores.dot_product(query, key).swapaxes(-1, -2)
        )
    with pytest.raises(TypeError, match="score must be floating point, got int32"):
        jattn.attend(
            Q, KEY, VALUE, score=lambda query, key: scores.dot_product(query, key).astype(jnp.int32)
        )


@pytest.mark.parametrize("weight", [of(3, H), of(2, H), of(B * N, H)], ids=["G", "K", "B N"])
def test_parameters_for_another_number_of_heads_are_an_error(weight):
    """One row per member of a group, per key head, or per example and head, is no row per head."""
    for key, value in ((KEY, VALUE), (of(B, S, N, H), of(B, S, N, V))):
        with pytest.raises(ValueError, match="weight"):
            jattn.attend(Q, key, value, score=functools.partial(scores.additive, weight=weight))


def test_traced_lengths_are_not_checked_but_clear():
    """j < length has a meaning for any length: negative is empty, too long is all."""
    attend = jax.jit(lambda lengths: jattn.attention_weights(Q, KEY, mask=masks.padding(lengths)))
    weights = attend(np.array([-3, 100]))
    assert (weights[0] == 0).all()
    np.testing.assert_allclose(weights[1], 1 / S, rtol=1e-6)


# Choosing a kernel


def of_size(T, N=1, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct((1, T, N, 8), dtype)] * 3


def test_the_number_of_scores_decides_and_explain_says_so():
    few, many = (jattn.explain(*of_size(T)) for T in (1447, 1449))  # 2²¹ is about 1448²
    assert few.splitlines()[0].startswith("dense ") and "runs: 2,093,809 scores" in few
    assert "dense comes first" in few.splitlines()[1]
    assert many.splitlines()[0].startswith("blockwise") and "runs: 2,099,601 scores" in many


def test_explain_names_the_reason_of_each_kernel_that_is_passed_over():
    told = jattn.explain(
        *of_size(64), implementation=("cudnn", "blockwise", "dense"), return_weights=True
    )
    cudnn, blockwise, dense = told.splitlines()
    assert "passed over: it runs on NVIDIA GPUs" in cudnn and "return_weights" in cudnn
    assert "passed over: it never holds all weights" in blockwise
    assert "runs" in dense


def test_memory_is_never_quadratic_unasked():
    """Where only the dense kernel is left, over 2²⁷ scores are an error.

    By name they are a wish.
    """
    arrays = of_size(12_000)
    by_default = functools.partial(jattn.attend, implementation=None)

    def refuse(*arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blockwise, "refuses", lambda request: "it is out of order")
            return by_default(*arrays)

    with pytest.raises(
        NotImplementedError, match=r"144,000,000 scores.*implementation=\"dense\""
    ) as error:
        jax.eval_shape(refuse, *arrays)
    assert "it is out of order" in str(error.value)
    for options in ({"implementation": "dense"}, {"return_weights": True}):
        jax.eval_shape(functools.partial(jattn.attend, **options), *arrays)


def test_an_error_of_a_users_own_function_reaches_the_user(rng):
    def unfinished(query, key):
        raise NotImplementedError("to be written")

    with pytest.raises(NotImplementedError, match=r"^to be written"):
        jattn.attend(*operands(rng, np.float32), score=unfinished)


@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_sizes_take_the_dense_kernel(axis):
    """`jax.export` compares no symbol with a number, so the kernel is a fixed one."""
    (size,) = jax.export.symbolic_shape("n")
    shape = [3, 5, 2, 8]
    shape[axis] = size
    arrays = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32)] * 3
    attend = jax.jit(lambda *a: jattn.attend(*a, mask=masks.causal()))
    exported = jax.export.export(attend)(*arrays)
    known = np.random.default_rng(0).standard_normal((7, 7, 2, 8)).astype(np.float32)
    known = known[:3] if axis == 1 else known[:, :5]
    np.testing.assert_allclose(
        exported.call(known, known, known), attend(known, known, known), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {"mask": masks.causal(), "modifier": lambda x, b, h, i, j: x * 2},
        {"modifier": modifiers.bias(np.ones((2, 1, 1), np.float32))},
        {"modifier": modifiers.relative_bias(np.ones(99, np.float32))},
        {"mask": np.ones((1, 1), bool)},
    ],
    ids=["modifier", "bias", "table", "array"],
)
def test_symbolic_sizes_of_everything_with_masks_and_modifiers(options):
    b, t, s = jax.export.symbolic_shape("b, t, s")
    shapes = [(b, t, 2, 8), (b, s, 2, 8), (b, s, 2, 8)]
    exported = jax.export.export(jax.jit(lambda *a: jattn.attend(*a, **options)))(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    known = [np.ones((3, n, 2, 8), np.float32) for n in (5, 7, 7)]
    np.testing.assert_allclose(exported.call(*known), np.ones((3, 5, 2, 8)), rtol=1e-6)


def test_an_eager_call_finds_what_was_compiled_for_an_equal_one(rng, compilations):
    """Though the caller writes the lambda, the mask and the partial anew."""
    query, key, value = map(jnp.asarray, operands(rng, np.float32))

    def call():
        return jattn.attend(
            query, key, value,
            score=functools.partial(scores.scaled_dot_product, scale=0.5),
            mask=masks.padding(jnp.array([3, 5])) & masks.mask_mod(lambda b, h, i, j: j >= i),
            modifier=lambda x, b, h, i, j: x * 2, implementation="blockwise",
        )  # fmt: skip

    first = call()
    compilations.clear()
    np.testing.assert_array_equal(call(), first)
    assert not compilations


# What is returned


def test_extras_come_in_the_order_of_the_arguments(rng, x64):
    query, key, value = operands(rng)
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product)
    np.testing.assert_allclose(jattn.attend(query, key, value), truth[0], rtol=1e-12)
    with_lse = jattn.attend(query, key, value, return_lse=True)
    with_weights = jattn.attend(query, key, value, return_weights=True)
    everything = jattn.attend(query, key, value, return_lse=True, return_weights=True)
    for came, expected in ((with_lse, truth[:2]), (with_weights, truth[::2]), (everything, truth)):
        for a, b in zip(came, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_weights_and_lse_are_those_before_dropout(rng):
    query, key, value = operands(rng, np.float32)
    plain = jattn.attend(query, key, value, return_lse=True, return_weights=True)
    dropped = jattn.attend(
        query,
        key,
        value,
        return_lse=True,
        return_weights=True,
        dropout_rate=0.7,
        dropout_key=jax.random.key(0),
    )
    assert not np.allclose(plain[0], dropped[0])
    jax.tree.map(np.testing.assert_array_equal, plain[1:], dropped[1:])


def test_grouped_keys_and_values_are_never_repeated():
    """No array of the traced program is as large as the repeated keys or values."""
    long, width = 1009, 61
    shapes = (1, 1, 8, width), (1, long, 2, width), (1, long, 2, width)
    jaxpr = jax.make_jaxpr(jattn.attend)(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    made = [v.aval for e in compat.equations(jaxpr.jaxpr) for v in e.outvars]
    assert max(math.prod(array.shape) for array in made) == 2 * long * width


# Forward mode and second order, on the dense kernel


def test_forward_mode_is_reverse_mode_and_the_slope_of_the_loop(rng, x64):
    query, key, value = operands(rng, N=2, K=1, V=2)
    tangents = tuple(rng.standard_normal(array.shape) for array in (query, key, value))
    cotangent = rng.standard_normal((B, T, 2, 2))
    mask = masks.padding(np.array([0, 4])) & masks.causal()

    def attend(query, key, value):
        return jattn.attend(query, key, value, mask=mask, implementation="dense")

    def forward_and_reverse(*arrays):
        _, tangent = jax.jvp(attend, arrays, tangents)
        gradients = jax.vjp(attend, *arrays)[1](jnp.asarray(cotangent))
        return (tangent * cotangent).sum(), sum(
            jnp.vdot(a, b) for a, b in zip(gradients, tangents, strict=True)
        )

    def truth(step):
        moved = [a + step * d for a, d in zip((query, key, value), tangents, strict=True)]
        output, _, _ = oracle.attend(
            *moved,
            score=oracle.scaled_dot_product,
            allowed=lambda b, h, t, s: s < (0, 4)[b] and s <= t,
        )
        return (output * cotangent).sum()

    forward, reverse = jax.jit(forward_and_reverse)(query, key, value)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12)
    np.testing.assert_allclose(forward, (truth(1e-6) - truth(-1e-6)) / 2e-6, rtol=1e-7)


def test_the_hessian_is_symmetric_and_the_slope_of_the_gradient(rng, x64):
    query, key, value = (array[0, :2] for array in operands(rng, N=2, K=1, V=2))
    mask = masks.from_array(np.array([[True, False], [False, False]]))  # an empty row among them

    def loss(query):
        output, lse = jattn.attend(
            query, key, value, mask=mask, implementation="dense", return_lse=True
        )
        return jnp.sin(output).sum() + jnp.where(jnp.isneginf(lse), 0, lse**2).sum()

    hessian, gradient = jax.jit(jax.hessian(loss))(query), jax.jit(jax.grad(loss))
    np.testing.assert_allclose(hessian, hessian.transpose(3, 4, 5, 0, 1, 2), rtol=1e-10, atol=1e-14)
    direction = rng.standard_normal(query.shape)
    slope = (gradient(query + 1e-6 * direction) - gradient(query - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(np.tensordot(hessian, direction, 3), slope, rtol=1e-6, atol=1e-9)
    assert (hessian[1] == 0).all() and (hessian != 0).any()


# Reductions


def test_a_window_and_positions_make_a_cached_step(rng, x64):
    """The last row of the whole is one query at its own position, with the keys so far."""
    query, key, value = operands(rng, N=2, K=2)
    query = rng.standard_normal((B, S, 2, H))
    mask = masks.causal() & masks.sliding_window(3)
    whole = jattn.attend(query, key, value, mask=mask)
    for step in (0, 3, S - 1):
        one = jattn.attend(
            query[:, step : step + 1],
            key,
            value,
            mask=mask,
            positions=(np.array([step]), np.arange(S)),
        )
        np.testing.assert_allclose(one, whole[:, step : step + 1], rtol=1e-13)


def test_multi_query_is_every_head_on_one_key_head(rng, x64):
    query, key, value = operands(rng, K=1)
    whole = jattn.attend(query, key, value)
    for n in range(N):
        np.testing.assert_allclose(
            whole[:, :, n : n + 1], jattn.attend(query[:, :, n : n + 1], key, value), rtol=1e-13
        )
    repeated = jattn.attend(query, *(np.repeat(array, N, axis=-2) for array in (key, value)))
    np.testing.assert_allclose(whole, repeated, rtol=1e-13)
