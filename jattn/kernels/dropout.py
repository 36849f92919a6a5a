"""Dropout of attention weights that every kernel repeats exactly, whatever blocks it works in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional.block import Block

Array = jax.Array


def drop(weights: Array, block: Block, rate: float, words: Array) -> Array:
    """Zero each weight with probability `rate` and scale the others by 1 / (1 − rate).

    Whether a weight is dropped depends on the random key and on its example, head, query slot and
    key slot alone.

    Args:
      weights: `[..., N, rows, columns]` of the block.
      block: where the weights stand.
      rate: from 0 to 1; at 1 everything is dropped.
      words: the data of a JAX random key, `jax.random.key_data`: `[words]`, uint32.

    Returns:
      The shape and dtype of `weights`.

    Example:
      >>> block = Block((), 1, (0, 2), (0, 3))
      >>> drop(jnp.ones((1, 2, 3)), block, 0.5, jax.random.key_data(jax.random.key(0))).shape
      (1, 2, 3)
    """
    if rate == 1:
        return jnp.zeros_like(weights)
    keep = random_bits(words, block) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, weights / (1 - rate), 0)


def random_bits(words: Array, block: Block) -> Array:
    """Independent 32-bit words for the entries of a block, as a function of their slots.

    JAX's threefry generator makes two words per example and head, whatever generator the random key
    is for: that of rbg gives other numbers under `vmap` than in a loop. A mixing hash, whose every
    output bit depends on every input bit, extends them over rows and columns. Only the hash runs
    once per weight.

    Returns:
      `[..., N, rows, columns]`, uint32.

    Example:
      >>> words = jax.random.key_data(jax.random.key(0))
      >>> whole = random_bits(words, Block((), 1, (0, 5), (0, 7)))
      >>> part = random_bits(words, Block((), 1, (2, 3), (4, 3)))
      >>> bool((whole[:, 2:, 4:] == part).all())
      True
    """
    key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
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
