"""MultiHeadAttention against NumPy; grouped heads, dropout, one score per call, Linen, errors."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from jattn import masks, models, modifiers, nn
from jattn.nn import MultiHeadAttention
from tests import oracle

B, T, S, N, D, DQ, DK, DV = 2, 5, 7, 6, 18, 11, 13, 17
H = D // N
MASK = masks.causal(2) & masks.padding(np.array([3, 7]))


def allowed(b, h, t, s):
    return s <= t + 2 and s < (3, 7)[b]


def inputs(rng, dtype=np.float64):
    return tuple(
        rng.standard_normal(shape).astype(dtype) for shape in ((B, T, DQ), (B, S, DK), (B, S, DV))
    )


def make(K=N, **options):
    widths = {"in_kv_features": DK, "in_value_features": DV, "num_kv_heads": K, "out_features": D}
    kinds = {"param_dtype": jnp.float64, "use_bias": False, "rngs": nnx.Rngs(0)}
    return MultiHeadAttention(N, DQ, D, **{**widths, **kinds, **options})


def affine(linear, x):
    bias = 0 if linear.bias is None else np.asarray(linear.bias[...])
    return x @ np.asarray(linear.kernel[...]) + bias


def truth(module, query, key, value, K, **options):
    """Output and weights of Concat(head_n) W_o; every head has its own columns of the kernels."""
    projected = []
    for linear, x, heads in (
        (module.query, query, N),
        (module.key, key, K),
        (module.value, value, K),
    ):
        whole = affine(linear, x)
        assert whole.shape[-1] == heads * H
        projected.append(np.stack([whole[..., n * H : (n + 1) * H] for n in range(heads)], axis=2))
    output, _, weights = oracle.attend(*projected, score=oracle.scaled_dot_product, **options)
    return affine(module.out, np.concatenate([output[:, :, n] for n in range(N)], axis=-1)), weights


def randomise(module, rng):
    """Biases start at zero: give every parameter a number, so that none can be forgotten."""
    for leaf in jax.tree.leaves(
        nnx.state(module, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        leaf[...] = jnp.asarray(rng.standard_normal(leaf[...].shape), leaf[...].dtype)
    return module


@pytest.mark.parametrize("K", [6, 2, 1])
@pytest.mark.parametrize("use_bias", [False, True])
def test_multi_head_attention_is_the_loop(K, use_bias, rng, x64):
    module, arrays = make(K, use_bias=use_bias), inputs(rng)
    nnx.update(module, nnx.state(randomise(module, rng)))
    output, weights = nnx.jit(lambda m, *x: m(*x, mask=MASK, return_weights=True))(module, *arrays)
    expected, expected_weights = truth(module, *arrays, K, allowed=allowed)
    assert output.shape == (B, T, D) and weights.shape == (B, N, T, S)
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-11, atol=1e-12)
    alone = nnx.jit(lambda m, *x: m(*x, mask=MASK))(module, *arrays)
    np.testing.assert_allclose(alone, output, rtol=1e-12, atol=1e-13)


def test_lengths_per_query_and_modifiers_and_positions(rng, x64):
    module, arrays = make(2), inputs(rng)
    lengths, slopes = np.array([[0, 1, 2, 5, 7], [7, 3, 3, 0, 1]]), np.linspace(0.1, 0.6, N)
    q_pos, k_pos = np.arange(T) + 10, np.arange(S)[::-1].copy()
    call = nnx.jit(
        lambda m, *x: m(
            *x, mask=masks.padding(lengths), modifier=modifiers.alibi(slopes),
            positions=(q_pos, k_pos),
        )
    )  # fmt: skip
    expected, _ = truth(
        module, *arrays, 2,
        allowed=lambda b, h, t, s: s < lengths[b, t],
        modify=lambda x, b, h, t, s: x - slopes[h] * abs(q_pos[t] - k_pos[s]),
    )  # fmt: skip
    np.testing.assert_allclose(call(module, *arrays), expected, rtol=1e-11, atol=1e-12)


def test_defaults_of_widths_and_inputs(rng, x64):
    module = MultiHeadAttention(N, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x, other = rng.standard_normal((B, T, D)), rng.standard_normal((B, S, D))
    np.testing.assert_array_equal(module(x), module(x, x, x))
    np.testing.assert_array_equal(module(x, other), module(x, other, other))
    assert [
        linear.kernel.shape for linear in (module.query, module.key, module.value, module.out)
    ] == [(D, D)] * 4
    assert module.query.bias.shape == module.out.bias.shape == (D,)
    key_width = MultiHeadAttention(N, D, in_kv_features=DK, rngs=nnx.Rngs(0))
    assert key_width.value.kernel.shape == (DK, D)
    heads = MultiHeadAttention(N, DQ, head_features=H, rngs=nnx.Rngs(0))
    assert heads.query.kernel.shape == (DQ, D) and heads.out.kernel.shape == (D, DQ)


@pytest.mark.parametrize(("qkv", "out"), [(True, False), (False, True)])
def test_biases_of_the_heads_and_of_the_output_are_apart(qkv, out):
    module = MultiHeadAttention(N, D, use_bias=qkv, use_out_bias=out, rngs=nnx.Rngs(0))
    assert [
        linear.bias is not None for linear in (module.query, module.key, module.value, module.out)
    ] == [qkv, qkv, qkv, out]


@pytest.mark.parametrize("norm", [True, nnx.RMSNorm])
def test_heads_are_normalised_before_they_are_compared(norm, rng, x64):
    module = MultiHeadAttention(
        2, 6, normalize_qk=norm, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    randomise(module, rng)
    x = rng.standard_normal((5, 6))

    def heads(linear, norm):
        split = affine(linear, x).reshape(5, 2, 3)
        if norm is None:
            return split
        centred = split - (split.mean(-1, keepdims=True) if isinstance(norm, nnx.LayerNorm) else 0)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
        return centred / scale * np.asarray(norm.scale[...])

    query, key = heads(module.query, module.query_ln), heads(module.key, module.key_ln)
    value = heads(module.value, None)
    output, *_ = oracle.attend(query[None], key[None], value[None], score=oracle.scaled_dot_product)
    np.testing.assert_allclose(module(x), affine(module.out, output[0].reshape(5, 6)), rtol=1e-11)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_numbers_are_those_of_flax_from_the_same_parameters(use_bias, normalize_qk, rng, x64):
    shared = {
        "num_heads": N, "in_features": DQ, "qkv_features": D, "out_features": D,
        "in_kv_features": DK, "use_bias": use_bias, "normalize_qk": normalize_qk,
        "param_dtype": jnp.float64,
    }  # fmt: skip
    ours = MultiHeadAttention(**shared, rngs=nnx.Rngs(0))
    # With a dropout rate Flax keeps float64; without one jax.nn takes the softmax in float32
    flax = nnx.MultiHeadAttention(**shared, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(randomise(ours, rng), nnx.Param)):
        functools.reduce(getattr, path, flax)[...] = leaf[...].reshape(
            functools.reduce(getattr, path, flax).shape
        )
    query, key, _ = inputs(rng)
    value = rng.standard_normal(key.shape)
    mask = rng.random((B, 1, T, S)) < 0.7
    mask[..., 0] = True  # Flax fills a row with no key with a mean
    with jax.numpy_dtype_promotion("standard"):
        expected = flax(query, key, value, mask=mask, deterministic=True)
    np.testing.assert_allclose(ours(query, key, value, mask=mask), expected, rtol=1e-10, atol=1e-11)


def test_metadata_of_kernels_and_biases_place_them_on_a_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        module = MultiHeadAttention(
            N, D, rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": (None, "model")},
            bias_metadata={"out_sharding": ("model",), "note": "b"},
            out_kernel_metadata={"out_sharding": ("model", None)},
        )  # fmt: skip
        for name in ("query", "key", "value"):
            linear = getattr(module, name)
            assert jax.typeof(linear.kernel[...]).sharding.spec == P(None, "model")
            assert jax.typeof(linear.bias[...]).sharding.spec == P("model")
        assert jax.typeof(module.out.kernel[...]).sharding.spec == P("model", None)
    assert module.query.bias.get_metadata()["note"] == "b"


def test_grouped_heads_reduce_to_repeated_projections(rng, x64):
    """A grouped module is a full one whose key and value kernels repeat, head by head."""
    grouped, full, arrays = make(2), make(6), inputs(rng)
    full.query.kernel[...], full.out.kernel[...] = (
        grouped.query.kernel[...],
        grouped.out.kernel[...],
    )
    for name in ("key", "value"):
        kernel = getattr(grouped, name).kernel[...].reshape(-1, 2, H)
        getattr(full, name).kernel[...] = jnp.repeat(kernel, 3, axis=1).reshape(-1, D)
    np.testing.assert_allclose(grouped(*arrays), full(*arrays), rtol=1e-12)


def test_vmap_and_no_batch_agree_with_the_batch(rng, x64):
    module, arrays = make(2), inputs(rng)
    graphdef, state = nnx.split(module)
    one = jax.jit(lambda *x: nnx.merge(graphdef, state)(*x))
    whole = one(*arrays)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(*arrays), whole, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        one(*(array[1] for array in arrays)), whole[1], rtol=1e-12, atol=1e-14
    )


def test_gradients_reach_every_parameter(rng, x64):
    module, arrays = randomise(make(2, use_bias=True), rng), inputs(rng)
    cotangent = rng.standard_normal((B, T, D))
    gradient = nnx.jit(nnx.grad(lambda m: (m(*arrays, mask=MASK) * cotangent).sum()))(module)
    for name in ("query", "key", "value", "out"):
        for leaf in ("kernel", "bias"):
            parameter = getattr(getattr(module, name), leaf)
            index, kept, ends = (1,) * parameter[...].ndim, parameter[...], []
            for side in (1e-6, -1e-6):
                parameter[...] = kept.at[index].add(side)
                ends.append((truth(module, *arrays, 2, allowed=allowed)[0] * cotangent).sum())
            parameter[...] = kept
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(
                gradient[name][leaf][...][index], slope, rtol=1e-6, atol=1e-7
            )


def test_weights_are_computed_once():
    """Returning the weights adds no matrix product and no exponential to the program."""

    def operations(return_weights):
        graphdef, state = nnx.split(make(param_dtype=jnp.float32))

        def call(state, *x):
            return nnx.merge(graphdef, state)(*x, mask=MASK, return_weights=return_weights)

        def count(jaxpr):
            counter = collections.Counter()
            for equation in jaxpr.eqns:
                counter[equation.primitive.name] += 1
                for inner in jax.tree.leaves(
                    list(equation.params.values()),
                    is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
                ):
                    if isinstance(inner, jax.extend.core.ClosedJaxpr):
                        counter += count(inner.jaxpr)
            return counter

        x = (jnp.zeros((B, T, DQ)), jnp.zeros((B, S, DK)), jnp.zeros((B, S, DV)))
        return count(jax.make_jaxpr(call)(state, *x).jaxpr)

    with_weights, without = operations(True), operations(False)
    assert with_weights["dot_general"] == without["dot_general"] == 6
    assert with_weights["exp"] == without["exp"] == 1


def test_dropout_follows_train_and_eval_and_the_argument(rng):
    module, arrays = make(2, dropout_rate=0.5, param_dtype=jnp.float32), inputs(rng, np.float32)
    call = nnx.jit(lambda m, *x: m(*x))
    clean = nnx.jit(lambda m, *x: m(*x, deterministic=True))(module, *arrays)
    first, second = call(module, *arrays), call(module, *arrays)
    assert not np.allclose(first, second) and not np.allclose(first, clean)
    module.eval()
    np.testing.assert_allclose(call(module, *arrays), clean, rtol=1e-6)
    assert not np.allclose(
        nnx.jit(lambda m, *x: m(*x, deterministic=False))(module, *arrays), clean
    )
    module.train()
    assert not np.allclose(call(module, *arrays), clean)


def test_parameters_and_outputs_have_the_dtype_asked_for(rng):
    module = make(2, use_bias=True, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in inputs(rng)]
    assert nnx.eval_shape(lambda m, *x: m(*x), module, *arrays).dtype == jnp.bfloat16


def test_a_module_of_ours_inside_a_linen_model(rng):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            attention = nnx.bridge.to_linen(
                MultiHeadAttention, N, DQ, D, use_bias=False, name="attention"
            )
            return linen.Dense(1)(attention(x))

    x = rng.standard_normal((B, T, DQ)).astype(np.float32)
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    kernels = variables["params"]["attention"]
    assert {name: kernels[name]["kernel"].shape for name in kernels} == {
        "query": (DQ, D), "key": (DQ, D), "value": (DQ, D), "out": (D, DQ),
    }  # fmt: skip
    ours = MultiHeadAttention(N, DQ, D, use_bias=False, rngs=nnx.Rngs(0))
    for name in kernels:
        getattr(ours, name).kernel[...] = kernels[name]["kernel"]
    dense = variables["params"]["Dense_0"]
    expected = ours(x) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(
        jax.grad(lambda params: jnp.sin(model.apply({**variables, "params": params}, x)).sum())
    )
    for leaf in jax.tree.leaves(gradient(variables["params"])["attention"]):
        assert jnp.isfinite(leaf).all() and (leaf != 0).any()


def of(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


X, Y, Z = of(B, T, DQ), of(B, S, DK), of(B, S, DV)


@pytest.mark.parametrize(
    ("match", "arguments", "options"),
    [
        (r"in_features \(19\) must be a multiple of num_heads \(6\)", (6, 19), {}),
        (
            r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)",
            (6, 18),
            {"num_kv_heads": 4},
        ),
        (r"num_kv_heads must be an integer of at least 1, got 0", (6, 18), {"num_kv_heads": 0}),
        (r"num_heads must be an integer of at least 1, got 0", (0, 18), {}),
        (r"num_heads \(2\) must be .* num_kv_heads \(4\)", (2, 8), {"num_kv_heads": 4}),
        (r"features must be an integer of at least 1, got 0", (2, 0), {}),
        ("dropout_rate must lie in 0 … 1, got 2", (6, 18), {"dropout_rate": 2}),
        ("give one of them", (6, 18, 18), {"head_features": 3}),
    ],
)
def test_bad_sizes_are_named(match, arguments, options):
    with pytest.raises(ValueError, match=match):
        MultiHeadAttention(*arguments, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("error", "match", "arrays", "options"),
    [
        (ValueError, r"query must be \[..., length, 11\], got shape \(2, 7, 13\)", (Y, Y, Z), {}),
        (ValueError, r"key must be \[..., length, 13\], got shape \(2, 5, 11\)", (X,), {}),
        (ValueError, r"value must be \[..., length, 17\], got shape \(2, 7, 13\)", (X, Y), {}),
        (ValueError, r"query must be .*got shape \(11,\)", (of(DQ), Y, Z), {}),
        (ValueError, "value without key", (X, None, Z), {}),
        (ValueError, "value must be .*S = 7", (X, Y, of(B, T, DV)), {}),
        (ValueError, "key must be", (X, of(3, S, DK), of(3, S, DV)), {}),
        (TypeError, "query must be floating point", (X.astype(np.int32), Y, Z), {}),
        (ValueError, "mask must broadcast", (X, Y, Z), {"mask": of(S, T, dtype=bool)}),
        (TypeError, "boolean", (X, Y, Z), {"mask": of(T, S)}),
        (ValueError, "alibi slopes", (X, Y, Z), {"modifier": modifiers.alibi(of(2))}),
        (
            ValueError,
            "query positions must have shape",
            (X, Y, Z),
            {"positions": (np.arange(S), np.arange(S))},
        ),
    ],
)
def test_bad_input_is_named(error, match, arrays, options):
    with pytest.raises(error, match=match):
        make(2, param_dtype=jnp.float32)(*arrays, **options)


@pytest.mark.parametrize("use_bias", [True, False])
def test_equal_heads_pool_to_the_same_attention(use_bias, x64, rng):
    """With three equal heads a group, also in numbers that three does not divide."""
    grouped = nn.MultiHeadAttention(
        6,
        12,
        num_kv_heads=2,
        use_bias=use_bias,
        normalize_qk=True,
        bias_init=nnx.nn.initializers.normal(1.0),
        param_dtype=float,
        rngs=nnx.Rngs(0),
    )
    whole = nn.MultiHeadAttention(
        6, 12, use_bias=use_bias, normalize_qk=True, param_dtype=float, rngs=nnx.Rngs(0)
    )
    nnx.update(whole, {name: nnx.state(getattr(grouped, name)) for name in ("query", "out")})
    for name in ("key", "value"):
        for part in ("kernel", "bias") if use_bias else ("kernel",):
            parameter = getattr(getattr(grouped, name), part)[...]
            heads = parameter.reshape(*parameter.shape[:-1], 2, 1, 2)
            repeated = np.repeat(heads, 3, axis=-2).reshape(*parameter.shape[:-1], 12)
            getattr(getattr(whole, name), part)[...] = repeated
    pooled, x = nn.to_grouped_query(whole, 2), rng.normal(size=(3, 5, 12))
    for name in ("key", "value"):
        chex.assert_trees_all_equal(*(nnx.state(getattr(m, name)) for m in (pooled, grouped)))
    np.testing.assert_allclose(pooled(x), whole(x), rtol=1e-12, atol=1e-12)
    assert whole.num_kv_heads == 6 and whole.key.kernel.shape == (12, 12)


def test_a_model_is_converted_whole_and_in_steps(rng):
    config = models.causal_lm.Config(11, 12, 2, 6, mlp_features=16, qkv_bias=True)
    model = models.CausalLM(config, rngs=nnx.Rngs(0))
    pooled = nn.to_grouped_query(model, 1)
    assert pooled.config.num_kv_heads == 1 and model.config.num_kv_heads is None
    built = models.CausalLM(pooled.config, rngs=nnx.Rngs(0))
    assert jax.tree.map(np.shape, nnx.state(pooled)) == jax.tree.map(np.shape, nnx.state(built))
    again = nn.to_grouped_query(nn.to_grouped_query(model, 3), 1)
    chex.assert_trees_all_close(nnx.state(again), nnx.state(pooled), rtol=1e-6, atol=1e-7)
    kernel = np.asarray(model.layers[0].attention.value.kernel[...]).reshape(12, 6, 2)
    found = pooled.layers[0].attention.value.kernel[...]
    np.testing.assert_allclose(found, kernel.mean(1), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"key/value heads \(6\) must be a multiple of .*\(4\)"):
        nn.to_grouped_query(model, 4)
    with pytest.raises(ValueError, match="a Linear holds no MultiHeadAttention"):
        nn.to_grouped_query(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 1)
