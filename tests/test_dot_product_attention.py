"""dot_product_attention: the numbers of jax.nn's, the documented differences, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import oracle

B, T, S, N, K, H, V = 2, 5, 7, 6, 2, 3, 11


def operands(rng, dtype=np.float64, N=N, K=K, V=V):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


Q, KEY, VALUE = of(B, T, N, H), of(B, S, K, H), of(B, S, K, V)


def reference(*operands, **options):
    return jax.nn.dot_product_attention(*operands, implementation="xla", **options)


DOT_PRODUCT = {
    "plain": {},
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0.0},
    "causal": {"is_causal": True},
    "key lengths": {"key_value_seq_lengths": np.array([3, 7], np.int32)},
    "window": {"local_window_size": 2},
    "window pair": {"local_window_size": (1, 3)},
    "one-sided window, causal": {"local_window_size": (2, 0), "is_causal": True},
    "bias": {"bias": np.random.default_rng(1).standard_normal((B, 6, T, S)).astype(np.float32)},
    "shared bias": {
        "bias": np.random.default_rng(1).standard_normal((1, 6, T, S)).astype(np.float32)
    },
    "mask": {"mask": np.random.default_rng(1).random((B, 1, T, S)) < 0.8},
    "all": {
        "bias": np.random.default_rng(2).standard_normal((B, 1, T, S)).astype(np.float32),
        "mask": np.random.default_rng(3).random((1, 6, T, S)) < 0.9,
        "scale": 0.7,
        "is_causal": True,
        "local_window_size": (3, 1),
        "key_value_seq_lengths": np.array([6, 4], np.int32),
    },
}


@pytest.mark.parametrize(
    ("name", "K"),
    [*((name, 2) for name in DOT_PRODUCT), ("plain", 6), ("all", 6), ("plain", 1), ("all", 1)],
)
def test_dot_product_attention_has_the_numbers_of_jax(name, K, rng):
    """Outputs and gradients, residual too.

    A row that jax.nn would fill with a mean is told apart by the residual.
    """
    operands_ = operands(rng, np.float32, K=K, V=H)
    options = DOT_PRODUCT[name]

    def both(attend):
        def loss(*operands):
            output, residual = attend(*operands, **options, return_residual=True)
            filled = residual > -1e9  # jax.nn fills with a large negative number, attend has −inf
            shown = jnp.where(filled[..., None], output, 0)
            return jnp.sin(shown).sum(), (shown, jnp.where(filled, residual, 0))

        (_, values), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            *operands_
        )
        return values, gradients

    came, expected = both(jattn.dot_product_attention), both(reference)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), came, expected
    )


def test_dot_product_attention_of_query_lengths(rng):
    query, key, value = operands(rng, np.float32, V=H)
    lengths = {
        "query_seq_lengths": np.array([2, 5], np.int32),
        "key_value_seq_lengths": np.array([7, 3], np.int32),
    }
    came, expected = (
        jattn.dot_product_attention(query, key, value, **lengths),
        reference(query, key, value, **lengths),
    )
    np.testing.assert_allclose(came[0, :2], expected[0, :2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(came[1], expected[1], rtol=1e-5, atol=1e-6)
    assert (came[0, 2:] == 0).all()  # documented: hidden queries give 0


def test_dot_product_attention_without_a_batch_and_by_keyword(rng):
    query, key, value = (array[0] for array in operands(rng, np.float32, V=H))
    for options in ({}, {"is_causal": True}, {"bias": np.ones((6, T, S), np.float32)}):
        came = jattn.dot_product_attention(
            query=query, key=key, value=value, implementation="xla", **options
        )
        np.testing.assert_allclose(
            came, reference(query, key, value, **options), rtol=1e-5, atol=1e-6
        )
    output, residual = jattn.dot_product_attention(query, key, value, return_residual=True)
    assert output.shape == query.shape and residual.shape == query.shape[:-1]


def test_documented_differences_to_jax(rng):
    query, key, value = operands(rng, np.float32)
    key[1, 3:] = value[1, 3:] = np.nan
    output = jattn.dot_product_attention(query, key, value, key_value_seq_lengths=np.array([0, 3]))
    assert (output[0] == 0).all() and jnp.isfinite(output).all() and output.shape[-1] == V
    looped = oracle.attend(query[1:], key[1:, :3], value[1:, :3], score=oracle.scaled_dot_product)[
        0
    ]
    np.testing.assert_allclose(output[1:], looped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (
            ValueError,
            "query_seq_lengths must lie in 0 … 5 .*got 6",
            {"query_seq_lengths": np.array([2, 6])},
        ),
        (
            ValueError,
            "query_seq_lengths must lie in 0 … 5 .*got -1",
            {"query_seq_lengths": np.array([-1, 2])},
        ),
        (
            ValueError,
            r"query_seq_lengths must .*got .*\(3,\)",
            {"query_seq_lengths": np.array([2, 3, 1])},
        ),
        (
            ValueError,
            r"query_seq_lengths must .*got .*\(1,\)",
            {"query_seq_lengths": np.array([2])},
        ),
        (ValueError, r"query_seq_lengths must .*got .*\(\)", {"query_seq_lengths": 2}),
        (
            TypeError,
            "query_seq_lengths must be integers",
            {"query_seq_lengths": np.array([2.5, 3.0])},
        ),
        (
            ValueError,
            "lengths must lie in 0 … 7 .*got 8",
            {"key_value_seq_lengths": np.array([2, 8])},
        ),
        (TypeError, "lengths must be integers", {"key_value_seq_lengths": np.array([2.0, 7.0])}),
        (ValueError, "local_window_size", {"local_window_size": (1, 2, 3)}),
        ((TypeError, ValueError), "must be an integer", {"local_window_size": 1.5}),
        (ValueError, "≥ 0", {"local_window_size": -1}),
        (TypeError, "boolean", {"mask": of(T, S)}),
        (ValueError, "mask must broadcast", {"mask": of(S, T, dtype=bool)}),
        (ValueError, "bias must broadcast", {"bias": of(S, T)}),
        (ValueError, "implementation must be .*got 'flash'", {"implementation": "flash"}),
    ],
)
def test_bad_input_of_dot_product_attention_is_named(error, match, options):
    with pytest.raises(error, match=match):
        jattn.dot_product_attention(Q, KEY, VALUE, **options)


def test_a_query_without_axes_is_named_before_its_lengths():
    with pytest.raises(ValueError, match="query must be"):
        jattn.dot_product_attention(of(N, H), KEY, VALUE, query_seq_lengths=np.array([1]))


def test_the_residual_is_that_of_jax_in_dtype_and_without_gradient(rng):
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in operands(rng, np.float32, V=H)]

    def residual(attend, query):
        with jax.numpy_dtype_promotion("standard"):
            return attend(query, *arrays[1:], return_residual=True)[1]

    ours, theirs = jattn.dot_product_attention, reference
    assert residual(ours, arrays[0]).dtype == residual(theirs, arrays[0]).dtype == jnp.bfloat16
    for attend in (ours, theirs):
        gradient = jax.grad(lambda q, f=attend: residual(f, q).astype(jnp.float32).sum())(arrays[0])
        assert (gradient == 0).all()


def test_a_bias_of_integers_is_that_of_jax(rng):
    query, key, value = operands(rng, np.float32, V=H)
    bias = rng.integers(-2, 3, (B, N, T, S))
    with jax.numpy_dtype_promotion("standard"):
        expected = reference(query, key, value, bias)
    np.testing.assert_allclose(
        jattn.dot_product_attention(query, key, value, bias), expected, rtol=1e-5, atol=1e-6
    )
