"""Dropout of attention weights that every kernel repeats exactly, whatever blocks it works in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional.blocks import Block

Array = jax.Array


def drop(weights: Array, block: Block, rate: float, key: Any) -> Array:
    """Zero each weight with probability `rate` and scale the others by 1 / (1 − rate).

    Whether a weight is dropped depends on the key and on its example, head, query slot and key slot alone.

    Args:
      weights: `[..., N, rows, columns]` of the block.
      block: where the weights stand.
      rate: from 0 to 1; at 1 everything is dropped.
      key: a JAX random key.

    Returns:
      The shape and dtype of `weights`.

    Example:
      >>> block = Block((), 1, (0, 2), (0, 3))
      >>> drop(jnp.ones((1, 2, 3)), block, 0.5, jax.random.key(0)).shape
      (1, 2, 3)
    """
    if rate == 1:
        return jnp.zeros_like(weights)
    keep = random_bits(key, block) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, weights / (1 - rate), 0)


def random_bits(key: Array, block: Block) -> Array:
    """Independent 32-bit words for the entries of a block, `[..., N, rows, columns]`, as a function of their slots.

    JAX's generator makes two words per example and head; a mixing hash, whose every output bit depends on every input
    bit, extends them over rows and columns. Only the hash runs once per weight.

    Example:
      >>> whole = random_bits(jax.random.key(0), Block((), 1, (0, 5), (0, 7)))
      >>> part = random_bits(jax.random.key(0), Block((), 1, (2, 3), (4, 3)))
      >>> bool((whole[:, 2:, 4:] == part).all())
      True
    """
    stream = block.b * block.num_heads + block.h  # [..., N, 1, 1]
    words = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index), (2,), jnp.uint32))(stream.ravel())
    row_word, column_word = (word.reshape(stream.shape) for word in rearrange(words, "streams two -> two streams"))
    rows = _mix(row_word + block.q_slot.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    return _mix(_mix(rows ^ column_word) + block.k_slot.astype(jnp.uint32) * np.uint32(0x85EBCA6B))


def _mix(word: Any) -> Array:
    """A bijection of 32-bit words with low bias: https://github.com/skeeto/hash-prospector."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0xD35A2D97)
    return word ^ (word >> np.uint32(15))
