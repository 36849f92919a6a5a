"""The contract on arithmetic: half precision is multiplied as it comes and summed in float32.

Errors are judged against float64: at most twice those of PyTorch, or four units in the last place.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from jattn.kernels.blockwise import sizes
from tests import oracle
from tests.cases import B, operands

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# RMS error against float64 of torch.nn.functional.scaled_dot_product_attention (PyTorch 2.13, CPU)
# on `operands(np.random.default_rng(seed), 3, 3, T=509, S=521, H=61, V=61)` rounded to the dtype,
# with values shifted by 0 and by 10, of the output and of the gradients of query, key and value for
# the cotangent that the same generator draws next, for seeds 0, 1, 2.
TORCH_RMS = {
    ("float32", 0): (
        (2.759e-08, 3.550e-08, 3.205e-08, 2.897e-08),
        (2.744e-08, 3.516e-08, 3.152e-08, 2.836e-08),
        (2.745e-08, 3.530e-08, 3.191e-08, 2.923e-08),
    ),
    ("float32", 10): (
        (1.372e-06, 2.593e-07, 1.557e-07, 2.897e-08),
        (1.380e-06, 2.521e-07, 1.534e-07, 2.836e-08),
        (1.382e-06, 2.538e-07, 1.563e-07, 2.923e-08),
    ),
    ("bfloat16", 0): (
        (1.617e-04, 2.095e-04, 2.816e-04, 2.817e-04),
        (1.590e-04, 2.083e-04, 2.778e-04, 2.741e-04),
        (1.619e-04, 2.097e-04, 2.791e-04, 2.832e-04),
    ),
    ("bfloat16", 10): (
        (1.809e-02, 2.732e-03, 1.396e-03, 2.817e-04),
        (1.807e-02, 2.667e-03, 1.349e-03, 2.741e-04),
        (1.810e-02, 2.657e-03, 1.304e-03, 2.832e-04),
    ),
    ("float16", 0): (
        (2.049e-05, 2.655e-05, 3.519e-05, 3.514e-05),
        (2.020e-05, 2.600e-05, 3.460e-05, 3.439e-05),
        (2.050e-05, 2.608e-05, 3.481e-05, 3.547e-05),
    ),
    ("float16", 10): (
        (2.263e-03, 3.327e-04, 1.696e-04, 3.514e-05),
        (2.266e-03, 3.288e-04, 1.654e-04, 3.439e-05),
        (2.256e-03, 3.343e-04, 1.721e-04, 3.547e-05),
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(kernel, cotangent, *arrays):
    output, pull = jax.vjp(functools.partial(jattn.attend, implementation=kernel), *arrays)
    return output, *pull(cotangent)


def rms(a, b):
    difference = np.asarray(a).astype(np.float64) - np.asarray(b).astype(np.float64)
    return float(np.sqrt(np.mean(difference**2)))


def ulp(dtype, array):
    """The unit in the last place of the largest number."""
    exponent = np.floor(np.log2(float(np.abs(np.asarray(array)).max())))
    return float(jnp.finfo(dtype).eps) * 2.0**exponent


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dtype", "shift"), TORCH_RMS)
def test_errors_are_at_most_twice_those_of_pytorch(kernel, dtype, shift, seed, monkeypatch):
    monkeypatch.setattr(sizes, "ROWS", 128)
    monkeypatch.setattr(sizes, "COLUMNS", (128, 128))
    rng = np.random.default_rng(seed)
    query, key, value = operands(rng, 3, 3, T=509, S=521, H=61, V=61, dtype=np.float32)
    cotangent = rng.standard_normal((B, 509, 3, 61)).astype(np.float32)
    given = [np.asarray(jnp.asarray(x, dtype)) for x in (cotangent, query, key, value + shift)]
    came = output_and_gradients(kernel, *given)
    with jax.enable_x64(True):  # the dense kernel in float64 is held to loops
        truth = output_and_gradients("dense", *(array.astype(np.float64) for array in given))
    for a, b, torch_rms in zip(came, truth, TORCH_RMS[dtype, shift][seed], strict=True):
        assert a.dtype == dtype
        assert rms(a, b) <= max(2 * torch_rms, 4 * ulp(dtype, b))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_statistics_and_captured_arrays_keep_their_own_precision(kernel, dtype, rng):
    """The log-sum-exp is float32, and so is the gradient of a float32 table."""
    query, key, value = (jnp.asarray(x, dtype) for x in operands(rng, T=13, S=17))
    table = rng.standard_normal((6, 33)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def results(kernel, table, *arrays):
        def lse(table):
            modifier = modifiers.relative_bias(table)
            return jattn.attend(*arrays, modifier=modifier, implementation=kernel, return_lse=True)[
                1
            ]

        value, pull = jax.vjp(lse, table)
        return value, *pull(jnp.ones_like(value))

    came = results(kernel, table, query, key, value)
    assert [array.dtype for array in came] == [jnp.float32, jnp.float32]
    with jax.enable_x64(True):
        wide = (np.asarray(x).astype(np.float64) for x in (table, query, key, value))
        truth = results("dense", *wide)
    for a, b in zip(came, truth, strict=True):
        assert rms(a, b) <= 4 * ulp(np.float32, b)


def test_a_score_sees_the_dtype_that_came_and_may_return_any(kernel, rng):
    seen = []

    def score(query, key):
        seen.append((query.dtype.name, key.dtype.name))
        return jnp.einsum("...th,...sh->...ts", query, key)

    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in operands(rng))
    output, lse = jattn.attend(
        query, key, value, score=score, implementation=kernel, return_lse=True
    )
    assert set(seen) == {("bfloat16", "bfloat16")}
    assert (output.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_score_is_traced_once(kernel, rng):
    calls = []

    def score(query, key):
        calls.append(query.shape)
        return scores.scaled_dot_product(query, key)

    query, key, value = operands(rng, dtype=np.float32)
    loss = lambda q: jattn.attend(q, key, value, score=score, implementation=kernel).sum()  # noqa: E731
    jax.jit(jax.grad(loss))(query)
    assert len(calls) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accelerators_multiply_half_precision_as_it_comes(kernel, platform, dtype):
    """In the lowered program no operand of a product is float32, forward or backward."""

    def loss(query, key, value):
        options = {"mask": masks.causal(), "modifier": modifiers.soft_cap(5.0)}
        return jattn.attend(query, key, value, implementation=kernel, **options).sum()

    shapes = [jax.ShapeDtypeStruct((1, 9, heads, 8), dtype) for heads in (4, 2, 2)]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo.dot_general.* : \((.*)\) -> (.*)", text)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert len(products) >= 5
    for operand_types, result in products:
        left, right = operand_types.split(", ")
        assert left.endswith(f"x{short}>") and right.endswith(f"x{short}>")
        assert result.endswith("xf32>")


@pytest.mark.parametrize("how", ["argument", "context", "enum"])
def test_precision_reaches_every_product(kernel, how):
    """Forward and backward, by the argument or by what JAX holds for all."""

    def loss(query, key, value):
        precision = {"argument": "highest", "enum": jax.lax.Precision.HIGHEST}.get(how)
        return jattn.attend(query, key, value, precision=precision, implementation=kernel).sum()

    shapes = [jax.ShapeDtypeStruct((1, 9, heads, 8), np.float32) for heads in (4, 2, 2)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with jax.default_matmul_precision("highest" if how == "context" else "default"):
        text = gradient.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 5 and all("[HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("precision", ["most", 3])
def test_an_unknown_precision_is_named(precision, rng):
    with pytest.raises(ValueError, match=f"precision must .*got {precision!r}"):
        jattn.attend(*operands(rng, dtype=np.float32), precision=precision)


def test_a_float16_sum_beyond_its_range_is_not_lost(kernel, rng):
    """Scores of 90,000, of which float16 holds none, are held in float32."""
    query, key, value = (jnp.full((1, 5, 1, 4), x, jnp.float16) for x in (150.0, 150.0, 1.0))
    output, lse = jattn.attend(query, key, value, implementation=kernel, return_lse=True)
    truth, truth_lse, _ = oracle.attend(query, key, value, score=oracle.scaled_dot_product)
    np.testing.assert_allclose(output.astype(np.float32), truth)
    np.testing.assert_allclose(lse, truth_lse, rtol=1e-6)
