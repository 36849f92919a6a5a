"""Single-head pooling modules against NumPy with their parameters; dropout, transforms, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks
from jattn.nn import AdditiveAttention, BilinearAttention, DotProductAttention, NadarayaWatson
from tests import oracle

B, T, S, DQ, DK, V, F = 2, 5, 7, 3, 11, 13, 17
LENGTHS = np.array([0, 4])


def make(name, rate=0.0, param_dtype=jnp.float64):
    rngs = nnx.Rngs(0)
    return {
        "additive": lambda: AdditiveAttention(
            DQ, DK, F, dropout_rate=rate, param_dtype=param_dtype, rngs=rngs
        ),
        "bilinear": lambda: BilinearAttention(
            DQ, DK, dropout_rate=rate, param_dtype=param_dtype, rngs=rngs
        ),
        "scaled": lambda: DotProductAttention(dropout_rate=rate, rngs=rngs),
        "dot": lambda: DotProductAttention(scaled=False, dropout_rate=rate, rngs=rngs),
        "kernel": lambda: NadarayaWatson(param_dtype=param_dtype, rngs=rngs),
    }[name]()


NAMES = ["additive", "bilinear", "scaled", "dot", "kernel"]


def single(name, module):
    """The score of one pair, from the parameters under the names that weight rules rely on."""
    if name == "additive":
        w_q, w_k, w = (
            np.asarray(each[...])
            for each in (module.query.kernel, module.key.kernel, module.weight)
        )
        assert w_q.shape == (DQ, F) and w_k.shape == (DK, F) and w.shape == (F,)
        return lambda q, k, h: float(w @ np.tanh(w_q.T @ q + w_k.T @ k))
    if name == "bilinear":
        weight = np.asarray(module.weight[...])
        assert weight.shape == (DQ, DK)
        return lambda q, k, h: float(q @ weight @ k)
    if name == "kernel":
        weight = float(module.weight[...])
        return lambda q, k, h: -float(sum(((q - k) * weight) ** 2)) / 2
    return lambda q, k, h: float(q @ k) / (np.sqrt(DQ) if name == "scaled" else 1.0)


def inputs(name, rng, dtype=np.float64):
    width = DK if name in ("additive", "bilinear") else DQ
    return tuple(
        rng.standard_normal(shape).astype(dtype) for shape in ((B, T, DQ), (B, S, width), (B, S, V))
    )


@pytest.mark.parametrize("name", NAMES)
def test_pooling_is_the_loop(name, rng, x64):
    module, (query, key, value) = make(name), inputs(name, rng)
    truth, _, truth_weights = oracle.attend(
        *(array[:, :, None] for array in (query, key, value)),
        score=single(name, module), allowed=lambda b, h, t, s: s < LENGTHS[b],
    )  # fmt: skip
    pool = nnx.jit(lambda module, *x: module(*x, mask=masks.padding(LENGTHS), return_weights=True))
    output, weights = pool(module, query, key, value)
    assert output.shape == (B, T, V) and weights.shape == (B, T, S) and output.dtype == jnp.float64
    np.testing.assert_allclose(output, truth[:, :, 0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(weights, truth_weights[:, 0], rtol=1e-12, atol=1e-13)
    alone = nnx.jit(lambda module, *x: module(*x, mask=masks.padding(LENGTHS)))(
        module, query, key, value
    )
    np.testing.assert_allclose(alone, output, rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_no_batch_and_vmap_agree_with_the_batch(name, rng, x64):
    module, arrays = make(name), inputs(name, rng)
    whole = nnx.jit(lambda module, *x: module(*x))(module, *arrays)
    one = nnx.jit(lambda module, *x: module(*x))(module, *(array[0] for array in arrays))
    np.testing.assert_allclose(one, whole[0], rtol=1e-12, atol=1e-14)
    graphdef, state = nnx.split(module)
    mapped = jax.jit(jax.vmap(lambda *x: nnx.merge(graphdef, state)(*x)))(*arrays)
    np.testing.assert_allclose(mapped, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["additive", "bilinear", "kernel"])
def test_gradients_of_every_parameter_are_slopes_of_the_loop(name, rng, x64):
    module, (query, key, value) = make(name), inputs(name, rng)
    cotangent = rng.standard_normal((B, T, V))
    loss = nnx.jit(lambda module: (module(query, key, value) * cotangent).sum())
    gradient = nnx.grad(loss)(module)
    for path, leaf in nnx.to_flat_state(gradient):
        parameter = functools.reduce(getattr, path, module)
        index = (0,) * leaf[...].ndim
        ends = []
        for side in (1e-6, -1e-6):
            kept = parameter[...]
            parameter[...] = kept.at[index].add(side)
            heads = (array[:, :, None] for array in (query, key, value))
            ends.append(
                (oracle.attend(*heads, score=single(name, module))[0][:, :, 0] * cotangent).sum()
            )
            parameter[...] = kept
        np.testing.assert_allclose(
            leaf[...][index], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9
        )


def test_keys_are_projected_once_for_many_queries(rng, x64):
    module, (query, key, value) = make("additive"), inputs("additive", rng)
    projected = module.project_key(key)
    step = nnx.jit(lambda m, query, *x: m.attend_projected(query, *x, mask=masks.padding(LENGTHS)))
    np.testing.assert_allclose(projected, key @ np.asarray(module.key.kernel[...]), rtol=1e-12)
    whole = nnx.jit(lambda m, *x: m(*x, mask=masks.padding(LENGTHS)))(module, query, key, value)
    for t in range(T):
        one = step(module, query[:, t : t + 1], projected, value)
        np.testing.assert_allclose(one[:, 0], whole[:, t], rtol=1e-12)


def test_leave_one_out_regression(rng, x64):
    """Leave-one-out training: each point from the others."""
    module = make("kernel")
    x, y = rng.standard_normal((S, 1)), rng.standard_normal((S, 1))
    came = module(x, x, y, mask=masks.no_self())
    w = float(module.weight[...])
    for i in range(S):
        kernel = [
            np.exp(-(((x[i, 0] - x[j, 0]) * w) ** 2) / 2) if i != j else 0.0 for j in range(S)
        ]
        np.testing.assert_allclose(came[i, 0], np.dot(kernel, y[:, 0]) / sum(kernel), rtol=1e-12)
    assert module.weight[...].shape == () and 0 <= w <= 1


@pytest.mark.parametrize("name", ["additive", "bilinear", "scaled"])
def test_dropout_follows_train_and_eval_and_the_argument(name, rng):
    module, arrays = make(name, 0.5, jnp.float32), inputs(name, rng, np.float32)
    call = nnx.jit(lambda module, *x: module(*x, return_weights=True))
    plain = nnx.jit(lambda module, *x: module(*x, deterministic=True))
    clean = plain(module, *arrays)
    (first, weights), (second, same) = call(module, *arrays), call(module, *arrays)
    # A new pattern for every call
    assert not np.allclose(first, second) and not np.allclose(first, clean)
    np.testing.assert_array_equal(weights, same)  # weights are those before dropout
    module.eval()
    np.testing.assert_allclose(call(module, *arrays)[0], clean, rtol=1e-6)
    dropped = nnx.jit(lambda module, *x: module(*x, deterministic=False))(module, *arrays)
    assert not np.allclose(dropped, clean)
    module.train()
    assert not np.allclose(call(module, *arrays)[0], clean)


def test_two_modules_of_one_seed_drop_differently(rng):
    rngs = nnx.Rngs(0)
    arrays = inputs("scaled", rng, np.float32)
    first, second = (DotProductAttention(dropout_rate=0.5, rngs=rngs) for _ in range(2))
    assert not np.allclose(first(*arrays), second(*arrays))
    again = DotProductAttention(dropout_rate=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(
        again(*arrays), DotProductAttention(dropout_rate=0.5, rngs=nnx.Rngs(0))(*arrays)
    )


@pytest.mark.parametrize("name", ["additive", "bilinear"])
def test_parameters_have_the_dtype_asked_for(name, rng):
    module = make(name, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in inputs(name, rng)]
    assert nnx.eval_shape(lambda m, *x: m(*x), module, *arrays).dtype == jnp.bfloat16


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            "dropout_rate must lie in 0 … 1, got 1.5",
            lambda m: DotProductAttention(dropout_rate=1.5),
        ),
        (
            ValueError,
            "dropout_rate must lie in 0 … 1, got -0.1",
            lambda m: DotProductAttention(dropout_rate=-0.1),
        ),
        (
            ValueError,
            "dropout_rate = 0.5 needs rngs",
            lambda m: DotProductAttention(dropout_rate=0.5),
        ),
        (
            ValueError,
            r"query must be \[..., length, 3\], got shape \(2, 5, 11\)",
            lambda m: m(of(B, T, DK), of(B, S, DK), of(B, S, V)),
        ),
        (
            ValueError,
            r"key must be \[..., length, 11\], got shape \(2, 7, 3\)",
            lambda m: m(of(B, T, DQ), of(B, S, DQ), of(B, S, V)),
        ),
        (
            ValueError,
            r"query must be .*got shape \(3,\)",
            lambda m: m(of(DQ), of(B, S, DK), of(B, S, V)),
        ),
        (
            ValueError,
            r"value must be .*got shape \(2, 5, 13\)",
            lambda m: m(of(B, T, DQ), of(B, S, DK), of(B, T, V)),
        ),
        (
            ValueError,
            "key must be .*got shape",
            lambda m: m(of(B, T, DQ), of(3, S, DK), of(3, S, V)),
        ),
        (
            TypeError,
            "query must be floating point",
            lambda m: m(of(B, T, DQ, dtype=np.int32), of(B, S, DK), of(B, S, V)),
        ),
        (
            TypeError,
            "key must be floating point",
            lambda m: m(of(B, T, DQ), of(B, S, DK, dtype=np.int32), of(B, S, V)),
        ),
        (
            TypeError,
            "value must be floating point",
            lambda m: m(of(B, T, DQ), of(B, S, DK), of(B, S, V, dtype=np.int32)),
        ),
        (ValueError, "key", lambda m: m.attend_projected(of(B, T, DQ), of(B, S, DK), of(B, S, V))),
        (
            ValueError,
            "mask must broadcast",
            lambda m: m(of(B, T, DQ), of(B, S, DK), of(B, S, V), mask=of(S, T, dtype=bool)),
        ),
        (
            ValueError,
            "lengths",
            lambda m: m(
                of(B, T, DQ), of(B, S, DK), of(B, S, V), mask=masks.padding(np.array([1, 8]))
            ),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    module = AdditiveAttention(DQ, DK, F, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=match):
        call(module)
