"""The keys and values of the tokens so far, in arrays that never change their size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.functional import checks, compat, masks
from jattn.functional.pytree import named_tuple

Array = jax.Array


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
        """
        V = head_features if value_features is None else value_features
        checks.assert_positive(
            capacity=capacity, num_kv_heads=num_kv_heads, head_features=head_features,
            value_features=V,
        )  # fmt: skip
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

    def append(self, key: Array, value: Array) -> "KeyValueCache":
        """A cache with T more tokens for each example.

        Args:
          key: `[..., T, K, H]`.
          value: `[..., T, K, V]`.

        Raises:
          ValueError: a shape does not fit, or there are fewer free slots than tokens. (Under jit,
            where lengths cannot be seen, the tokens become NaN.)
        """
        T = checks.assert_shapes(
            keys=(self.keys, "... K H S"), values=(self.values, "... K S V"),
            length=(self.length, "..."), key=(key, "... T K H"), value=(value, "... T K V"),
        )["T"]  # fmt: skip
        if isinstance(T, int) and T > self.capacity:  # T may be a symbol of `jax.export`
            raise ValueError(f"a cache for {self.capacity} tokens cannot take {T}")
        free = self.capacity - T
        why = f"of {self.capacity} slots, {T} must be free"
        checks.assert_in_range("the length of the cache", self.length, 0, free, why)
        fits = (self.length <= free)[..., None, None, None]
        key, value = (
            jnp.where(fits, x, jnp.nan).astype(kept.dtype)
            for x, kept in ((key, self.keys), (value, self.values))
        )
        keys = _write(self.keys, jnp.moveaxis(key, -3, -1), self.length, -1)
        values = _write(self.values, jnp.moveaxis(value, -3, -2), self.length, -2)
        return KeyValueCache(keys, values, self.length + T)


def _write(array: Array, new: Array, start: Array, axis: int) -> Array:
    """Write `new` into each example from its own start on, along a negative axis."""

    def write(array: Array, new: Array, start: Array) -> Array:
        def one(array: Array, new: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(array, new, start, array.ndim + axis)

        return functools.reduce(lambda f, _: jax.vmap(f), range(start.ndim), one)(array, new, start)

    array, new, start = compat.vary_alike((array, new, start))
    return compat.automatically(write, jax.typeof(array).sharding.spec)(array, new, start)
