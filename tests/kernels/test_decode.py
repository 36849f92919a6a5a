"""A few queries read many keys and values where they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks, models, nn

B, S, N, K, H = 2, 512, 8, 2, 64
SHAPES = (B, 1, N, H), (B, S, K, H), (B, S, K, H)


def chosen(*shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    table = jattn.explain(*arrays, **options)
    (line,) = (line for line in table.splitlines() if " runs: " in line)
    return line.split()[0]


def test_it_runs_where_a_mask_meets_few_queries_and_many_keys():
    hidden = {"mask": masks.causal()}
    assert chosen(*SHAPES, **hidden) == "decode"
    assert chosen(*SHAPES) == "dense"  # nothing is hidden
    assert chosen((B, 9, N, H), *SHAPES[1:], **hidden) == "dense"  # 9 · 4 rows
    assert chosen(SHAPES[0], (B, 8, K, H), (B, 8, K, H), **hidden) == "dense"
    assert chosen(*SHAPES, **hidden, return_weights=True) == "dense"
    long = (1, 2**22, 1, 4)
    assert chosen((1, 1, 1, 4), long, long, **hidden) == "decode"  # 2²² scores, one row
    with pytest.raises(NotImplementedError, match="decode: it gives no weights, for return_weig"):
        jattn.attend(*map(jnp.ones, SHAPES), return_weights=True, implementation="decode")


def temporary(function, *arrays):
    return function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_a_cache_is_not_copied():
    """The program holds scores and little else beside its arguments."""
    cache = nn.KeyValueCache.empty(B, S, K, H)._replace(length=jnp.full(B, S - 1, jnp.int32))

    @functools.partial(jax.jit, static_argnums=2)
    def run(query, cache, implementation):
        return jattn.attend(
            query, cache.key, cache.value, mask=cache.mask, implementation=implementation
        )

    query, size = jnp.ones(SHAPES[0]), cache.keys.nbytes
    assert temporary(run, query, cache, None) < size / 4
    assert temporary(run, query, cache, "dense") > size


@pytest.mark.parametrize(("batch", "num_kv_heads"), [(1, 2), (3, 1), (3, 2)])
def test_a_step_of_generation_copies_no_cache(batch, num_kv_heads):
    config = models.causal_lm.Config(11, 8, 3, 2, num_kv_heads, 4, 16)
    model = models.CausalLM(config, rngs=nnx.Rngs(0))
    split, caches = nnx.split(model), model.empty_cache(batch, 4096)
    step = jax.jit(
        lambda state, tokens, caches: nnx.merge(split[0], state).step(tokens, caches),
        donate_argnums=2,
    )
    found = temporary(step, split[1], jnp.zeros(batch, jnp.int32), caches)
    scores = batch * 2 * 4096 * 4
    assert found < 6 * scores + 2**16  # the caches are 8 · num_kv_heads times as large as scores


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_shows_nowhere(bad, rng):
    """In keys, in values, or both, of one example or of all."""
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in SHAPES)
    mask = masks.padding(np.array([300, 0]))
    attend = functools.partial(jattn.attend, mask=mask, return_lse=True)
    expected = attend(query, key, value, implementation="dense")
    for hidden in ([key], [value], [key, value]):
        before = [array.copy() for array in hidden]
        for array in hidden:
            array[0, 300:], array[1] = bad, bad
        for run in (attend, jax.jit(attend)):
            for found, truth in zip(run(query, key, value), expected, strict=True):
                np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
        gradient = jax.grad(lambda q, k, v: attend(q, k, v)[0].sum(), (0, 1, 2))(query, key, value)
        assert all(np.isfinite(each).all() for each in gradient)
        for array, old in zip(hidden, before, strict=True):
            array[:] = old


def test_great_values_and_no_values():
    """A weighted mean of numbers near the greatest is one, and values may have no width."""
    query, key = jnp.zeros((1, 1, 1, 4)), jnp.ones((1, 200, 1, 4))
    mask = masks.padding(np.array([150]))
    great = jattn.attend(query, key, jnp.full((1, 200, 1, 2), 3e37), mask=mask)
    np.testing.assert_allclose(great, 3e37, rtol=1e-5)
    assert jattn.attend(query, key, key[..., :0], mask=mask).shape == (1, 1, 1, 0)
