"""Dropout of attention weights, the same in every kernel for any size of blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional.block import Block

Array = jax.Array


def drop(weights: Array, block: Block, rate: float, key_data: Array) -> Array:
    """Zero each weight with probability `rate` and scale the others by 1 / (1 − rate).

    Whether a weight is dropped depends only on the random key and on the weight's example, head,
    query slot and key slot.

    Args:
      weights: `[..., N, rows, columns]` of the block.
      block: the entries that the weights belong to.
      rate: from 0 to 1; at 1 all weights are dropped.
      key_data: of a JAX random key, `jax.random.key_data`: `[words]`, uint32.

    Returns:
      The shape and dtype of `weights`.

    Example:
      >>> block = Block((), 1, (0, 2), (0, 3))
      >>> drop(jnp.ones((1, 2, 3)), block, 0.5, jax.random.key_data(jax.random.key(0))).shape
      (1, 2, 3)
    """
    if rate == 1:
        return jnp.zeros_like(weights)
    keep = random_bits(key_data, block) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, weights / (1 - rate), 0)


def random_bits(key_data: Array, block: Block) -> Array:
    """Independent random 32-bit words for the entries of a block, as a function of their slots.

    JAX's threefry generator makes two words per example and head. It does so for keys of every
    generator, because rbg gives other numbers under `vmap` than in a loop. A mixing hash, in which
    every output bit depends on every input bit, extends the two words over rows and columns. Only
    the hash runs once per weight.

    Returns:
      `[..., N, rows, columns]`, uint32.

    Example:
      >>> key_data = jax.random.key_data(jax.random.key(0))
      >>> whole = random_bits(key_data, Block((), 1, (0, 5), (0, 7)))
      >>> part = random_bits(key_data, Block((), 1, (2, 3), (4, 3)))
      >>> bool((whole[:, 2:, 4:] == part).all())
      True
    """
    key = jax.random.wrap_key_data(key_data[:2], impl="threefry2x32")
    for word in key_data[2:]:
        key = jax.random.fold_in(key, word)
    stream = block.b * block.num_heads + block.h  # [..., N, 1, 1]
    numbers = jax.vmap(
        lambda index: jax.random.bits(jax.random.fold_in(key, index), (2,), "uint32")
    )
    drawn = rearrange(numbers(stream.ravel()), "streams two -> two streams")
    row_word, column_word = (word.reshape(stream.shape) for word in drawn)
    rows = _mix(row_word + block.q_slot.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    columns = block.k_slot.astype(jnp.uint32) * np.uint32(0x85EBCA6B)
    return _mix(_mix(rows ^ column_word) + columns)


def _mix(word: Any) -> Array:
    """A bijection of 32-bit words with low bias: https://github.com/skeeto/hash-prospector."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0xD35A2D97)
    return word ^ (word >> np.uint32(15))
