"""Decoding: find a likely sequence, one token at a time, for any model that can take one step.

A step is a pure function `step(carry, tokens [B]) -> (carry, logits [B, C])`. The carry is a pytree
of arrays `[B, ...]`: what the model remembers of the tokens so far. What does not change from step
to step (an encoder's outputs) belongs in the step's closure, where it is neither copied nor
reordered. Both searches run under jit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jattn.functional import checks, compat, dtypes
from jattn.functional.pytree import named_tuple

Array = jax.Array
Carry = Any
Step = Callable[[Carry, Array], tuple[Carry, Array]]


@named_tuple
class Decoded(NamedTuple):
    """What a search found, where L is `max_length`.

    A beam adds an axis W of hypotheses after B, best first.

    Attributes:
      tokens: int32 `[B, L]` or `[B, W, L]`, the end token included, padded beyond it.
      scores: `[B]` or `[B, W]`: natural log-probabilities, divided by the length penalty if there
        is one.
      lengths: int32 `[B]` or `[B, W]`: tokens up to and including the end token, or L.
    """

    tokens: Array
    scores: Array
    lengths: Array


def greedy(
    step: Step, carry: Carry, *, start: Array, end: int, max_length: int, pad: int | None = None
) -> Decoded:
    """Take the most probable token at every step.

        y_t = argmax_c log p(c | y_1 … y_{t−1})

    Stops as soon as every sequence has ended. The lowest id wins a tie.

    Args:
      step: `(carry, tokens [B]) -> (carry, logits [B, C])`.
      carry: pytree of arrays `[B, ...]`.
      start: integers `[B]`: the token that each sequence's first step reads.
      end: id of the token that ends a sequence.
      max_length: L, the longest sequence.
      pad: id that fills the places after the end; None: `end`.

    Returns:
      A `Decoded` with tokens `[B, L]`.

    Raises:
      ValueError: a shape does not fit, or `end` is not in the vocabulary, or `max_length` < 1.

    Example:
      >>> counting = lambda carry, tokens: (carry, jax.nn.one_hot(tokens + 1, 5))
      >>> print(greedy(counting, (), start=jnp.array([0, 2]), end=3, max_length=4, pad=0).tokens)
      [[1 2 3 0]
       [3 0 0 0]]
    """
    carry, start, logits = _check(step, carry, start, end, max_length)
    pad = end if pad is None else pad

    def advance(loop: Any) -> Any:
        time, carry, last, (tokens, scores, lengths), ended = loop
        carry, logits = step(carry, last)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        gain = jnp.max(_log_probabilities(logits), axis=-1)
        tokens = written_at(tokens, time, jnp.where(ended, pad, best))
        decoded = Decoded(
            tokens, scores + jnp.where(ended, 0, gain), jnp.where(ended, lengths, time + 1)
        )
        return time + 1, carry, best, decoded, ended | (best == end)

    def unfinished(loop: Any) -> Array:
        time, *_, ended = loop
        return (time < max_length) & ~jnp.all(ended)

    decoded = no_tokens(start, max_length, pad, logits.dtype)
    loop = (jnp.int32(0), carry, start, decoded, jnp.zeros_like(start, bool))
    return jax.lax.while_loop(unfinished, advance, compat.vary_alike(loop))[3]


def beam_search(
    step: Step,
    carry: Carry,
    *,
    start: Array,
    end: int,
    max_length: int,
    width: int,
    length_penalty: float = 0.0,
    pad: int | None = None,
) -> Decoded:
    """Follow the W most probable beginnings at once.

        score(y) = log p(y) / ((5 + |y|) / 6)^α

    At each step the W · C extensions are ranked by log p. Those by `end` among the best W are
    complete, the best W others live on; after L steps the best W of all are complete. The W
    complete ones with the best scores are returned. Ties go to the one completed first, then to the
    better parent, then to the lower id. With α = 0 a beam of width 1 is `greedy`, and one as wide
    as the vocabulary finds the best of all sequences of at most two tokens.

    The search stops early, and exactly, as soon as in no example a living hypothesis can displace a
    complete one: log p never grows, so none can end above log p / ((5 + L) / 6)^α.

    Args:
      step: `(carry, tokens [B]) -> (carry, logits [B, C])`; it is mapped over hypotheses by
        `jax.vmap`.
      carry: pytree of arrays `[B, ...]`.
      start: integers `[B]`: the token that each sequence's first step reads.
      end: id of the token that ends a sequence.
      max_length: L, the longest sequence.
      width: W, at most C.
      length_penalty: α ≥ 0; 0 compares log-probabilities, larger values favour longer sequences.
      pad: id that fills the places after the end; None: `end`.

    Returns:
      A `Decoded` with tokens `[B, W, L]`, best first.

    Raises:
      ValueError: a shape does not fit; `end` is not in the vocabulary; `max_length` < 1; `width`
        lies outside 1 … C; or α < 0.

    Paper: Wu et al. 2016, https://arxiv.org/abs/1609.08144, section 7

    Example:
      >>> logits = jnp.log(jnp.array([0.4, 0.6]))
      >>> coin = lambda carry, tokens: (carry, jnp.broadcast_to(logits, (*tokens.shape, 2)))
      >>> found = beam_search(coin, (), start=jnp.array([0]), end=0, max_length=3, width=2)
      >>> print(found.tokens[0], found.lengths[0])  # probabilities 0.4 and 0.24
      [[0 0 0]
       [1 0 0]] [1 2]
    """
    carry, start, logits = _check(step, carry, start, end, max_length)
    _check_beam(logits.shape[1], width, length_penalty)
    L, W = max_length, width

    def normalised(scores: Array, length: Any) -> Array:
        return scores / ((5 + jnp.asarray(length, scores.dtype)) / 6) ** length_penalty

    def unfinished(beam: Any) -> Array:
        hope = normalised(beam.living.scores.max(axis=1), L)
        return (beam.time < L) & jnp.any(hope > beam.complete.scores.min(axis=1))

    def advance(beam: Any) -> Any:
        return _advance(step, beam, end, normalised)

    last = jnp.repeat(start[:, None], W, axis=1)
    nothing = no_tokens(last, L, end if pad is None else pad, logits.dtype)
    nothing = nothing._replace(scores=jnp.full_like(nothing.scores, -jnp.inf))
    beam = _Beam(
        time=jnp.int32(0),
        carry=jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], W, axis=1), carry),
        last=last,
        # One empty beginning, and no other
        living=nothing._replace(scores=written_at(nothing.scores, 0, jnp.zeros_like(last[:, 0]))),
        complete=nothing,
    )
    return jax.lax.while_loop(unfinished, advance, compat.vary_alike(beam)).complete


class _Beam(NamedTuple):
    """Living beginnings, scored by log p, and complete sequences, scored as returned; W of each."""

    time: Array
    carry: Carry  # of the living, [B, W, ...]
    last: Array  # their last tokens, [B, W]
    living: Decoded
    complete: Decoded


def _advance(
    step: Step, beam: _Beam, end: int, normalised: Callable[[Array, Array], Array]
) -> _Beam:
    W, L = beam.living.tokens.shape[1:]
    length = beam.time + 1
    carry, logits = jax.vmap(step, in_axes=1, out_axes=1)(beam.carry, beam.last)
    C = logits.shape[-1]

    extended = beam.living.scores[..., None] + _log_probabilities(logits)
    # At most W of these end
    scores, choice = jax.lax.top_k(rearrange(extended, "b w c -> b (w c)"), 2 * W)
    parent, token = choice // C, choice % C
    tokens = written_at(_take(beam.living.tokens, parent), beam.time, token)
    candidates = Decoded(tokens, scores, jnp.full_like(token, length))

    stops = (token == end) | (length == L)
    stopped = candidates._replace(scores=jnp.where(stops, normalised(scores, length), -jnp.inf))
    rivals = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new[:, :W]], axis=1), beam.complete, stopped
    )
    complete = _take(rivals, jax.lax.top_k(rivals.scores, W)[1])

    living = candidates._replace(scores=jnp.where(token == end, -jnp.inf, scores))
    kept = jax.lax.top_k(living.scores, W)[1]
    living, parent, last = _take((living, parent, token), kept)
    return _Beam(length, _take(carry, parent), last, living, complete)


def _take(tree: Any, choice: Array) -> Any:
    """From leaves `[B, W, ...]` take the entries `choice [B, W']` of the second axis."""

    def take(leaf: Array, choice: Array) -> Array:
        return leaf[jnp.arange(choice.shape[0])[:, None], choice]

    return jax.tree.map(
        lambda leaf: compat.automatically(take, jax.typeof(leaf).sharding.spec)(leaf, choice), tree
    )


def written_at(array: Array, place: Any, values: Array) -> Array:
    """`array [..., L]` with `values [...]` at one place of the last axis.

    Example:
      >>> written_at(jnp.zeros(3, jnp.int32), 1, jnp.int32(7))
      Array([0, 7, 0], dtype=int32)
    """
    here = jnp.arange(array.shape[-1], dtype=jnp.int32) == place
    here = here.reshape(*(1,) * values.ndim, array.shape[-1])
    return jnp.where(here, values[..., None].astype(array.dtype), array)


def zeros_like_batch(make: Callable[[], Any], batch: Array) -> Any:
    """Zeros of the shapes `[B, …]` that `make` gives, sharded over B as an array `[B]` is.

    Example:
      >>> zeros_like_batch(lambda: jnp.ones((2, 3)), jnp.arange(2)).shape
      (2, 3)
    """

    def spread(leaf: Any) -> Array:
        first = jnp.zeros_like(batch, leaf.dtype)
        return jnp.broadcast_to(first.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf.shape)

    return jax.tree.map(spread, jax.eval_shape(make))


def no_tokens(like: Array, max_length: int, pad: int, dtype: Any) -> Decoded:
    """Sequences of no tokens, one for each entry of an array of integers.

    Example:
      >>> no_tokens(jnp.arange(2), 3, 9, jnp.float32).tokens.tolist()
      [[9, 9, 9], [9, 9, 9]]
    """
    zeros = jnp.zeros_like(like)
    tokens = jnp.repeat(jnp.full_like(like, pad)[..., None], max_length, axis=-1)
    return Decoded(tokens, zeros.astype(dtypes.accumulator(dtype)), zeros)


def _log_probabilities(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(dtypes.accumulator(logits.dtype)), axis=-1)


def _check(
    step: Step, carry: Carry, start: Array, end: int, max_length: int
) -> tuple[Carry, Array, Any]:
    """Carry and start as a loop wants them, and the kind of the logits."""
    start = jnp.asarray(start)
    checks.assert_shapes(start=(start, "B"))
    checks.assert_integers(start=start)
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.shape(leaf)[:1] != start.shape:
            name = f"carry{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{name} must be [B, ...] with B = {start.shape[0]}, got shape {jnp.shape(leaf)}"
            )
    carry = jax.tree.map(jnp.asarray, carry)
    after, logits = jax.eval_shape(step, carry, start)
    described, got = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (carry, after)
    )
    if described != got:
        raise ValueError(f"step must return a carry like the one it gets: {described}, got {got}")
    checks.assert_shapes(start=(start, "B"), logits=(logits, "B C"))
    checks.assert_floating(logits=logits)
    checks.assert_in_range(
        "end", end, 0, logits.shape[1] - 1, "C - 1, the last id of the vocabulary"
    )
    checks.assert_positive(max_length=max_length)
    names = frozenset().union(*map(compat.varying_of, jax.tree.leaves((after, logits))))
    carry, start = compat.vary_over(names, compat.vary_alike((carry, start)))
    return carry, start.astype(jnp.int32), logits


def _check_beam(vocabulary: int, width: int, length_penalty: float) -> None:
    checks.assert_positive(width=width)
    if vocabulary < 2:
        raise ValueError(
            f"a beam needs at least two tokens to choose from, got logits for {vocabulary}"
        )
    if not 1 <= width <= vocabulary:
        raise ValueError(
            f"width must lie in 1 … {vocabulary} (C, the size of the vocabulary), got {width}"
        )
    if length_penalty < 0:
        raise ValueError(f"length_penalty must not be negative, got {length_penalty}")
