"""A language model sees no later token, and a cache changes no number."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks, models, nn, ropes
from jattn.models import causal_lm
from jattn.models.causal_lm import Config

B, T, C = 3, 12, 11
SMALL = Config(C, 8, 2, 2, 1, 4, 16)
FORMS = {
    "plain": {},
    "windows": {"window": 4},
    "some windows": {"window": (None, 3)},
    "Qwen": {"qkv_bias": True, "normalize_qk": True, "tied": True},
    "dynamic": {"rope": ropes.Dynamic(factor=4.0, max_length=4)},
    "longrope": {"rope": ropes.LongRope(1e4, (1.0, 2.0), (3.0, 4.0), original_length=8)},
}
CHUNKS = {"tokens": [1] * T, "chunks": [5, 1, 1, 5], "all": [T]}
# Published numbers of parameters
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


def make(param_dtype=jnp.float32, **changes):
    config = dataclasses.replace(SMALL, **changes)
    return models.CausalLM(config, param_dtype=param_dtype, rngs=nnx.Rngs(1))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, C, (B, T))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.endswith("b"))
        for name in causal_lm.PRESETS
    ],
)
def test_presets_have_the_published_number_of_parameters(name):
    config = Config.preset(name)
    model = nnx.eval_shape(lambda: models.CausalLM(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, id=name, marks=[pytest.mark.slow] * (name == "tokens"))
        for name, sizes in CHUNKS.items()
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_steps_are_the_full_pass(form, sizes, tokens, x64):
    model = make(jnp.float64, **FORMS[form])
    length = T if model.config.rope.depends_on_length else None
    expected = model(tokens, rope_length=length)
    cache, found, start = model.empty_cache(B, T), [], 0
    for size in sizes:
        chunk = tokens[:, start : start + size]
        logits, cache = model(chunk, cache=cache, rope_length=length)
        found.append(logits)
        start += size
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form, tokens):
    """Nor, with a rope that depends on the length, the number of later ones, if that is given."""
    model = make(**FORMS[form])
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % C
    before, after = (np.asarray(model(each, rope_length=T)) for each in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7] != after[:, 7]).any()


def test_a_window_counts_the_token_itself(tokens):
    """W = 3 in one layer: the logits after token 7 depend on the tokens 5, 6 and 7."""
    model = make(window=3, num_layers=1)
    for place, seen in ((4, False), (5, True), (7, True)):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % C
        differs = bool((model(tokens)[:, 7] != model(changed)[:, 7]).any())
        assert differs == seen


def test_packed_documents_are_read_as_if_alone(tokens, x64):
    model = make(jnp.float64)
    lengths = np.array([5, 7])
    alone = [model(part) for part in np.split(tokens, [5], axis=1)]
    own = np.concatenate([np.arange(n) for n in lengths])
    for mask in (
        masks.documents(lengths),
        masks.segments(np.repeat([[0, 1]], B, 0).repeat(lengths, 1)),
    ):
        packed = model(tokens, mask=mask, positions=own)
        np.testing.assert_allclose(packed, np.concatenate(alone, 1), rtol=1e-12, atol=1e-14)
    # Rotary scores depend on offsets alone, to float32's rounding of the angles
    np.testing.assert_allclose(model(tokens, mask=mask), packed, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_length_of_a_rope_is_that_of_each_text(tokens, x64):
    """Of ragged texts each is what it is alone; the padding counts for nothing."""
    model, lengths = make(jnp.float64, **FORMS["dynamic"]), np.array([12, 3, 7])
    found = model(tokens, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        np.testing.assert_allclose(found[row, :length], alone[0], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="frequencies of Dynamic depend on the length: with a cac"):
        model(tokens, cache=model.empty_cache(B, T))


def test_a_model_is_a_value(tokens):
    """Built anew, or pickled, it has an equal graphdef, so that nothing is compiled again."""
    first, second = make(), make()
    again = pickle.loads(pickle.dumps(first))
    assert nnx.graphdef(first) == nnx.graphdef(second) == nnx.graphdef(again)
    np.testing.assert_array_equal(first(tokens), again(tokens))


def test_attend_sets_kernel_and_sink(tokens):
    blockwise = functools.partial(jattn.attend, implementation="blockwise")
    expected = make()(tokens)
    found = models.CausalLM(SMALL, attend=blockwise, rngs=nnx.Rngs(1))(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    sink = nn.AttentionSink(2, rngs=nnx.Rngs(0))
    sunk = models.CausalLM(SMALL, attend=sink, rngs=nnx.Rngs(1))
    assert not np.allclose(sunk(tokens), expected, atol=1e-7)
    cache = sunk.empty_cache(B, T)
    np.testing.assert_allclose(sunk(tokens, cache=cache)[0], sunk(tokens), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_computes_and_caches_in_its_own_dtype(dtype, tokens):
    model = models.CausalLM(SMALL, dtype=dtype, rngs=nnx.Rngs(1))
    assert model(tokens).dtype == dtype and model.norm.scale.dtype == jnp.float32
    assert model.empty_cache(1, 4)[0].keys.dtype == dtype
    narrow = make(dtype)
    assert narrow(tokens).dtype == dtype and narrow.empty_cache(1, 4)[0].keys.dtype == dtype
    exact = make()
    nnx.update(exact, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(narrow)))
    np.testing.assert_allclose(narrow(tokens), exact(tokens), rtol=0, atol=0.02)


def test_rms_norm_rounds_before_it_scales():
    """As the models whose weights are in circulation: the other order differs in bfloat16."""
    norm = nn.RMSNorm(3, dtype=jnp.bfloat16)
    norm.scale[...] = jnp.array([1.01, 3.3, -0.7])
    x = jnp.array([[0.3, -1.7, 2.2], [1e-3, 5e-3, 1.0]], jnp.bfloat16)
    wide = x.astype(jnp.float32)
    unit = wide / np.sqrt(np.mean(np.square(wide), -1, keepdims=True) + 1e-6)
    expected = unit.astype(jnp.bfloat16) * norm.scale[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), expected)
    assert (norm(x) != (unit * norm.scale[...]).astype(jnp.bfloat16)).any()


def cached(model, tokens, **options):
    return model(tokens, cache=model.empty_cache(B, T), **options)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "tokens must lie in 0 … 10", lambda m, t: m(t + 5)),
        (TypeError, "tokens must be integers", lambda m, t: m(t * 1.0)),
        (ValueError, r"tokens must be", lambda m, t: m(np.int32(3))),
        (
            ValueError,
            "a cache for 5 tokens cannot take 12",
            lambda m, t: m(t, cache=m.empty_cache(B, 5)),
        ),
        (
            ValueError,
            "length of the cache must lie in 0 … 0",
            lambda m, t: m(t, cache=cached(m, t[:, :1])[1]),
        ),
        (
            ValueError,
            r"cache is of \(3,\) examples, got tokens of shape \(2, 12\)",
            lambda m, t: cached(m, t[:2]),
        ),
        (
            ValueError,
            "an entry for each layer, 2, got 1",
            lambda m, t: m(t, cache=m.empty_cache(B, T)[:1]),
        ),
        (ValueError, "got the cache of one layer", lambda m, t: m(t, cache=m.empty_cache(B, T)[0])),
        (
            ValueError,
            "lengths must lie in 0 … 12",
            lambda m, t: cached(m, t, lengths=np.array([1, 2, 13])),
        ),
        (
            ValueError,
            "name must be one of llama-2-7b, .*got 'gpt2'",
            lambda m, t: Config.preset("gpt2"),
        ),
        (ValueError, "num_layers must be", lambda m, t: Config(C, num_layers=0)),
        (
            ValueError,
            r"features \(10\) must be a multiple of num_heads \(4\)",
            lambda m, t: Config(C, 10, num_heads=4),
        ),
        (ValueError, r"num_heads \(4\) must be a multiple of", lambda m, t: Config(C, 8, 1, 4, 3)),
        (ValueError, "width of a head must be even", lambda m, t: Config(C, 6, num_heads=2)),
        (
            ValueError,
            "window must have one entry for each layer, 2",
            lambda m, t: Config(C, 8, 2, 2, window=(1,)),
        ),
        (ValueError, "window must be", lambda m, t: Config(C, 8, 2, 2, window=0)),
        (ValueError, "stop must lie in 0 … 10", lambda m, t: Config(C, 8, 2, 2, stop=(11,))),
        (
            TypeError,
            "rope must be a value of jattn.ropes, got 'yarn'",
            lambda m, t: Config(C, 8, 2, 2, rope="yarn"),
        ),
        (TypeError, "tied must be True or False", lambda m, t: Config(C, 8, 2, 2, tied=1)),
    ],
)
def test_bad_input_is_named(error, match, call, tokens):
    with pytest.raises(error, match=match):
        call(make(), tokens)


def test_unknown_ids_are_nan_under_jit(tokens):
    tokens = tokens.copy()
    tokens[1, 4] = C
    logits = jax.jit(make())(tokens)
    assert np.isnan(logits[1, 4:]).all() and np.isfinite(logits[::2]).all()
