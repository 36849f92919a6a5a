"""The Transformer's layers and stacks; their numbers are held in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks, modifiers, nn
from jattn.functional import compat

B, T, S, D, N, MLP = 2, 5, 7, 12, 3, 16
LENGTHS = np.array([3, 7])


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(D, N, MLP, rngs=nnx.Rngs(0), **options)


def decoder_layer(**options):
    return nn.TransformerDecoderLayer(D, N, MLP, rngs=nnx.Rngs(0), **options)


def whole(**options):
    return nn.Transformer(D, N, 2, 2, MLP, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


@pytest.fixture
def memory(rng):
    return jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)


def draws(function, *arrays):
    """How many times random numbers are drawn."""
    equations = compat.equations(jax.make_jaxpr(function)(*arrays).jaxpr)
    return sum(equation.primitive.name == "random_bits" for equation in equations)


def test_an_encoder_layer_drops_at_four_places_and_a_decoder_layer_at_six(x, memory):
    encoder, decoder = encoder_layer(), decoder_layer()
    assert draws(lambda x: nnx.clone(encoder)(x), x) == 4
    assert draws(lambda *arrays: nnx.clone(decoder)(*arrays), x, memory) == 6
    assert draws(lambda x: nnx.clone(encoder)(x, deterministic=True), x) == 0


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_is_its_equation(x, norm_first):
    layer = encoder_layer(norm_first=norm_first, dropout_rate=0.0)
    attention, mlp = layer.self_attention, layer.mlp

    def inner(x):
        return mlp.linear2(jnp.maximum(mlp.linear1(x), 0))

    if norm_first:
        y = x + attention(layer.norm1(x))
        expected = y + inner(layer.norm2(y))
    else:
        y = layer.norm1(x + attention(x))
        expected = layer.norm2(y + inner(y))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_layers_begin_with_different_weights():
    first, second = whole().encoder.layers
    difference = first.mlp.linear1.kernel[...] - second.mlp.linear1.kernel[...]
    assert np.abs(difference).max() > 0.01


def test_every_matrix_begins_with_xaviers_bound_and_every_bias_with_zero():
    for path, parameter in nnx.to_flat_state(nnx.state(whole(), nnx.Param)):
        largest = np.abs(parameter[...]).max()
        if path[-1] == "kernel":
            assert 0.9 < largest / (6 / sum(parameter.shape)) ** 0.5 <= 1
        else:
            assert largest == (path[-1] == "scale")


def test_a_whole_ends_in_norms_and_a_bare_stack_in_none():
    model = whole()
    assert isinstance(model.encoder.norm, nnx.LayerNorm)
    assert isinstance(model.decoder.norm, nnx.LayerNorm)
    assert nn.TransformerEncoder([encoder_layer()]).norm is None


def test_no_biases_anywhere():
    state = nnx.to_flat_state(nnx.state(whole(use_bias=False), nnx.Param))
    assert not [path for path, _ in state if path[-1] == "bias"]


def test_a_decoder_sees_later_tokens_unless_a_mask_hides_them(x, memory):
    layer = decoder_layer(dropout_rate=0.0)
    changed = x.at[:, -1].set(9.0)
    for mask, same in ((None, False), (masks.causal(), True)):
        before, after = (layer(each, memory, mask=mask)[:, :-1] for each in (x, changed))
        assert np.allclose(before, after) == same


def test_what_stands_in_the_padding_reaches_no_real_step(x, memory):
    model = whole(dropout_rate=0.0)
    padding = masks.padding(LENGTHS)
    options = {"source_mask": padding, "memory_mask": padding, "target_mask": masks.causal()}
    dirty = jnp.where(np.arange(S)[:, None] < LENGTHS[:, None, None], memory, 100.0)
    np.testing.assert_allclose(
        model(dirty, x, **options), model(memory, x, **options), rtol=1e-5, atol=1e-6
    )


def test_heads_of_the_memory_stand_for_it(x, memory):
    decoder = whole(dropout_rate=0.0).decoder
    expected, weights = decoder(x, memory, return_weights=True)
    found, same = decoder(x, decoder.remember(memory), return_weights=True)
    np.testing.assert_array_equal(found, expected)
    assert len(weights) == 2 and weights[0].shape == (B, N, T, S)
    np.testing.assert_array_equal(same[1], weights[1])
    np.testing.assert_array_equal(decoder(x, [*decoder.remember(memory)]), expected)


@pytest.mark.parametrize("norm_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_decoder_with_caches_is_the_whole(x, memory, norm_first):
    decoder = whole(dropout_rate=0.0, norm_first=norm_first).decoder
    expected = decoder(x, memory, mask=masks.causal(), memory_mask=masks.padding(LENGTHS))
    caches, outputs = decoder.empty_cache(B, T), []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        output, caches = decoder(
            x[:, start:stop],
            decoder.remember(memory),
            mask=masks.causal(),
            memory_mask=masks.padding(LENGTHS),
            cache=caches,
        )
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-5, atol=1e-5)


MEMORY = {
    "causal": {"memory_mask": masks.causal()},
    "window": {"memory_mask": masks.sliding_window(1, 1)},
    "distance": {"memory_modifier": modifiers.alibi(np.float32([0.5, 0.25, 0.125]))},
}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
def test_masks_and_modifiers_of_the_memory_see_true_positions(x, memory, options):
    layer = decoder_layer(dropout_rate=0.0)
    expected = layer(x, memory, mask=masks.causal(), **options)
    cache, outputs = layer.empty_cache(B, T), []
    for t in range(T):
        output, cache = layer(x[:, t : t + 1], memory, mask=masks.causal(), cache=cache, **options)
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_a_causal_mask_and_caches_is_a_decoder_of_its_own(x):
    encoder = whole(dropout_rate=0.0).encoder
    expected = encoder(x, mask=masks.causal())
    caches, outputs = encoder.empty_cache(B, T), []
    for t in range(T):
        output, caches = encoder(x[:, t : t + 1], mask=masks.causal(), cache=caches)
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-5, atol=1e-5)


def test_an_activation_is_a_name_or_a_function(x):
    by_name, by_function = (
        encoder_layer(activation=activation, dropout_rate=0.0)
        for activation in ("gelu", lambda x: jax.nn.gelu(x, approximate=False))
    )
    np.testing.assert_array_equal(by_name(x), by_function(x))
    approximate = encoder_layer(activation=jax.nn.gelu, dropout_rate=0.0)
    assert np.abs(approximate(x) - by_name(x)).max() > 1e-6
    with pytest.raises(
        ValueError, match="activation must be 'relu', 'gelu' or a function, got 'se"
    ):
        encoder_layer(activation="selu")


def test_any_module_may_stand_in_a_stack(x):
    class Scale(nnx.Module):
        def __call__(self, x, **options):
            return 2 * x

    np.testing.assert_array_equal(nn.TransformerEncoder([Scale(), Scale()])(x), 4 * x)


def test_half_precision_in_and_single_parameters_compute_in_single(x):
    layer = encoder_layer(dropout_rate=0.0)
    with jax.numpy_dtype_promotion("standard"):
        assert layer(x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert encoder_layer(dtype=jnp.bfloat16, dropout_rate=0.0)(x).dtype == jnp.bfloat16


WRONG = {
    "width": (ValueError, r"x must be \[..., length, 12\], got shape \(2, 5, 11\)", "x"),
    "memory's width": (ValueError, r"memory must be \[..., length, 12\]", "memory"),
    "integers": (TypeError, "x must be floating point", "integers"),
    "a float mask": (TypeError, "interop.torch_masks for a mask of PyTorch's", "mask"),
}


@pytest.mark.parametrize(("error", "match", "wrong"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(x, memory, error, match, wrong):
    mask = None
    if wrong == "x":
        x = x[..., :-1]
    if wrong == "memory":
        memory = memory[..., :-1]
    if wrong == "integers":
        x = x.astype(int)
    if wrong == "mask":
        mask = jnp.triu(jnp.full((T, T), -jnp.inf), 1)
    with pytest.raises(error, match=match):
        decoder_layer()(x, memory, mask=mask)


def test_sizes_that_do_not_fit_are_named(x, memory):
    with pytest.raises(
        ValueError, match=r"in_features \(12\) must be a multiple of num_heads \(5\)"
    ):
        nn.TransformerEncoderLayer(12, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_encoder_layers must be"):
        nn.Transformer(12, 3, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        nn.TransformerEncoder([])
    decoder = whole().decoder
    with pytest.raises(ValueError, match="cache must have an entry for each layer, 2, got 1"):
        decoder(x, memory, cache=decoder.empty_cache(B, T)[:1])
    with pytest.raises(ValueError, match=r"cache must have an entry .* got the cache of one layer"):
        decoder(x, memory, cache=decoder.empty_cache(B, T)[0])
    with pytest.raises(ValueError, match="memory must have an entry for each layer, 2, got 1"):
        decoder(x, decoder.remember(memory)[:1])
    with pytest.raises(TypeError, match="layers must be a list of layers, got TransformerEncoder"):
        nn.TransformerEncoder(encoder_layer())
    with pytest.raises(ValueError, match="epsilon must be positive, got -1"):
        encoder_layer(epsilon=-1)
    with pytest.raises(TypeError, match="activation must be a name or a function, got None"):
        encoder_layer(activation=None)
