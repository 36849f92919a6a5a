"""One head, shared projections and the residual, against NumPy loops with their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks
from jattn.nn import MultiHeadAttention, ResidualAttention, SelfAttention, SharedProjectionAttention
from tests import oracle
from tests.nn.test_multi_head import affine, randomise

B, T, D, F, N = 2, 5, 21, 11, 3
H = D // N
MASK = masks.causal() & masks.padding(np.array([3, 5]))


def allowed(b, h, t, s):
    return s <= t and s < (3, 5)[b]


def make(name, param_dtype=jnp.float64, **options):
    options |= {"param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    widths = {"same": D, "widths": F, "norm": F}
    if name in widths:
        attention = SelfAttention(D, widths[name], **options)
        return ResidualAttention(
            attention, D, widths[name], use_layer_norm=name == "norm", **options
        )
    return {
        "single": lambda: SelfAttention(D, F, **options),
        "shared": lambda: SharedProjectionAttention(N, D, **options),
        "scaled": lambda: SharedProjectionAttention(N, D, scale=D**-0.5, **options),
    }[name]()


def truth(module, x):
    """Output and weights, head by head and row by row."""
    if isinstance(module, ResidualAttention):
        pooled, weights = truth(module.attention, x)
        z = (x if module.skip is None else affine(module.skip, x)) + pooled
        if module.norm is not None:
            mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
            scale, bias = np.asarray(module.norm.scale[...]), np.asarray(module.norm.bias[...])
            z = (z - mean) / np.sqrt(variance + 1e-5) * scale + bias
        return z, weights
    linears = (module.query, module.key, module.value)
    if isinstance(module, SelfAttention):
        heads = (affine(linear, x)[:, :, None] for linear in linears)
        output, _, weights = oracle.attend(*heads, score=oracle.scaled_dot_product, allowed=allowed)
        return output[:, :, 0], weights[:, 0]
    slices = [x[..., n * H : (n + 1) * H] for n in range(N)]
    heads = (np.stack([affine(linear, part) for part in slices], axis=2) for linear in linears)
    scale = H**-0.5 if module.scale is None else module.scale
    output, _, weights = oracle.attend(
        *heads, score=lambda q, k, h: float(q @ k) * scale, allowed=allowed
    )
    return affine(module.out, np.concatenate([output[:, :, n] for n in range(N)], axis=-1)), weights


@pytest.mark.parametrize("name", ["single", "shared", "scaled", "same", "widths", "norm"])
def test_attention_is_the_loop(name, rng, x64):
    module, x = randomise(make(name), rng), rng.standard_normal((B, T, D))
    expected, expected_weights = truth(module, x)
    call = nnx.jit(lambda m, x: (m(x, mask=MASK), m(x, mask=MASK, return_weights=True)))
    alone, (output, weights) = call(module, x)
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(alone, output, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["shared", "norm"])
def test_gradients_of_every_parameter_are_slopes_of_the_loop(name, rng, x64):
    module, x = randomise(make(name), rng), rng.standard_normal((B, T, D))
    cotangent = rng.standard_normal((B, T, truth(module, x)[0].shape[-1]))
    gradient = nnx.jit(nnx.grad(lambda m: (m(x, mask=MASK) * cotangent).sum()))(module)
    parameters = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    for path, slope in nnx.to_flat_state(gradient):
        index, kept, ends = (1,) * slope[...].ndim, parameters[path][...], []
        for side in (1e-6, -1e-6):
            parameters[path][...] = kept.at[index].add(side)
            nnx.update(module, nnx.from_flat_state(parameters.items()))
            ends.append((truth(module, x)[0] * cotangent).sum())
        parameters[path][...] = kept
        np.testing.assert_allclose(
            slope[...][index], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", ["single", "shared", "norm"])
def test_vmap_and_no_batch_agree_with_the_batch(name, rng, x64):
    graphdef, state = nnx.split(make(name))
    one, x = jax.jit(lambda x: nnx.merge(graphdef, state)(x)), rng.standard_normal((B, T, D))
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x), one(x), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(one(x[1]), one(x)[1], rtol=1e-12, atol=1e-14)


def test_shared_projections_are_equal_blocks_on_the_diagonal(rng, x64):
    shared = randomise(make("shared"), rng)
    full = MultiHeadAttention(N, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value"):
        getattr(full, name).kernel[...] = jnp.kron(jnp.eye(N), getattr(shared, name).kernel[...])
        getattr(full, name).bias[...] = jnp.zeros(D)
    full.out.kernel[...], full.out.bias[...] = shared.out.kernel[...], shared.out.bias[...]
    x = rng.standard_normal((B, T, D))
    np.testing.assert_allclose(shared(x), full(x), rtol=1e-12, atol=1e-13)


def test_identity_kernels_are_the_code_that_never_calls_its_projections(rng, x64):
    module, x = randomise(make("scaled"), rng), rng.standard_normal((B, T, D))
    for linear in (module.query, module.key, module.value):
        linear.kernel[...] = jnp.eye(H)
    heads = x.reshape(B, T, N, H)
    output, *_ = oracle.attend(heads, heads, heads, score=lambda q, k, h: float(q @ k) / np.sqrt(D))
    np.testing.assert_allclose(
        module(x), affine(module.out, output.reshape(B, T, D)), rtol=1e-11, atol=1e-12
    )


def test_a_residual_around_heads_hands_on_what_the_attention_takes(rng):
    heads = MultiHeadAttention(N, D, out_features=F, dropout_rate=0.5, rngs=nnx.Rngs(0))
    residual, x = (
        ResidualAttention(heads, D, F, rngs=nnx.Rngs(1)),
        rng.standard_normal((B, T, D)).astype(np.float32),
    )
    output, weights = residual(x, mask=MASK, deterministic=True, return_weights=True)
    expected, expected_weights = heads(x, mask=MASK, deterministic=True, return_weights=True)
    np.testing.assert_array_equal(output, residual.skip(x) + expected)
    np.testing.assert_array_equal(weights, expected_weights)
    assert not np.allclose(residual(x, mask=MASK), output)
    residual.eval()
    np.testing.assert_array_equal(residual(x, mask=MASK), output)


def test_a_layer_norm_far_from_zero_keeps_its_digits():
    """Flax's own variance, E[x²] − E[x]², would be lost in rounding."""
    module = make("norm", jnp.float32)
    for leaf in jax.tree.leaves(
        nnx.state(module.attention), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        leaf[...] = jnp.zeros_like(leaf[...])
    module.skip.kernel[...] = jnp.eye(D, F)
    steps = np.arange(D, dtype=np.float32)
    z = steps[:F]
    expected = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
    np.testing.assert_allclose(module(4096 + steps[None])[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["single", "shared", "norm"])
def test_parameters_and_outputs_have_the_dtype_asked_for(name):
    module = make(name, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert (
        nnx.eval_shape(lambda m, x: m(x), module, jnp.ones((B, T, D), jnp.bfloat16)).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("name", ["single", "shared", "norm"])
@pytest.mark.parametrize(
    ("error", "match", "x", "options"),
    [
        (
            ValueError,
            r"x must be \[..., length, 21\], got shape \(2, 5, 11\)",
            np.ones((B, T, F)),
            {},
        ),
        (ValueError, r"x must be .*got shape \(21,\)", np.ones(D), {}),
        (TypeError, "x must be floating point", np.ones((B, T, D), int), {}),
        (ValueError, "mask must broadcast", np.ones((B, T, D)), {"mask": np.ones((T, D), bool)}),
    ],
)
def test_bad_input_is_named(name, error, match, x, options, x64):
    with pytest.raises(error, match=match):
        make(name)(x, **options)


@pytest.mark.parametrize(
    ("match", "build"),
    [
        ("in_features must be", lambda rngs: SelfAttention(0, F, rngs=rngs)),
        ("^features must be", lambda rngs: SelfAttention(D, -1, rngs=rngs)),
        ("num_heads must be", lambda rngs: SharedProjectionAttention(0, D, rngs=rngs)),
        (
            r"features \(20\) must be .* num_heads \(3\)",
            lambda rngs: SharedProjectionAttention(N, 20, rngs=rngs),
        ),
        ("in_features must be", lambda rngs: ResidualAttention(None, 0, rngs=rngs)),
        ("out_features must be", lambda rngs: ResidualAttention(None, D, 0, rngs=rngs)),
        ("out_features must be", lambda rngs: MultiHeadAttention(N, D, out_features=0, rngs=rngs)),
    ],
)
def test_bad_sizes_are_named(match, build):
    with pytest.raises(ValueError, match=match):
        build(nnx.Rngs(0))


def test_an_attention_of_another_width_is_named():
    residual = ResidualAttention(SelfAttention(D, 1, rngs=nnx.Rngs(0)), D, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"attention must return .* = \(2, 5, 21\), got \(2, 5, 1\)"
    ):
        residual(np.ones((B, T, D), np.float32))
