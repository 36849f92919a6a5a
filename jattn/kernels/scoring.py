"""The one path from queries and keys to scores and weights, which every kernel of ours takes.

For a block of the scores, or all of them at once:

    query, key ← 0 where hidden           the query may see no key, or no query may see the key
    x ← score(query, key)                 both in the dtype in which they came
    x ← 0 where forbidden
    x ← modifier(x), 0 where forbidden    one modifier after another

A forbidden entry is hidden again after each step, so that what a function makes of it, NaN or inf,
reaches neither the next function nor a derivative.
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
      allowed: `(captured, b, i, j, first)`, which entries count: allowed by the mask, and
        fresh (see `Grid`); broadcastable to the scores.
      classes: `(captured, b, i, first) -> [num_columns]`, EMPTY, PARTIAL or FULL; None: all blocks
        are PARTIAL if `is_masked`, else FULL.
      is_masked: whether some entries do not count.
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
        """The context in which products have the precision that was asked for."""
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
        if allowed is None:
            return self.modify(captured, scores, biases, *at)
        captured = _without_gradient(captured, self.modify_masked.places, ~allowed.any())
        return self.modify_masked(captured, scores, biases, allowed, *at)

    def dropped(self, words: Array | None, weights: Array, *at: Any) -> Array:
        """The weights of a block after dropout."""
        if words is None:
            return weights
        block = self.grid.block(None, *at)
        dropped = drop(weights.reshape(block.shape), block, self.dropout_rate, words)
        return dropped.reshape(weights.shape)


def prepare(
    request: Request, grid: Grid, score: Pure, captures: Captures
) -> tuple["Scoring", Operands]:
    """Separate what a request's callables do from the arrays that they capture.

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
    cuts = [_block_of(bias, grid) for bias in biases]
    masking = request.mask, request.positions
    allowed = captures.hoist(lambda held, *at: grid.allowed(*held, *at), masking, *at)
    # A bias is read block by block, not held
    others = tuple(None if isinstance(m, Bias) else m for m in request.modifiers)
    modifying = others, request.positions
    scores = score.jaxpr.out_avals[0]

    def full(held: Any, scores: Array, cuts: list[Array], *at: Any) -> Array:
        return _modify(*held, grid, scores, cuts, None, *at)

    def masked(held: Any, scores: Array, cuts: list[Array], allowed: Array, *at: Any) -> Array:
        return _modify(*held, grid, scores, cuts, allowed, *at)

    modify = captures.hoist(full, modifying, scores, cuts, *at)
    of_allowed = allowed.jaxpr.out_avals[0]
    modify_masked = captures.hoist(masked, modifying, scores, cuts, of_allowed, *at)
    is_masked, classes = request.mask is not None or grid.overlap, None
    if is_masked and grid.num_rows * grid.num_columns > 1:
        classes = captures.hoist(lambda held, *at: grid.classes(*held, *at), masking, *at[1:])
    words = None
    if request.dropout_key is not None and request.dropout_rate > 0:
        words = jax.random.key_data(request.dropout_key)
    functions = score, modify, modify_masked, allowed, classes
    scoring = Scoring(grid, *functions, is_masked, request.dropout_rate, request.precision)
    operands = Operands(
        request.query,
        request.key,
        request.value,
        biases,
        list(captures.arrays),
        words,
        jnp.zeros((), jnp.int32),
    )
    return scoring, compat.vary_over(captures.names, operands)


def hoist_score(request: Request, grid: Grid, captures: Captures) -> Pure:
    """The score, on shapes of a block, pure in what it captures.

    Raises:
      ValueError, TypeError: the score does not take these shapes; in its own words.
    """
    query, key = request.query, request.key
    shapes = [
        jax.ShapeDtypeStruct((*grid.batch, x.shape[-2], length, x.shape[-1]), x.dtype)
        for x, length in ((query, grid.rows), (key, grid.columns))
    ]
    function, held = _opened(request.score)

    def score(held: Any, query: Array, key: Array) -> Array:
        return head_scores(function(held), query, key)

    try:
        with jax.default_matmul_precision(request.precision):
            return captures.hoist(score, held, *shapes)
    except (TypeError, ValueError) as error:
        message = f"score does not take query {query.shape} and key {key.shape}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _opened(score: Any) -> tuple[Any, Any]:
    """Split a `functools.partial`: a function from the arrays it holds to the score, and these."""
    if isinstance(score, functools.partial):
        options, structure = jax.tree.flatten((score.args, score.keywords))
        places = [place for place, option in enumerate(options) if hasattr(option, "dtype")]

        def bound(held):
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
    """Captured arrays that get no gradient `when` the block has no allowed entry.

    A user's modifier is evaluated at allowed entries alone (see `ScoreMod`). A block without any
    contributes nothing, but its gradient might be 0 · NaN.
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
    cuts: list[Array],
    allowed: Array | None,
    *at: Any,
) -> Array:
    block, shape, cuts = grid.block(positions, *at), scores.shape, list(cuts)
    if allowed is not None:
        allowed = allowed.reshape(*(1,) * (len(block.shape) - allowed.ndim), *allowed.shape)
    block = dataclasses.replace(block, allowed=allowed)
    scores = scores.reshape(block.shape)
    for modifier in modifiers:
        if modifier is None:  # a bias
            cut = cuts.pop(0)
            cut = cut.reshape((1,) * (scores.ndim - cut.ndim) + cut.shape)
            scores = scores + cut.astype(scores.dtype)
        else:
            scores = modifier.rule(scores, block)
        scores = hide(scores, allowed)
    return scores.reshape(shape)


def _in_parts(bias: Array, grid: Grid) -> Array:
    """A bias as `[parts, *batch, N or 1, T or 1, S or 1]`, or without `parts` if all share it."""
    bias = jnp.asarray(bias)
    bias = bias.reshape((1,) * (len(grid.lead) + 3 - bias.ndim) + bias.shape)
    if grid.examples is None:
        return bias
    if all(size == 1 for size in bias.shape[:-3]):
        return bias.reshape((1,) * len(grid.batch) + bias.shape[-3:])
    return grid.parts(jnp.broadcast_to(bias, (*grid.lead, *bias.shape[-3:])))


def _block_of(bias: Array, grid: Grid) -> Any:
    """The shape and dtype of a block's part of a bias."""
    *batch, N, T, S = bias.shape[-3 - len(grid.batch) :]
    rows, columns = (grid.rows if T > 1 else 1), (grid.columns if S > 1 else 1)
    return jax.ShapeDtypeStruct((*batch, N, rows, columns), bias.dtype)
