"""Token by token, or in chunks, with a cache: the numbers of the whole sequence at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks, models, modifiers, nn, positions, ropes

B, T, D = 2, 9, 12
FORMS = {
    "multi-head": {},
    "grouped": {"num_heads": 6, "num_kv_heads": 2},
    "normalised": {"normalize_qk": True},
    "rotary": {"rotary": positions.rotary},
    "rotary by pairs": {"rotary": functools.partial(positions.rotary, interleaved=True)},
}
MASKS = {
    "causal": {"mask": masks.causal()},
    "window": {"mask": masks.sliding_window(2)},
    "distance": {
        "mask": masks.causal(),
        "modifier": modifiers.alibi(np.float32([0.5, 0.25, 0.125])),
    },
}


def make(num_heads=3, **options):
    return nn.MultiHeadAttention(num_heads, D, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


def in_chunks(attention, x, sizes, **options):
    cache, outputs, start = attention.empty_cache(len(x), T + 1), [], 0
    for size in sizes:
        output, cache = attention(x[:, start : start + size], cache=cache, **options)
        outputs.append(output)
        start += size
    assert cache.length.tolist() == [T] * len(x)
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1] * T, id="tokens", marks=pytest.mark.slow),
        pytest.param([4, 1, 3, 1], id="chunks"),
        pytest.param([T], id="all"),
    ],
)
def test_chunks_of_any_size_are_the_whole(x, sizes):
    attention = make()
    expected = attention(x, mask=masks.causal())
    found = in_chunks(attention, x, sizes, mask=masks.causal())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_every_form_of_attention_takes_a_cache(x, options):
    attention = make(**options)
    expected = attention(x, mask=masks.causal())
    found = in_chunks(attention, x, [5, 1, 3], mask=masks.causal())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_masks_and_modifiers_see_true_positions(x, options):
    attention = make()
    expected = attention(x, **options)
    found = in_chunks(attention, x, [5, 1, 3], **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_each_row_goes_on_from_its_own_length(x):
    """Two prompts of different lengths, then one more token for each."""
    attention, lengths = make(rotary=positions.rotary), [3, 5]
    caches = []
    for row, length in enumerate(lengths):
        cache = attention.empty_cache(1, T)
        caches.append(attention(x[row : row + 1, :length], cache=cache, mask=masks.causal())[1])
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)
    assert both.length.tolist() == lengths
    newest = jnp.stack([x[row, length] for row, length in enumerate(lengths)])[:, None]
    found, both = attention(newest, cache=both, mask=masks.causal())
    for row, length in enumerate(lengths):
        expected = attention(x[row : row + 1, : length + 1], mask=masks.causal())[0, -1]
        np.testing.assert_allclose(found[row, 0], expected, rtol=1e-5, atol=1e-6)
    assert both.length.tolist() == [4, 6]


def test_a_scan_compiles_one_step(x):
    attention = make()
    expected = attention(x, mask=masks.causal())

    @jax.jit
    def run(x):
        def step(cache, token):
            output, cache = attention(token[:, None], cache=cache, mask=masks.causal())
            return cache, output[:, 0]

        return jax.lax.scan(step, attention.empty_cache(B, T), jnp.swapaxes(x, 0, 1))[1]

    np.testing.assert_allclose(jnp.swapaxes(run(x), 0, 1), expected, rtol=1e-5, atol=1e-6)


def test_weights_come_before_the_cache(x):
    attention = make()
    cache = attention.empty_cache(B, T)
    _, weights, cache = attention(x[:, :4], cache=cache, mask=masks.causal(), return_weights=True)
    assert weights.shape == (B, 3, 4, T) and isinstance(cache, nn.KeyValueCache)
    assert not weights[..., 4:].any()


def test_what_free_slots_hold_changes_nothing(x):
    attention = make()
    cache = attention.empty_cache(B, T)
    dirty = cache._replace(keys=cache.keys + jnp.nan, values=cache.values + jnp.nan)
    (expected, _), (found, _) = (
        attention(x[:, :4], cache=each, mask=masks.causal()) for each in (cache, dirty)
    )
    np.testing.assert_array_equal(found, expected)


def test_no_leading_axis_and_several(x):
    attention = make()
    expected = attention(x, mask=masks.causal())
    cache = attention.empty_cache((), T)
    alone, cache = attention(x[0], cache=cache, mask=masks.causal())
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5, atol=1e-6)
    assert cache.length.shape == ()
    several, _ = attention(x[None], cache=attention.empty_cache((1, B), T), mask=masks.causal())
    np.testing.assert_allclose(several[0], expected, rtol=1e-5, atol=1e-6)


def test_a_cache_has_the_dtype_to_compute_in(x):
    attention = make(dtype=jnp.bfloat16)
    cache = attention.empty_cache(B, T)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    output, after = attention(x, cache=cache, mask=masks.causal())
    assert output.dtype == after.keys.dtype == jnp.bfloat16
    assert attention.empty_cache(B, T, dtype=jnp.float32).keys.dtype == jnp.float32


def test_tokens_beyond_the_capacity_are_refused_and_under_jit_nan(x):
    attention = make()

    def run(cache):
        return attention(x[:, :5], cache=cache, mask=masks.causal())

    _, half = run(attention.empty_cache(B, 8))
    with pytest.raises(ValueError, match=r"length of the cache must lie in 0 … 3 .* got 5"):
        run(half)
    for form in (run, jax.jit(run)):
        with pytest.raises(ValueError, match="a cache for 4 tokens cannot take 5"):
            form(attention.empty_cache(B, 4))
    with pytest.raises(TypeError, match="cache must be a KeyValueCache or a WindowCache, got int"):
        attention(x, cache=10)
    output, _ = jax.jit(run)(half)
    assert np.isnan(output).all()


@pytest.mark.parametrize("mask", [masks.sliding_window(0), masks.sliding_window(1), masks.causal()])
def test_tokens_beyond_the_capacity_stay_nan_under_jit_whatever_a_mask_hides(x, mask):
    attention = make()
    step = jax.jit(lambda x, cache: attention(x, cache=cache, mask=mask))
    cache = attention.empty_cache(B, 4)
    for t in range(7):
        output, cache = step(x[:, t : t + 1], cache)
        assert np.isnan(output).all() == (t >= 4)


WRONG = {
    "another batch": (ValueError, r"cache is of \(3,\) examples, got a query", {"batch": 3}),
    "positions": (ValueError, r"\(positions, positions\)", {"positions": True}),
    "another module's": (ValueError, r"key must be .*K = 1", {"heads": 1}),
}


@pytest.mark.parametrize(("error", "match", "broken"), WRONG.values(), ids=WRONG)
def test_a_cache_that_does_not_fit_is_named(x, error, match, broken):
    attention, other = make(), make(num_kv_heads=broken.get("heads"))
    cache = other.empty_cache(broken.get("batch", B), T)
    steps = jnp.arange(T)
    options = {"positions": (steps, steps + 1)} if "positions" in broken else {}
    with pytest.raises(error, match=match):
        attention(x, cache=cache, **options)


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="capacity must be"):
        make().empty_cache(B, 0)


@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 3, 1], [T]], ids=["tokens", "chunks", "all"])
@pytest.mark.parametrize("window", [1, 2, 4, T, T + 5])
def test_a_cache_that_wraps_is_a_sliding_window(x, sizes, window):
    """A chunk longer than the window sees what stood in it before, and then its own tokens."""
    attention, mask = make(rotary=positions.rotary), masks.sliding_window(window - 1)
    expected = attention(x, mask=mask)
    cache, outputs, start = attention.empty_cache(B, T + 1, window=window), [], 0
    assert cache.capacity == min(window, T + 1)
    for size in sizes:
        output, cache = attention(x[:, start : start + size], cache=cache, mask=mask)
        outputs.append(output)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-5, atol=1e-6)


def test_a_cache_that_wraps_hides_what_it_has_forgotten(x):
    """Under a mask that would show more, it is still a window."""
    attention = make()
    cache = attention.empty_cache(B, 100, window=3)
    for t in range(T):
        output, cache = attention(x[:, t : t + 1], cache=cache, mask=masks.causal())
    expected = attention(x, mask=masks.sliding_window(2))[:, -1:]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert cache.length.tolist() == [T] * B and cache.positions.tolist() == [[6, 7, 8]] * B
    chunk, _ = attention(x[:, :4], cache=attention.empty_cache(B, 100, window=3))
    both_ways = attention(x[:, :4], mask=masks.sliding_window(2, T))
    np.testing.assert_allclose(chunk, both_ways, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fill", [0.0, pytest.param(1e6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [None, 3])
def test_of_a_ragged_chunk_only_the_tokens_are_kept(x, window, fill, compiled):
    """Whatever stands in the padding, each row goes on as if it were alone."""
    attention = make(rotary=positions.rotary)
    mask = masks.causal() if window is None else masks.sliding_window(window - 1)

    def call(chunk, cache, lengths):
        return attention(chunk, cache=cache, mask=mask, lengths=lengths)

    call = jax.jit(call) if compiled else call
    cache, done = attention.empty_cache(B, 2 * T, window=window), [0, 0]
    for lengths in ([2, 5], [3, 0], [1, 1]):
        chunk = np.full((B, max(lengths), D), fill, np.float32)
        for row, length in enumerate(lengths):
            chunk[row, :length] = x[row, done[row] : done[row] + length]
            done[row] += length
        output, cache = call(jnp.asarray(chunk), cache, jnp.array(lengths))
        assert cache.length.tolist() == done
        for row, length in enumerate(lengths):
            alone = attention(x[row : row + 1, : done[row]], mask=mask)[0, done[row] - length :]
            np.testing.assert_allclose(output[row, :length], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_wrong_numbers_of_tokens_are_refused_and_under_jit_nan(x, window):
    attention, chunk = make(), x[:, :4]
    cache = attention.empty_cache(B, T, window=window)
    for wrong in (-1, 5):
        lengths = np.array([wrong, 4])
        with pytest.raises(ValueError, match="lengths must lie in 0 … 4"):
            attention(chunk, cache=cache, lengths=lengths, mask=masks.causal())

        @jax.jit
        def twice(lengths):
            _, after = attention(chunk, cache=cache, lengths=lengths, mask=masks.causal())
            return attention(x[:, 4:5], cache=after, mask=masks.causal())[0]

        output = twice(lengths)
        assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()
    with pytest.raises(ValueError, match=r"lengths must be .*\(2,\)"):
        attention(chunk, cache=cache, lengths=np.array([1, 2, 3]))
    with pytest.raises(TypeError, match="lengths must be integers"):
        attention(chunk, cache=cache, lengths=np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"without one, pass masks\.padding\(lengths\)"):
        attention(chunk, lengths=np.array([1, 2]))
    with pytest.raises(ValueError, match="window must be"):
        attention.empty_cache(B, T, window=0)


def test_a_rotation_of_one_call_takes_the_place_of_the_modules_own(x):
    turned = make(rotary=positions.rotary)
    own = functools.partial(positions.rotary, rope=jnp.array([0.5, 0.1]))
    expected = make(rotary=own)(x, mask=masks.causal())
    np.testing.assert_array_equal(turned(x, mask=masks.causal(), rotary=own), expected)
    with pytest.raises(TypeError, match="rotary must be a function, got 3"):
        make(rotary=3)


def test_what_reads_slots_means_nothing_in_a_window(x):
    attention, lengths = make(), np.array([2, 3])
    cache = attention.empty_cache(B, 2 * T, window=3)
    for options in (
        {"mask": masks.padding(lengths)},
        {"mask": masks.causal() & ~masks.padding(lengths)},
        {"mask": np.ones((1, 3), bool)},
        {"modifier": modifiers.bias(jnp.ones((1, 3)))},
    ):
        with pytest.raises(ValueError, match="reads slots, and a WindowCache moves tokens"):
            attention(x[:, :1], cache=cache, **options)
    with pytest.raises(ValueError, match="a WindowCache knows positions by its slots"):
        steps = jnp.arange(1)
        attention(x[:, :1], cache=cache, positions=(steps, steps))


def test_a_rope_that_depends_on_the_length_needs_it_with_a_cache(x):
    rope = ropes.Dynamic(factor=4.0, max_length=4)
    attention = make(rotary=functools.partial(positions.rotary, rope=rope))
    with pytest.raises(ValueError, match="bind length= to the length that the text may reach"):
        attention(x, cache=attention.empty_cache(B, T))
    bound = functools.partial(positions.rotary, rope=rope, length=T)
    expected = attention(x, mask=masks.causal())
    cache, found = attention.empty_cache(B, T), []
    for t in range(T):
        output, cache = attention(x[:, t : t + 1], cache=cache, mask=masks.causal(), rotary=bound)
        found.append(output)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_accepted_branch_of_a_tree_of_drafts_stays():
    """Each draft is what its path alone is, and so is what follows the branch that is kept."""
    config = models.causal_lm.Config(11, 8, 2, 2, 1, 4, 16)
    model = models.CausalLM(config, rngs=nnx.Rngs(0))
    prompt, drafts = np.array([[3, 1, 4]]), np.array([[5, 9, 2, 6, 7]])
    parents, depths = np.array([-1, 0, 0, 2, 3]), np.array([0, 1, 1, 2, 3])
    _, cache = model(prompt, cache=model.empty_cache(1, 12))
    tree = masks.tree(parents, prefix=3)
    for given in (drafts, jnp.asarray(drafts)):
        logits, grown = model(given, cache=cache, mask=tree, positions=3 + depths)
        for draft, path in ((1, [0, 1]), (4, [0, 2, 3, 4])):
            alone = model(np.concatenate([prompt, drafts[:, path]], axis=1))
            np.testing.assert_allclose(logits[0, draft], alone[0, -1], rtol=1e-5, atol=1e-7)
    kept = tuple(each.keep(jnp.array([3]), jnp.array([[3, 5, 6]])) for each in grown)
    assert kept[0].length.tolist() == [6]
    text = np.concatenate([prompt, drafts[:, [0, 2, 3]], [[8]]], axis=1)
    found, _ = model(text[:, -1:], cache=kept)
    np.testing.assert_allclose(found[0, 0], model(text)[0, -1], rtol=1e-5, atol=1e-7)
    none = kept[0].keep(jnp.array([4]), jnp.zeros((1, 0), int))
    assert none.length.tolist() == [4]
    with pytest.raises(ValueError, match="slots must lie in 0 … 11"):
        grown[0].keep(jnp.array([3]), jnp.array([[12]]))


def test_what_is_kept_must_be_there_and_under_jit_shows_as_nan(x):
    attention = make()
    _, cache = attention(x[:, :5], cache=attention.empty_cache(B, T), mask=masks.causal())
    for start, slots in (([6, 2], [[1], [3]]), ([2, 2], [[5], [3]]), ([-1, 2], [[1], [3]])):
        start, slots = np.array(start), np.array(slots)
        with pytest.raises(ValueError, match="start"):
            cache.keep(start, slots)

        @jax.jit
        def then(start, slots):
            kept = cache.keep(start, slots)
            return attention(x[:, 5:6], cache=kept, mask=masks.causal())[0]

        output = then(start, slots)
        assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()
    with pytest.raises(ValueError, match="lengths must lie in 0 … 1"):
        cache.keep(np.array([2, 2]), np.array([[1], [3]]), lengths=np.array([1, 2]))
