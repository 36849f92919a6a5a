"""The keys and values of the tokens so far, in arrays that never change their size.

`MultiHeadAttention` takes either cache. It calls `next_positions` and `extended`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from jattn.functional import checks, compat, dtypes, masks
from jattn.functional.pytree import named_tuple

Array = jax.Array


@named_tuple
class Seen(NamedTuple):
    """What the newest queries see of a cache, as `jattn.attend` takes it.

    Attributes:
      key: `[..., S, K, H]`.
      value: `[..., S, K, V]`.
      positions: of the keys, int32 `[S]` or `[..., S]`.
      mask: the keys that are tokens.
    """

    key: Array
    value: Array
    positions: Array
    mask: masks.Mask


@named_tuple
class KeyValueCache(NamedTuple):
    """What self-attention remembers of each example while its tokens come one by one, or in chunks.

    Slot s holds the key and the value of the token at position s. The arrays have the layout that
    one query reads fastest; `key` and `value` show them as `jattn.attend` takes them.

    Attributes:
      keys: `[..., K, H, S]`.
      values: `[..., K, S, V]`.
      length: int32 `[...]`, how many of the S slots of each example are filled.

    Example:
      >>> cache = KeyValueCache.empty(2, capacity=8, num_kv_heads=1, head_features=4)
      >>> cache = cache.append(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)))
      >>> cache.key.shape, cache.length.tolist(), cache.next_positions(2)[0].tolist()
      ((2, 8, 1, 4), [3, 3], [3, 4])
    """

    keys: Array
    values: Array
    length: Array

    @classmethod
    def empty(
        cls,
        batch: int | tuple[int, ...],
        capacity: int,
        num_kv_heads: int,
        head_features: int,
        *,
        value_features: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "KeyValueCache":
        """A cache without tokens.

        Args:
          batch: the number of examples, or several leading axes.
          capacity: S, the greatest number of tokens.
          num_kv_heads: K.
          head_features: H, the width of a key.
          value_features: V, the width of a value; None: that of a key.
          dtype: of keys and values.

        Raises:
          ValueError: a size is not positive.
          TypeError: the dtype is not floating point of 16 bits or more.
        """
        V = head_features if value_features is None else value_features
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(f"dtype must be floating point of 16 bits or more, got {dtype}")
        checks.assert_positive(
            num_kv_heads=num_kv_heads, head_features=head_features, value_features=V
        )
        if not jax.export.is_symbolic_dim(capacity):
            checks.assert_positive(capacity=capacity)
        batch = batch if isinstance(batch, tuple) else (batch,)
        return cls(
            jnp.zeros((*batch, num_kv_heads, head_features, capacity), dtype),
            jnp.zeros((*batch, num_kv_heads, capacity, V), dtype),
            jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """S, the greatest number of tokens."""
        return self.keys.shape[-1]

    @property
    def key(self) -> Array:
        """The keys as `attend` takes them, `[..., S, K, H]`."""
        return jnp.moveaxis(self.keys, -1, -3)

    @property
    def value(self) -> Array:
        """The values as `attend` takes them, `[..., S, K, V]`."""
        return jnp.moveaxis(self.values, -2, -3)

    @property
    def mask(self) -> masks.Mask:
        """The slots that are filled."""
        return masks.padding(self.length)

    def next_positions(self, T: int) -> Array:
        """The positions `[..., T]` of the T tokens that come next."""
        steps = jnp.arange(T, dtype=jnp.int32).reshape((1,) * self.length.ndim + (T,))
        return self.length[..., None] + steps

    def append(self, key: Array, value: Array, *, lengths: Array | None = None) -> "KeyValueCache":
        """A cache with T more tokens for each example.

        Args:
          key: `[..., T, K, H]`.
          value: `[..., T, K, V]`.
          lengths: integers `[...]`, how many of the T are tokens; the next ones take the place of
            the others. None: all.

        Raises:
          ValueError: a shape does not fit, or there are fewer than T free slots. (Under jit, where
            lengths cannot be seen, the tokens become NaN.)
        """
        T = _check_fits(self, key, value, lengths)
        free = self.check_room(T)
        fits = (_are_counts(lengths, T) & (self.length <= free))[..., None, None, None]
        key, value = (
            jnp.where(fits, x, jnp.nan).astype(kept.dtype)
            for x, kept in ((key, self.keys), (value, self.values))
        )
        keys = _write(self.keys, jnp.moveaxis(key, -3, -1), self.length, -1)
        values = _write(self.values, jnp.moveaxis(value, -3, -2), self.length, -2)
        grown = self.length + (T if lengths is None else dtypes.lengths(lengths))
        # A cache that has overflown stays so
        return KeyValueCache(keys, values, jnp.where(fits[..., 0, 0, 0], grown, _OVERFLOWN))

    def check_room(self, T: int) -> int:
        """The greatest length at which T more tokens fit.

        Raises:
          ValueError: they do not fit, as far as lengths are known.
        """
        if all(isinstance(size, int) for size in (T, self.capacity)) and T > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens cannot take {T}")
        free = self.capacity - T
        why = f"of {self.capacity} slots, {T} must be free"
        checks.assert_in_range("the length of the cache", self.length, 0, free, why)
        return free

    def extended(
        self,
        key: Array,
        value: Array,
        *,
        lengths: Array | None = None,
        positions: Array | None = None,
    ) -> tuple["KeyValueCache", Seen]:
        """`append`, and what the new tokens see: all tokens so far, themselves included.

        Positions of the new tokens, `[T]` or `[..., T]`, are given where they are not their slots,
        as in a tree of drafts; in later calls they are, so `keep` then moves what stays.
        """
        cache = self.append(key, value, lengths=lengths)
        places = jnp.arange(cache.capacity, dtype=jnp.int32)
        if positions is not None:
            T = key.shape[-3]
            own = jnp.broadcast_to(positions, (*self.length.shape, T)).astype(jnp.int32)
            places = jnp.broadcast_to(places, (*self.length.shape, cache.capacity))
            places = _write(places, own, self.length, -1)
        return cache, Seen(cache.key, cache.value, places, cache.mask)

    def keep(self, start: Array, slots: Array, *, lengths: Array | None = None) -> "KeyValueCache":
        """Of the tokens from `start` on, keep those in some slots and forget the others.

        So the branch of a tree of drafts stays that is accepted; without slots, `[..., 0]`, all
        from `start` on is forgotten.

        Args:
          start: integers `[...]`, where the kept tokens go.
          slots: integers `[..., M]`, where they stand, in the order of their positions.
          lengths: integers `[...]`, how many of the M are kept, the first ones; None: all.

        Raises:
          ValueError: a shape does not fit, or a start, a slot or a length lies outside its range.
            (Under jit, where they cannot be seen, what the cache gives is NaN.)
          TypeError: start, slots or lengths are not integers.

        Example:
          >>> cache = KeyValueCache.empty(1, capacity=8, num_kv_heads=1, head_features=1)
          >>> token = jnp.arange(5.0).reshape(1, 5, 1, 1)
          >>> cache = cache.append(token, token).keep(jnp.array([2]), jnp.array([[2, 4]]))
          >>> cache.key[0, :4, 0, 0].tolist(), cache.length.tolist()
          ([0.0, 1.0, 2.0, 4.0], [4])
        """
        checks.assert_index(start=start, slots=slots)
        given: dict[str, Any] = {} if lengths is None else {"lengths": (lengths, "...")}
        M = checks.assert_shapes(
            length=(self.length, "..."), start=(start, "..."), slots=(slots, "... M"), **given
        )["M"]
        start, slots = dtypes.indices(start), dtypes.indices(slots)
        checks.assert_in_range("slots", slots, 0, self.capacity - 1, "the last slot")
        checks.assert_in_range("start", start, 0, self.capacity - M, "the last place for M tokens")
        if lengths is not None:
            checks.assert_integers(lengths=lengths)
            checks.assert_in_range("lengths", lengths, 0, M, "M, the number of slots")
        are_tokens = (slots >= 0) & (slots < self.length[..., None])
        fits = are_tokens.all(-1) & _are_counts(lengths, M)
        fits &= (start >= 0) & (start <= jnp.minimum(self.length, self.capacity - M))
        known = checks.concrete(fits)
        if known is not None and not known.all():
            raise ValueError("start and slots must lie among the tokens that the cache holds")
        where = slots[..., None, None, :]
        keys = jnp.take_along_axis(self.keys, where, axis=-1)
        values = jnp.take_along_axis(self.values, jnp.swapaxes(where, -1, -2), axis=-2)
        length = start + (M if lengths is None else dtypes.lengths(lengths))
        return KeyValueCache(
            _write(self.keys, keys, start, -1), _write(self.values, values, start, -2),
            jnp.where(fits, length, _OVERFLOWN).astype(jnp.int32),
        )  # fmt: skip

    @property
    def overflown(self) -> Array:
        """Which examples got more tokens than there are slots, boolean `[...]`."""
        return self.length > self.capacity


@named_tuple
class WindowCache(NamedTuple):
    """What sliding-window attention remembers: the last W tokens, however many come.

    The token at position p stands in slot p mod W. With it attention is that of a `KeyValueCache`
    under the mask `sliding_window(W − 1)`: a query sees itself and the W − 1 tokens before it.

    Attributes:
      keys: `[..., K, H, W]`.
      values: `[..., K, W, V]`.
      length: int32 `[...]`, how many tokens of each example came so far.

    Example:
      >>> cache = WindowCache.empty(1, capacity=4, num_kv_heads=1, head_features=2)
      >>> cache = cache.append(jnp.ones((1, 6, 1, 2)), jnp.ones((1, 6, 1, 2)))
      >>> cache.positions
      Array([[4, 5, 2, 3]], dtype=int32)
    """

    keys: Array
    values: Array
    length: Array

    @classmethod
    def empty(
        cls,
        batch: int | tuple[int, ...],
        capacity: int,
        num_kv_heads: int,
        head_features: int,
        *,
        value_features: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "WindowCache":
        """A cache without tokens; `capacity` is W, the others are as in `KeyValueCache.empty`."""
        cache = KeyValueCache.empty(
            batch, capacity, num_kv_heads, head_features,
            value_features=value_features, dtype=dtype,
        )  # fmt: skip
        return cls(*cache)

    @property
    def capacity(self) -> int:
        """W."""
        return self.keys.shape[-1]

    @property
    def key(self) -> Array:
        """The keys as `attend` takes them, `[..., W, K, H]`."""
        return KeyValueCache(*self).key

    @property
    def value(self) -> Array:
        """The values as `attend` takes them, `[..., W, K, V]`."""
        return KeyValueCache(*self).value

    def next_positions(self, T: int) -> Array:
        """The positions `[..., T]` of the T tokens that come next."""
        return KeyValueCache(*self).next_positions(T)

    @property
    def positions(self) -> Array:
        """The position of the token in each slot, int32 `[..., W]`; far below 0 where none is."""
        last = self.length[..., None] - 1
        slots = jnp.arange(self.capacity, dtype=jnp.int32).reshape((1,) * (last.ndim - 1) + (-1,))
        positions = last - jnp.mod(last - slots, self.capacity)
        return jnp.where(positions >= 0, positions, _NOWHERE)

    @property
    def mask(self) -> masks.Mask:
        """The window, outside of which empty slots stand, too."""
        return masks.sliding_window(self.capacity - 1, -_NOWHERE)

    def append(self, key: Array, value: Array, *, lengths: Array | None = None) -> "WindowCache":
        """A cache with T more tokens for each example; arguments and errors as `KeyValueCache`.

        It never overflows: the oldest tokens make room.
        """
        T = _check_fits(self, key, value, lengths)
        grown = self.length + (T if lengths is None else dtypes.lengths(lengths))
        if lengths is not None:
            grown = jnp.where(_are_counts(lengths, T), grown, _OVERFLOWN)
        cache = WindowCache(self.keys, self.values, grown)
        key, value = key.astype(self.keys.dtype), value.astype(self.values.dtype)
        key, value = jnp.moveaxis(key, -3, -1), jnp.moveaxis(value, -3, -2)
        if lengths is None and T == 1:  # in place
            slot = jnp.mod(self.length, self.capacity)
            return WindowCache(
                _write(self.keys, key, slot, -1), _write(self.values, value, slot, -2), grown
            )
        places = cache.positions - self.length[..., None]  # of each slot's token among the T
        keys = _replaced(self.keys, key, places, -1)
        return WindowCache(keys, _replaced(self.values, value, places, -2), grown)

    def extended(
        self,
        key: Array,
        value: Array,
        *,
        lengths: Array | None = None,
        positions: Array | None = None,
    ) -> tuple["WindowCache", Seen]:
        """`append`, and what the new tokens see: what the window held before, and themselves."""
        if positions is not None:
            raise ValueError("a WindowCache knows positions by its slots: leave positions out")
        cache, T = self.append(key, value, lengths=lengths), key.shape[-3]
        if lengths is None and T == 1:
            return cache, Seen(cache.key, cache.value, cache.positions, cache.mask)
        newest = self.next_positions(T)
        newest = jnp.where(newest < cache.length[..., None], newest, _NOWHERE)
        return cache, Seen(
            jnp.concatenate([self.key, key.astype(self.keys.dtype)], axis=-3),
            jnp.concatenate([self.value, value.astype(self.values.dtype)], axis=-3),
            jnp.concatenate([self.positions, newest], axis=-1),
            self.mask,
        )

    @property
    def overflown(self) -> Array:
        """Which examples got a wrong number of tokens under jit, boolean `[...]`."""
        return self.length >= _OVERFLOWN


Cache = KeyValueCache | WindowCache
_NOWHERE, _OVERFLOWN = -(2**30), 2**30


def of_layers(cache: Sequence[Cache] | None, number: int) -> Sequence[Cache | None]:
    """The cache of each of a number of layers, or None for each.

    Raises:
      ValueError: there is not one for each layer.

    Example:
      >>> of_layers(None, 2)
      [None, None]
    """
    if cache is None:
        return [None] * number
    alone = isinstance(cache, Cache)
    if alone or len(cache) != number:
        must = f"cache must have an entry for each layer, {number}"
        raise ValueError(f"{must}, got {'the cache of one layer' if alone else len(cache)}")
    return cache


def _check_fits(cache: Cache, key: Array, value: Array, lengths: Array | None) -> Any:
    """T, the number of new tokens, after a check of all shapes."""
    given: dict[str, Any] = {} if lengths is None else {"lengths": (lengths, "...")}
    T = checks.assert_shapes(
        keys=(cache.keys, "... K H S"), values=(cache.values, "... K S V"),
        length=(cache.length, "..."), key=(key, "... T K H"), value=(value, "... T K V"), **given,
    )["T"]  # fmt: skip
    if lengths is not None:
        checks.assert_integers(lengths=lengths)
        checks.assert_in_range("lengths", lengths, 0, T, "T, the number of new tokens")
    return T


def _are_counts(lengths: Array | None, T: Any) -> Array:
    """Whether lengths lie in 0 … T, which cannot be seen under jit."""
    if lengths is None:
        return jnp.asarray(True)
    lengths = jnp.asarray(lengths)
    return (lengths >= 0) & (lengths <= T)


def _replaced(array: Array, new: Array, places: Array, axis: int) -> Array:
    """The slots, along a negative axis, whose place among the new ones is not negative, replaced.

    Places are `[..., S]`, the other arrays `[..., K, *, *]`.
    """

    def replaced(array: Array, new: Array, places: Array) -> Array:
        shape = [1] * array.ndim
        shape[: places.ndim - 1], shape[axis] = places.shape[:-1], places.shape[-1]
        places = places.reshape(shape)
        taken = jnp.take_along_axis(new, jnp.clip(places, 0, new.shape[axis] - 1), axis=axis)
        return jnp.where(places >= 0, taken, array)

    array, new, places = compat.vary_alike((array, new, places))
    return compat.automatically(replaced, jax.typeof(array).sharding.spec)(array, new, places)


def _write(array: Array, new: Array, start: Array, axis: int) -> Array:
    """Write `new` into each example from its own start on, along a negative axis."""

    def write(array: Array, new: Array, start: Array) -> Array:
        def one(array: Array, new: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(array, new, start, 0)

        # A write for each row: XLA fuses a single one into every reader, which then copies all
        leading = array.shape[:axis]
        start = start.reshape(start.shape + (1,) * (len(leading) - start.ndim))
        for _ in leading:
            one = jax.vmap(one)
        return one(array, new, jnp.broadcast_to(start, leading))

    array, new, start = compat.vary_alike((array, new, start))
    return compat.automatically(write, jax.typeof(array).sharding.spec)(array, new, start)
