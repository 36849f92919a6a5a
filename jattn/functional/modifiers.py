"""Modifiers change a score after it is computed and before it is masked.

The form of a modifier is `(score, b, h, q_idx, k_idx) -> score`.

Any function of that form on scalars is a modifier; it sees the flat batch index, the query head and
the positions of query and key, and gradients reach the arrays it captures. A tuple of modifiers
applies from left to right. The signature is that of FlexAttention's score_mod
(https://arxiv.org/abs/2412.05496). What follows are the published ones.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional import checks, dtypes
from jattn.functional.block import Block
from jattn.functional.products import product
from jattn.functional.pytree import pytree

Array = jax.Array


class Modifier:
    """A change of scores that can be evaluated on any block of the score matrix."""

    def rule(self, scores: Array, block: Block) -> Array:
        """Change the scores `[..., N, rows, columns]` of a block."""
        raise NotImplementedError

    def reads_slots(self) -> bool:
        """Whether the rule reads places in the arrays of queries and keys, not positions."""
        return False

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        """Raise a `ValueError` if the modifier does not fit scores `[*batch, num_heads, T, S]`."""

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, k_idx: Any) -> Array:
        """Change one score; arrays of the modifier are read as having one batch axis."""
        block = Block.point(b, h, q_idx, k_idx)
        return self.rule(jnp.reshape(score, (1, 1, 1, 1)), block).reshape(())


@pytree
class ScoreMod(Modifier):
    """A user's function `(score, b, h, q_idx, k_idx) -> score` on scalars, evaluated on blocks.

    It may be singular at forbidden entries: `slope · log(i − j + 1)` under `causal()`. There the
    derivative by `slope` would be 0 · NaN. So at forbidden entries it gets the arguments of an
    allowed one.
    """

    function: Any

    def rule(self, scores: Array, block: Block) -> Array:
        """Apply the function to every entry; the result has the dtype of the scores."""
        entries = [scores, block.b, block.h, block.q_idx, block.k_idx]
        if block.allowed is not None:
            entries = _at_allowed(block.allowed, *entries)
        takes = "(score, b, h, q_idx, k_idx)"
        changed = checks.entrywise("modifier", takes, self.function, *entries)
        if not jnp.issubdtype(changed.dtype, jnp.floating):
            raise TypeError(f"a modifier must return a floating-point score, got {changed.dtype}")
        return changed.astype(scores.dtype)


def _at_allowed(allowed: Array, *entries: Array) -> list[Array]:
    """Replace the values at forbidden entries by those at the first allowed entry."""
    if 0 in allowed.shape:
        return list(entries)
    first = jnp.unravel_index(jnp.argmax(allowed), allowed.shape)
    zero = jnp.zeros((), first[0].dtype)

    def replaced(array: Array) -> Array:
        moves = [a != 1 and b != 1 for a, b in zip(array.shape, allowed.shape, strict=True)]
        if not any(moves):
            return array
        starts = [index if move else zero for index, move in zip(first, moves, strict=True)]
        sizes = [1 if move else size for size, move in zip(array.shape, moves, strict=True)]
        there = jax.lax.dynamic_slice(jax.lax.stop_gradient(array), starts, sizes)
        return jnp.where(allowed, array, there)

    return [replaced(array) for array in entries]


def soft_cap(cap: float | Array) -> Modifier:
    """Keep scores within ±cap, smoothly.

        score ← cap · tanh(score / cap)

    Args:
      cap: positive number.

    Raises:
      ValueError: cap is not positive.

    Paper: Gemma 2, https://arxiv.org/abs/2408.00118

    Example:
      >>> float(soft_cap(2.0)(1000.0, 0, 0, 0, 0))
      2.0
    """
    value = checks.concrete(cap)
    if value is not None and not (value.ndim == 0 and 0 < value < np.inf):
        raise ValueError(f"cap must be one positive finite number, got {cap}")
    return _SoftCap(cap)


def alibi(slopes: Array) -> Modifier:
    """A linear penalty on distance, with one slope per head.

        score ← score − slopes[h] · |i − j|

    It is symmetric, so that it also serves without a causal mask.

    Args:
      slopes: `[N]`, floating point; see `alibi_slopes`.

    Paper: Press et al. 2022, https://arxiv.org/abs/2108.12409

    Example:
      >>> float(alibi(alibi_slopes(8))(0.0, 0, 0, 5, 3))
      -1.0
    """
    checks.assert_floating(slopes=slopes)
    checks.assert_shapes(slopes=(slopes, "N"))
    return _Alibi(slopes)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The geometric slopes of the ALiBi paper.

    Where N is a power of two, they are 2^(−8 h / N) for h = 1 … N. Otherwise the slopes of the
    largest power of two below N come first, then every second one of twice that power.

    Args:
      num_heads: N ≥ 1.

    Returns:
      Slopes `[N]`, float32.

    Raises:
      ValueError: num_heads < 1.

    Paper: Press et al. 2022, https://arxiv.org/abs/2108.12409

    Example:
      >>> alibi_slopes(4)
      array([0.25      , 0.0625    , 0.015625  , 0.00390625], dtype=float32)
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power = 2 ** math.floor(math.log2(num_heads))
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([first, between])[:num_heads].astype(np.float32)


def relative_bias(table: Array) -> Modifier:
    """A learned bias for every offset.

        score ← score + table[h, i − j + L − 1]

    Args:
      table: `[2 L − 1]`, or `[N, 2 L − 1]` with one row per head; L is the longest length. Longer
        inputs are an error; with positions of one's own, an offset beyond the table adds NaN.

    Paper: Shaw et al. 2018, https://arxiv.org/abs/1803.02155; in this form Liu et al. 2021,
      https://arxiv.org/abs/2103.14030

    Example:
      >>> float(relative_bias(jnp.array([0.0, 1.0, 2.0]))(0.0, 0, 0, 1, 0))
      2.0
    """
    checks.assert_floating(table=table)
    if np.ndim(table) not in (1, 2) or np.shape(table)[-1] % 2 == 0:
        raise ValueError(f"table must be [2 L − 1] or [N, 2 L − 1], got shape {np.shape(table)}")
    return _RelativeBias(table)


def relative_key(
    query: Array, table: Array, *, key: Array | None = None, scale: float | None = None
) -> Modifier:
    """The product of query, or of query and key, with a learned row for their distance.

        score ← score + scale · q · E[i − j + L − 1]          (BERT's relative_key)
        score ← score + scale · (q + k) · E[i − j + L − 1]    (with `key`: relative_key_query)

    It keeps the products of every query, or key, with all rows, `[..., N, T, 2 L − 1]`.

    Args:
      query: `[..., T, N, H]`, that of the call of `attend`; floating point, as all arrays here.
      table: E, `[2 L − 1, H]`; L is the longest length. Longer inputs are an error; with positions
        of one's own, a distance of L or more adds NaN.
      key: `[..., S, K, H]`, that of the call; None: the query alone.
      scale: a number, that of the call's score; None: 1/√H.

    Raises:
      ValueError: a shape does not fit.
      TypeError: an array is not floating point.

    Papers: Shaw et al. 2018, https://arxiv.org/abs/1803.02155; with the key Huang et al. 2020,
    https://arxiv.org/abs/2009.13658

    Example:
      >>> query, table = jnp.ones((2, 1, 4)), jnp.arange(12.0).reshape(3, 4)
      >>> float(relative_key(query, table)(0.0, 0, 0, 1, 0))  # ½ (8 + 9 + 10 + 11)
      19.0
    """
    checks.assert_floating(query=query, table=table)
    sizes = checks.assert_shapes(query=(query, "... T N H"), table=(table, "rows H"))
    if sizes["rows"] % 2 == 0:
        raise ValueError(f"table must be [2 L − 1, H], got shape {np.shape(table)}")
    scale = sizes["H"] ** -0.5 if scale is None else scale
    if np.ndim(scale):
        raise ValueError(f"scale must be one number, got shape {np.shape(scale)}")
    by_key = None
    if key is not None:
        checks.assert_floating(key=key)
        checks.assert_shapes(key=(key, "... S K H"), table=(table, "rows H"))
        checks.assert_divisible(N=(sizes["N"], "K", np.shape(key)[-2]))
        by_key = _products(key, table, scale)
    return RelativeKey(_products(query, table, scale), by_key)


def _products(heads: Array, table: Array, scale: float) -> Array:
    """`[..., length, heads, H]` times every row: `[..., heads, length, rows]`."""
    heads, table = jnp.asarray(heads), jnp.asarray(table)
    if not dtypes.is_half(heads.dtype):  # a half-precision operand decides for both
        heads, table = (each.astype(jnp.result_type(heads, table)) for each in (heads, table))
    products = product(rearrange(heads, "... length n h -> ... n length h"), table)
    return products * jnp.asarray(scale, products.dtype)


def t5_bias(table: Array, *, bidirectional: bool = True, max_distance: int = 128) -> Modifier:
    """T5's learned bias: exact for near offsets, one bucket per range of distances further away.

        score ← score + table[bucket(j − i), h]

    Args:
      table: `[num_buckets, N]`, floating point.
      bidirectional: half of the buckets are for later keys; otherwise later keys share the bucket
        of distance 0.
      max_distance: beyond it all offsets share the last bucket.

    Raises:
      ValueError: the table is not of rank 2 or has too few buckets.

    Paper: Raffel et al. 2020, https://arxiv.org/abs/1910.10683

    Example:
      >>> float(t5_bias(jnp.arange(32.0)[:, None])(0.0, 0, 0, 3, 0))
      3.0
    """
    checks.assert_floating(table=table)
    num_buckets = checks.assert_shapes(table=(table, "buckets N"))["buckets"]
    near = num_buckets // (4 if bidirectional else 2)
    if near < 1 or (bidirectional and num_buckets % 2) or max_distance <= near:
        raise ValueError(
            f"t5_bias needs max_distance > num_buckets // {4 if bidirectional else 2} ≥ 1, and an "
            f"even number of buckets if bidirectional, got {num_buckets} buckets and "
            f"max_distance {max_distance}"
        )
    return _T5Bias(table, bidirectional, max_distance)


def bias(array: Array) -> Modifier:
    """Add an array; it is read by slots, not by positions.

        score ← score + array[b, h, t, s]

    Args:
      array: floating point, broadcastable to `[..., N, T, S]`.

    Example:
      >>> float(bias(jnp.array([[0.0, 7.0]]))(1.0, 0, 0, 0, 1))
      8.0
    """
    checks.assert_floating(bias=array)
    return Bias(array)


@pytree
class _SoftCap(Modifier):
    cap: Any

    def rule(self, scores: Array, block: Block) -> Array:
        cap = jnp.asarray(self.cap, scores.dtype)
        return cap * jnp.tanh(scores / cap)


@pytree
class _Alibi(Modifier):
    slopes: Any

    def rule(self, scores: Array, block: Block) -> Array:
        slopes = jnp.asarray(self.slopes, scores.dtype)[block.h]
        return scores - slopes * block.distance.astype(scores.dtype)

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        _check_heads("alibi slopes", np.shape(self.slopes)[0], num_heads)


@pytree
class _RelativeBias(Modifier):
    table: Any

    def rule(self, scores: Array, block: Block) -> Array:
        table = jnp.asarray(self.table, scores.dtype)
        index = _offset_index(block, table.shape[-1])
        where = (index,) if table.ndim == 1 else (block.h, index)
        return scores + table.at[where].get(mode="fill", fill_value=jnp.nan)

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        if np.ndim(self.table) == 2:
            _check_heads("relative_bias table", np.shape(self.table)[0], num_heads)
        _check_offsets("relative_bias", np.shape(self.table)[-1], T, S, own_positions)


@pytree
class RelativeKey(Modifier):
    """Products with every row of a table, of which the distance chooses one."""

    by_query: Any
    by_key: Any

    def reads_slots(self) -> bool:
        """It reads those of the keys, where the key has a part in it."""
        return self.by_key is not None

    def rule(self, scores: Array, block: Block) -> Array:
        """Add the products with the row of each distance."""
        index = _offset_index(block, self.by_query.shape[-1])
        added = _taken(block.of_rows(self.by_query), index)
        if self.by_key is not None:
            shared = self.by_query.shape[-3] // self.by_key.shape[-3]
            by_key = block.of_columns(jnp.repeat(self.by_key, shared, axis=-3))
            added = added + _taken(by_key, index.mT).mT
        return scores + added.astype(scores.dtype)

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        """The products must be of these queries and keys, and the table long enough."""
        for name, products, length in (("query", self.by_query, T), ("key", self.by_key, S)):
            if products is None:
                continue
            heads = num_heads if name == "query" else products.shape[-3]
            if products.shape[-3:-1] != (heads, length) or num_heads % heads:
                must = f"relative_key must be of the {name} of this call, {length} tokens"
                got = f"{products.shape[-2]} of {products.shape[-3]} heads"
                raise ValueError(f"{must} of {heads} heads, got {got}")
            expected = (*batch, heads, length, products.shape[-1])
            checks.assert_broadcastable("relative_key", products, expected, "[..., N, T, rows]")
        _check_offsets("relative_key", self.by_query.shape[-1], T, S, own_positions)


def _taken(products: Array, index: Array) -> Array:
    return jnp.take_along_axis(products, index, axis=-1, mode="fill", fill_value=jnp.nan)


def _offset_index(block: Block, rows: int) -> Array:
    """Of 2 L − 1 rows that of each offset i − j; `rows`, where NaN stands, beyond the table."""
    middle = (rows - 1) // 2
    distance = jnp.minimum(block.distance, np.uint32(middle + 1)).astype(jnp.int32)
    offset = jnp.where(block.q_idx >= block.k_idx, distance, -distance)
    # `fill` would read a negative index from its end, as Python
    return jnp.where(distance > middle, rows, middle + offset)


@pytree
class _T5Bias(Modifier):
    table: Any
    bidirectional: bool
    max_distance: int

    def rule(self, scores: Array, block: Block) -> Array:
        return scores + jnp.asarray(self.table, scores.dtype)[self._bucket(block), block.h]

    def _bucket(self, block: Block) -> Array:
        num_buckets = np.shape(self.table)[0] // (2 if self.bidirectional else 1)
        is_later, most = block.k_idx > block.q_idx, np.uint32(2**31 - 1)
        distance = jnp.minimum(block.distance, most).astype(jnp.int32)  # all beyond share a bucket
        later: Any = jnp.where(is_later, num_buckets, 0)
        if not self.bidirectional:
            distance, later = jnp.where(is_later, 0, distance), 0
        near = num_buckets // 2
        # Edges of the logarithmic buckets in exact integers: no rounding of a logarithm decides.
        steps = np.arange(1, num_buckets - near)
        edges = np.ceil(
            near * (self.max_distance / near) ** (steps / (num_buckets - near)) - 1e-9
        ).astype(np.int32)
        far = near + jnp.searchsorted(jnp.asarray(edges), distance, side="right").astype(
            distance.dtype
        )
        return later + jnp.where(distance < near, distance, far)

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        _check_heads("t5_bias table", np.shape(self.table)[1], num_heads)


@pytree
class Bias(Modifier):
    """An explicit array, which kernels may read one block at a time."""

    array: Any

    def reads_slots(self) -> bool:
        """It does."""
        return True

    def rule(self, scores: Array, block: Block) -> Array:
        """Add the block's part of the array."""
        return scores + block.of_pair(self.array).astype(scores.dtype)

    def check(
        self, batch: tuple[int, ...], num_heads: int, T: int, S: int, own_positions: bool
    ) -> None:
        """The array must broadcast to the scores."""
        checks.assert_broadcastable("bias", self.array, (*batch, num_heads, T, S), "[..., N, T, S]")


def _check_offsets(name: str, rows: int, T: int, S: int, own_positions: bool) -> None:
    longest = (rows + 1) // 2
    lengths = [n for n in (T, S) if isinstance(n, int)]
    if max(lengths, default=0) > longest and not own_positions:
        up_to = f"{name} table holds offsets of lengths up to {longest}"
        raise ValueError(f"{up_to}, got T = {T} and S = {S}")


def _check_heads(name: str, got: int, num_heads: int) -> None:
    if got != num_heads:
        raise ValueError(f"{name} must have one entry per query head, N = {num_heads}, got {got}")
