"""Choose the grid of a blockwise kernel: how large its blocks are, and how many examples one holds."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from jattn.functional import checks
from jattn.kernels.arrays import head_scores
from jattn.kernels.tiles import Tiles, block_size, largest_intermediate, nearest_divisor

Array = jax.Array

# On CPU a block's scores should fit into the cache, but XLA gives a matrix product both cores only from 512 rows on:
# so many rows, and as many columns and examples as make about so many scores (measured on two cores)
ROWS, SCORES = 512, 2**20
COLUMNS = 128, 1024  # at least and at most
BLOCK_BYTES = 2**24  # additive scores have an intermediate of rows × columns × width: their blocks are smaller
LEAST = 32, 128  # rows and columns, where a block holds part of the batch and where it holds all of it


def choose_tiles(
    score: Callable[[Array, Array], Array], query: Array, key: Array, positions: tuple[Array, Array] | None
) -> Tiles:
    """Choose the grid: blocks as large as the cache and their largest intermediate allow."""
    (*lead, T, N, _), S = query.shape, key.shape[-3]
    rows = block_size(T, ROWS)
    columns = block_size(S, min(max(SCORES // (N * rows), COLUMNS[0]), COLUMNS[1]))
    tiles = Tiles(tuple(lead), N, T, S, rows, columns, positions, 1 if lead and one_cpu_device() else None)
    least = LEAST[tiles.examples is None]
    while (bytes := _bytes_of_block(score, tiles, query, key)) > BLOCK_BYTES and max(tiles.rows, tiles.columns) > least:
        if tiles.rows >= tiles.columns:
            tiles = dataclasses.replace(tiles, rows=block_size(T, tiles.rows // 2))
        else:
            tiles = dataclasses.replace(tiles, columns=block_size(S, tiles.columns // 2))
    if tiles.examples is None:
        return tiles
    room = min(SCORES // (N * tiles.rows * tiles.columns), BLOCK_BYTES // bytes)
    tiles = dataclasses.replace(tiles, examples=nearest_divisor(math.prod(lead), max(room, 1)))
    return tiles if _takes_parts(score, tiles, query, key) else dataclasses.replace(tiles, examples=None)


def _bytes_of_block(score, tiles, query, key):
    """Of the largest array that is made on the way to a block's scores; unknown to a score that needs all examples."""
    whole = dataclasses.replace(tiles, examples=None)
    shapes = block_shapes(tiles if _takes_parts(score, tiles, query, key) else whole, query, key)
    return largest_intermediate(functools.partial(head_scores, score), *shapes)


def _takes_parts(score, tiles, query, key):
    """Whether the score can do with a part of the batch; it cannot if it captures an array that has batch axes."""
    try:
        jax.eval_shape(functools.partial(head_scores, score), *block_shapes(tiles, query, key))
    except Exception:  # whatever a user's score does about an axis that it misses; a real mistake comes again
        return False
    return True


def block_shapes(tiles: Tiles, query: Array, key: Array) -> list[Any]:
    """What a score sees of a query and a key in one block, heads first."""
    dtype = checks.accumulator(query.dtype)
    lengths = zip((query, key), (tiles.rows, tiles.columns), strict=True)
    return [jax.ShapeDtypeStruct((*tiles.batch, x.shape[-2], length, x.shape[-1]), dtype) for x, length in lengths]


def one_cpu_device() -> bool:
    """Where parts of a batch run one after another, each pays for its own length; elsewhere all share a block."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
