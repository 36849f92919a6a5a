"""attend inside Flax's own attention modules gives Flax's own numbers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype

import jattn
from jattn import masks, modifiers
from jattn.nn import attention_fn

B, T, S, N, D = 2, 5, 7, 3, 12
MASK = np.random.default_rng(1).random((B, 1, T, S)) < 0.7
MASK[..., 0] = True  # no empty rows: Flax fills those with a mean


@pytest.fixture
def x(rng):
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, D), (B, S, D)))


def twins(**options):
    shared = {"num_heads": N, "in_features": D, "decode": False, **options}
    flax = nnx.MultiHeadAttention(**shared, rngs=nnx.Rngs(0))
    ours = nnx.MultiHeadAttention(**shared, attention_fn=attention_fn(), rngs=nnx.Rngs(0))
    return flax, ours


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": MASK}, {"mask": MASK.astype(np.float32)}],
    ids=["plain", "bool", "float"],
)
def test_nnx_numbers_and_gradients(options, x):
    def run(module):
        def loss(module, *x):
            output = module(*x, **options)
            return jnp.sin(output).sum(), output

        return nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(module, *x)

    flax, ours = (run(module) for module in twins(use_bias=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), ours, flax)


def test_nnx_sows_the_same_weights(x):
    sown = []
    for module in twins():
        capture = nnx.capture(
            lambda module: module(*x, mask=MASK, sow_weights=True), nnx.Intermediate
        )
        _, intermediates = nnx.jit(capture)(module)
        sown.append(intermediates["attention_weights"][0])
    assert sown[1].shape == (B, N, T, S)
    np.testing.assert_allclose(sown[1], sown[0], rtol=1e-5, atol=1e-6)


def test_nnx_decodes_with_its_cache_as_flax_does(rng):
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    outputs = []
    for module in twins(decode=True):
        module.init_cache(x.shape)
        outputs.append(np.concatenate([module(x[:, t : t + 1]) for t in range(T)], axis=1))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sow_weights", [False, True])
def test_linen_numbers_weights_and_gradients(sow_weights, x):
    flax = linen.MultiHeadDotProductAttention(num_heads=N)
    ours = linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=attention_fn())
    variables = jax.jit(flax.init)(jax.random.key(0), *x)

    def run(module):
        def loss(variables, *x):
            output, sown = module.apply(
                variables,
                *x,
                mask=MASK,
                sow_weights=sow_weights,
                mutable=["intermediates"],
                deterministic=True,
            )
            return jnp.sin(output).sum(), (output, sown)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(variables, *x)

    came, expected = run(ours), run(flax)
    assert bool(came[0][1][1]) == sow_weights
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), came, expected
    )


def test_bias_and_is_causal_as_flax_has_them(rng):
    query, key, value = (rng.standard_normal((B, T, N, 4)).astype(np.float32) for _ in range(3))
    bias = rng.standard_normal((B, N, T, T)).astype(np.float32)
    for options in ({"bias": bias}, {"is_causal": True}, {"bias": bias, "mask": MASK[..., :T]}):
        expected = nnx.dot_product_attention(query, key, value, **options)
        np.testing.assert_allclose(
            attention_fn()(query, key, value, **options), expected, rtol=1e-5, atol=1e-6
        )


def test_its_own_mask_and_modifier_join_those_of_flax(rng):
    query, key, value = (rng.standard_normal((B, T, N, 4)).astype(np.float32) for _ in range(3))
    bias = rng.standard_normal((B, N, T, T)).astype(np.float32)
    adapted = attention_fn(mask=masks.causal(1), modifier=modifiers.soft_cap(2.0))
    came = adapted(query, key, value, bias, MASK[..., :T])
    expected = jattn.attend(
        query, key, value, mask=masks.causal(1) & masks.from_array(MASK[..., :T]),
        modifier=(modifiers.soft_cap(2.0), modifiers.bias(bias)),
    )  # fmt: skip
    np.testing.assert_array_equal(came, expected)


def test_dtype_of_flax_is_the_dtype_of_compute(x):
    module = nnx.MultiHeadAttention(
        N, D, dtype=jnp.bfloat16, attention_fn=attention_fn(), decode=False, rngs=nnx.Rngs(0)
    )
    assert module(x[0]).dtype == jnp.bfloat16


def test_dropout_of_single_weights(x):
    module = nnx.MultiHeadAttention(
        N,
        D,
        dropout_rate=0.5,
        broadcast_dropout=False,
        attention_fn=attention_fn(),
        decode=False,
        rngs=nnx.Rngs(0),
    )
    first, second = (module(*x, deterministic=False) for _ in range(2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(module(*x, deterministic=True), module(*x, deterministic=True))


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("options", [{}, {"mask": MASK}], ids=["plain", "mask"])
def test_broadcast_dropout_drops_what_flax_drops(options, implementation, x):
    shared = {"num_heads": N, "in_features": D, "dropout_rate": 0.4, "decode": False}
    adapted = attention_fn(implementation=implementation)
    flax, ours = (
        nnx.MultiHeadAttention(**shared, **own, rngs=nnx.Rngs(0))
        for own in ({}, {"attention_fn": adapted})
    )

    def run(module):
        def loss(module, *x):
            output = module(*x, **options, deterministic=False, rngs=nnx.Rngs(3))
            return jnp.sin(output).sum(), output

        return nnx.jit(nnx.value_and_grad(loss, argnums=(1, 2), has_aux=True))(module, *x)

    came, expected, plain = run(ours), run(flax), flax(*x, **options, deterministic=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=4e-6), came, expected
    )
    assert not np.allclose(came[0][1], plain)


def test_broadcast_dropout_of_rows_that_see_or_keep_nothing(rng):
    query = jnp.asarray(rng.standard_normal((B, 3, N, 4)), jnp.float32)
    allowed = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1]], bool)

    def output(query, rate):
        return attention_fn()(
            query, query, query.at[:, 2].set(jnp.inf), mask=allowed[:2].repeat([1, 2], 0)[None],
            dropout_rate=rate, dropout_rng=jax.random.key(0),
        )  # fmt: skip

    for rate in (0.5, 1.0):
        came, gradient = output(query, rate), jax.grad(lambda q, r=rate: output(q, r).sum())(query)
        assert np.isfinite(came).all() and np.isfinite(gradient).all()
        assert not came[:, 1:].any()
    assert not came.any()
    with pytest.raises(ValueError, match="needs a dropout_rng, got None"):
        attention_fn()(query, query, query, dropout_rate=0.5)


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGH, ("default", "high")])
def test_precision_is_that_of_every_product(precision, x):
    expected = jax.lax.Precision("highest" if precision == "highest" else "high")
    query = jnp.zeros((B, T, N, 4))
    adapted = jax.jit(functools.partial(attention_fn(), precision=precision))
    text = adapted.lower(query, query, query).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all(expected.name in line for line in products)
    shared = {"num_heads": N, "in_features": D, "precision": precision, "decode": False}
    module = nnx.MultiHeadAttention(**shared, attention_fn=attention_fn(), rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(**shared, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(*x), flax(*x), rtol=1e-5, atol=1e-6)


def test_promote_dtype_of_flax_and_of_the_user(rng):
    query, key, value = (rng.standard_normal((B, T, N, 4)).astype(np.float32) for _ in range(3))
    for options in (
        {"promote_dtype": promote_dtype},
        {"promote_dtype": promote_dtype, "dtype": jnp.bfloat16},
        {"promote_dtype": lambda arrays, dtype: [2 * jnp.asarray(a, dtype) for a in arrays]},
    ):
        with jax.numpy_dtype_promotion("standard"):
            expected = nnx.dot_product_attention(query, key, value, **options)
        came = attention_fn()(query, key, value, **options)
        assert came.dtype == expected.dtype
        tolerance = 1e-5 if came.dtype == np.float32 else 2e-2
        np.testing.assert_allclose(
            *(np.asarray(each, np.float32) for each in (came, expected)),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("einsum_dot_general", {"einsum_dot_general": jax.lax.dot_general}),
        ("qk_attn_weights_einsum", {"qk_attn_weights_einsum": jnp.einsum}),
        ("attn_weights_value_einsum", {"attn_weights_value_einsum": jnp.einsum}),
    ],
)
def test_what_it_cannot_honour_is_an_error(match, options):
    query = jnp.zeros((B, T, N, 4))
    with pytest.raises(NotImplementedError, match=match):
        attention_fn()(query, query, query, **options)


def test_weights_sown_without_a_capture_lie_where_flax_puts_them(x):
    """Flax itself warns in versions that prefer `nnx.capture`: no more and no less."""
    said = []
    for module in twins():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(*x, mask=MASK, sow_weights=True)
        said.append(([each.category for each in caught], module.attention_weights.get_value()))
    (ours, (weights,)), (flax, (expected,)) = said[::-1]
    assert ours == flax
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)


def test_linen_passes_on_what_it_cannot_honour(x):
    """Linen drops the arguments that a signature does not name, so they have to be named."""
    module = linen.MultiHeadDotProductAttention(
        num_heads=N, attention_fn=attention_fn(), qk_attn_weights_einsum_cls=lambda: jnp.einsum
    )
    with pytest.raises(NotImplementedError, match="einsum"):
        module.init(jax.random.key(0), *x)
