"""From queries and keys to scores and weights: the steps that jattn's own kernels share.

For a block of the scores, or all of them at once:

    query, key ← 0 where hidden           a query that sees no key, a key that no query sees
    x ← score(query, key)                 both in their own dtype
    x ← 0 where forbidden
    x ← modifier(x), 0 where forbidden    one modifier after another

Each step sets forbidden entries to 0 again, so that a NaN or inf there enters neither the next
function nor a derivative.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jattn.functional import compat
from jattn.functional.captures import Captures, Pure
from jattn.functional.modifiers import Bias, Modifier
from jattn.kernels.arrays import head_scores, hide, keys_seen, queries_seen
from jattn.kernels.dropout import drop
from jattn.kernels.grid import Grid, Positions
from jattn.request import Request

Array = jax.Array


class Operands(NamedTuple):
    """All arrays of a request.

    Attributes:
      query: `[..., T, N, H]`.
      key: `[..., S, K, H']`.
      value: `[..., S, K, V]`.
      biases: of `modifiers.bias`: `[parts, *batch, N or 1, T or 1, S or 1]`, or without `parts`.
      captured: by score, mask and modifiers.
      dropout: data of the random key, or None.
      first: the slot of the first query, other than 0 where queries are sharded.
    """

    query: Array
    key: Array
    value: Array
    biases: list[Array]
    captured: list[Array]
    dropout: Array | None
    first: Array


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A request without its arrays: functions of a block that take these as arguments.

    Attributes:
      grid: the blocks.
      score: `(captured, query, key) -> [..., N, rows, columns]`.
      modify: `(captured, scores, biases, b, i, j, first) -> scores`, where every entry is allowed.
      modify_masked: the same with `allowed` after `biases`.
      allowed: `(captured, b, i, j, first)`, which entries count (see `Grid.allowed`);
        broadcastable to the scores.
      classes: `(captured, b, i, first) -> [num_columns]`, EMPTY, PARTIAL or FULL; None: all blocks
        are PARTIAL if `is_masked`, else FULL.
      is_masked: whether an entry may not count.
      dropout_rate: from 0 to 1.
      precision: of matrix products, as `jax.default_matmul_precision` has it.
    """

    grid: Grid
    score: Pure
    modify: Pure
    modify_masked: Pure
    allowed: Pure
    classes: Pure | None
    is_masked: bool
    dropout_rate: float
    precision: str | None

    def at_precision(self) -> Any:
        """The context in which products have the precision of the request."""
        return jax.default_matmul_precision(self.precision)

    def scores(
        self,
        captured: list[Array],
        query: Array,
        key: Array,
        biases: list[Array],
        allowed: Array | None,
        *at: Any,
    ) -> Array:
        """Scores `[..., N, rows, columns]` of block `at = (b, i, j, first)`, 0 where forbidden.

        Args:
          captured: as in `Operands`.
          query: `[..., N, rows, H]` of the block.
          key: `[..., K, columns, H']` of the block.
          biases: the block's part of each.
          allowed: which entries count, broadcastable to the scores; None: all.
          *at: the block's place in the grid.
        """
        query = hide(query, queries_seen(allowed))
        key = hide(key, keys_seen(allowed, key.shape[-3]))
        scores = hide(self.score(captured, query, key), allowed)
        return self.modified(captured, scores, biases, allowed, *at)

    def modified(
        self,
        captured: list[Array],
        scores: Array,
        biases: list[Array],
        allowed: Array | None,
        *at: Any,
    ) -> Array:
        """The scores of a block after its modifiers, 0 where forbidden, as they are before."""
        if allowed is None:
            return self.modify(captured, scores, biases, *at)
        captured = _without_gradient(captured, self.modify_masked.places, ~allowed.any())
        return self.modify_masked(captured, scores, biases, allowed, *at)

    def dropped(self, key_data: Array | None, weights: Array, *at: Any) -> Array:
        """The weights of a block after dropout."""
        if key_data is None:
            return weights
        block = self.grid.block(None, *at)
        dropped = drop(weights.reshape(block.shape), block, self.dropout_rate, key_data)
        return dropped.reshape(weights.shape)


def prepare(
    request: Request, grid: Grid, score: Pure, captures: Captures
) -> tuple["Scoring", Operands]:
    """Separate the callables of a request from the arrays that they capture.

    Args:
      request: what was asked for.
      grid: the blocks.
      score: the score, hoisted.
      captures: what it captured.

    Returns:
      A `Scoring` and its operands.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    at = index, index, index, index
    biases = [_in_parts(m.array, grid) for m in request.modifiers if isinstance(m, Bias)]
    bias_blocks = [_block_of(bias, grid) for bias in biases]
    masking = request.mask, request.positions
    allowed = captures.hoist(lambda held, *at: grid.allowed(*held, *at), masking, *at)
    # Kernels read a bias block by block: it is an operand, not a captured array
    others = tuple(None if isinstance(m, Bias) else m for m in request.modifiers)
    modifying = others, request.positions
    scores = score.jaxpr.out_avals[0]

    def full(held: Any, scores: Array, biases: list[Array], *at: Any) -> Array:
        return _modify(*held, grid, scores, biases, None, *at)

    def masked(held: Any, scores: Array, biases: list[Array], allowed: Array, *at: Any) -> Array:
        return _modify(*held, grid, scores, biases, allowed, *at)

    modify = captures.hoist(full, modifying, scores, bias_blocks, *at)
    of_allowed = allowed.jaxpr.out_avals[0]
    modify_masked = captures.hoist(masked, modifying, scores, bias_blocks, of_allowed, *at)
    is_masked, classes = request.mask is not None or grid.overlap, None
    if is_masked and grid.num_rows * grid.num_columns > 1:
        classes = captures.hoist(lambda held, *at: grid.classes(*held, *at), masking, *at[1:])
    key_data = None
    if request.dropout_key is not None and request.dropout_rate > 0:
        key_data = jax.random.key_data(request.dropout_key)
    functions = score, modify, modify_masked, allowed, classes
    scoring = Scoring(grid, *functions, is_masked, request.dropout_rate, request.precision)
    operands = Operands(
        request.query,
        request.key,
        request.value,
        biases,
        list(captures.arrays),
        key_data,
        jnp.zeros((), jnp.int32),
    )
    return scoring, compat.vary_over(captures.names, operands)


def hoist_score(request: Request, grid: Grid, captures: Captures) -> Pure:
    """The score for blocks of this grid, as a pure function of the arrays that it captures.

    Raises:
      ValueError, TypeError: the score refuses these shapes; the message quotes the score's own.
    """
    query, key = request.query, request.key
    shapes = [
        jax.ShapeDtypeStruct((*grid.block_batch, x.shape[-2], length, x.shape[-1]), x.dtype)
        for x, length in ((query, grid.rows), (key, grid.columns))
    ]
    function, held = _split_partial(request.score)

    def score(held: Any, query: Array, key: Array) -> Array:
        return head_scores(function(held), query, key)

    try:
        with jax.default_matmul_precision(request.precision):
            return captures.hoist(score, held, *shapes)
    except (TypeError, ValueError) as error:
        message = f"score refuses query {query.shape} and key {key.shape}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _split_partial(score: Any) -> tuple[Any, Any]:
    """Split a score into a function from its arrays to the score, and these arrays."""
    if isinstance(score, functools.partial):
        options, structure = jax.tree.flatten((score.args, score.keywords))
        places = [place for place, option in enumerate(options) if hasattr(option, "dtype")]

        def bound(held: Any) -> Any:
            filled = list(options)
            for place, array in zip(places, held, strict=True):
                filled[place] = array
            args, keywords = jax.tree.unflatten(structure, filled)
            return functools.partial(score.func, *args, **keywords)

        return bound, [options[place] for place in places]
    if not jax.tree_util.all_leaves([score]):  # a pytree that can be called
        return lambda held: held, score
    return lambda held: score, None


def _without_gradient(captured: list[Array], places: tuple[int, ...], when: Array) -> list[Array]:
    """The captured arrays, without a gradient `when` the block has no allowed entry.

    `ScoreMod` evaluates a user's modifier at allowed entries only. A block without an allowed entry
    adds 0 to the result, but its gradient might be 0 · NaN.
    """
    gated = list(captured)
    for place in places:
        array = captured[place]
        if jnp.issubdtype(array.dtype, jnp.inexact):
            gated[place] = jnp.where(when, jax.lax.stop_gradient(array), array)
    return gated


def _modify(
    modifiers: tuple[Modifier | None, ...],
    positions: Positions,
    grid: Grid,
    scores: Array,
    biases: list[Array],
    allowed: Array | None,
    *at: Any,
) -> Array:
    block, shape, bias_blocks = grid.block(positions, *at), scores.shape, iter(biases)
    if allowed is not None:
        allowed = allowed.reshape(*(1,) * (len(block.shape) - allowed.ndim), *allowed.shape)
    block = dataclasses.replace(block, allowed=allowed)
    scores = scores.reshape(block.shape)
    for modifier in modifiers:
        if modifier is None:  # a bias
            bias = next(bias_blocks)
            bias = bias.reshape((1,) * (scores.ndim - bias.ndim) + bias.shape)
            scores = scores + bias.astype(scores.dtype)
        else:
            scores = modifier.rule(scores, block)
        scores = hide(scores, allowed)
    return scores.reshape(shape)


def _in_parts(bias: Array, grid: Grid) -> Array:
    """A bias as `[parts, *batch, N or 1, T or 1, S or 1]`, or without `parts` if all share it."""
    bias = jnp.asarray(bias)
    bias = bias.reshape((1,) * (len(grid.batch) + 3 - bias.ndim) + bias.shape)
    if grid.examples is None:
        return bias
    if all(size == 1 for size in bias.shape[:-3]):
        return bias.reshape((1,) * len(grid.block_batch) + bias.shape[-3:])
    return grid.parts(jnp.broadcast_to(bias, (*grid.batch, *bias.shape[-3:])))


def _block_of(bias: Array, grid: Grid) -> Any:
    """The shape and dtype of a block's part of a bias."""
    *batch, N, T, S = bias.shape[-3 - len(grid.block_batch) :]
    rows, columns = (grid.rows if T > 1 else 1), (grid.columns if S > 1 else 1)
    return jax.ShapeDtypeStruct((*batch, N, rows, columns), bias.dtype)
