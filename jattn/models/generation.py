"""Continue prompts with a causal language model: one compiled loop, or token by token."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.functional import checks, compat, dtypes
from jattn.functional.pytree import named_tuple
from jattn.models import sampling
from jattn.models.decoding import Decoded, no_tokens, written_at, zeros_like_batch

Array = jax.Array


def generate(
    model: Any,
    tokens: Array,
    *,
    lengths: Array | None = None,
    left_padded: bool = False,
    max_new_tokens: int = 20,
    stop: int | Sequence[int] | None = None,
    pad: int | None = None,
    temperature: float | Array = 0.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
    repetition_penalty: float | Array | None = None,
    key: Array | None = None,
) -> Decoded:
    """Continue prompts, in one compiled loop that ends as soon as every text has ended.

    Each text is what it would be alone, whatever stands beside it and however it is padded. A new
    shape of tokens, or another `max_new_tokens`, compiles anew: pad prompts to few lengths.

    Args:
      model: a `CausalLM`.
      tokens: prompts, ids `[B, T]`.
      lengths: integers `[B]` from 1 to T, how many tokens of each prompt are real; the others may
        be anything. None: all.
      left_padded: whether the real ones are the last ones, not the first.
      max_new_tokens: L, the greatest number of tokens to add. A rope that depends on the length
        takes that of the prompt and L.
      stop: an id, or several, each of which ends a text; None: those of the model's config; ():
        none.
      pad: id that fills the places after the end; None: that of the config, or else the first of
        `stop`, or 0.
      temperature: 0 takes the most probable token; above, tokens are drawn from
        softmax(logits / temperature).
      top_k, top_p, min_p: which tokens may be drawn, as in `models.sampling`; None: all.
      repetition_penalty: of tokens that stand in prompt or text; None: none. It counts without a
        temperature, too.
      key: a JAX random key, with a temperature. (The first row gets what it gets alone.)

    Returns:
      A `Decoded`: tokens `[B, L]`, the stop token included; scores `[B]`, the sum of their
      log-probabilities by the model's own logits; and lengths `[B]`.

    Raises:
      ValueError: a shape does not fit; an id, a length or a number lies outside its range (of what
        is traced: scores are NaN, and tokens mean nothing); a filter comes without a temperature.
      TypeError: tokens or lengths are not integers.

    Example:
      >>> from jattn import models
      >>> config = models.causal_lm.Config(11, features=8, num_layers=1, num_heads=2, stop=(2,))
      >>> model = models.CausalLM(config, rngs=nnx.Rngs(0))
      >>> prompts, lengths = jnp.array([[3, 1, 4], [5, 0, 0]]), jnp.array([3, 1])
      >>> options = {"temperature": 0.8, "top_p": 0.9, "key": jax.random.key(0)}
      >>> generate(model, prompts, lengths=lengths, max_new_tokens=4, **options).tokens.shape
      (2, 4)
    """
    arrays, options, static = _checked(
        model, tokens, lengths=lengths, left_padded=left_padded, max_new_tokens=max_new_tokens,
        stop=stop, pad=pad, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, key=key,
    )  # fmt: skip
    return _generate(*nnx.split(model), *arrays, options, **static)


def stream(model: Any, tokens: Array, **options: Any) -> Iterator[np.ndarray]:
    """Continue prompts and yield the tokens `[B]` of each step as soon as they are chosen.

    Texts that have ended yield `pad`. The step is compiled once; memory does not grow.

    Args:
      model, tokens, **options: those of `generate`.

    Returns:
      An iterator over at most `max_new_tokens` arrays of int32, which ends when every text has.

    Raises:
      ValueError, TypeError: as `generate`, at the call.

    Example:
      >>> from jattn import models
      >>> config = models.causal_lm.Config(11, features=8, num_layers=1, num_heads=2)
      >>> model = models.CausalLM(config, rngs=nnx.Rngs(0))
      >>> [tokens.shape for tokens in stream(model, jnp.array([[3, 1, 4]]), max_new_tokens=2)]
      [(1,), (1,)]
    """
    given = inspect.signature(generate).bind(model, tokens, **options)
    given.apply_defaults()
    arrays, options, static = _checked(**given.arguments)
    split = nnx.split(model)
    loop = _prepare(*split, *arrays, options, **static)

    def steps(loop: _Loop) -> Iterator[np.ndarray]:
        for _ in range(static["max_new_tokens"]):
            loop, chosen = _advance_once(*split, loop, options, **static)
            yield np.asarray(chosen)
            if loop.ended.all():
                return

    return steps(loop)


@named_tuple
class _Loop(NamedTuple):
    """What one step hands to the next."""

    time: Array
    caches: Any
    last: Array  # the token that the next step reads, [B]
    rope_length: Array | None  # [B]
    seen: Array | None  # which tokens stand in the text, [B, C], for a repetition penalty
    keys: Array | None  # [B]
    decoded: Decoded
    ended: Array  # [B]


def _checked(
    model: Any, tokens: Array, *, lengths: Array | None, left_padded: bool, max_new_tokens: int,
    stop: Any, pad: int | None, key: Array | None, **choosing: Any,
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The arrays, the numbers by which tokens are chosen, and what a program is compiled for."""
    checks.assert_positive(max_new_tokens=max_new_tokens)
    checks.assert_bool(left_padded=left_padded)
    T = checks.assert_shapes(tokens=(tokens, "B T"))["T"]
    if T == 0:
        raise ValueError("tokens must hold at least one token for each prompt, got none")
    checks.assert_integers(tokens=tokens)
    if lengths is not None:
        checks.assert_shapes(tokens=(tokens, "B T"), lengths=(lengths, "B"))
        checks.assert_integers(lengths=lengths)
        checks.assert_in_range("lengths", lengths, 1, T, "T, the number of tokens")
        tokens = _without_padding(tokens, lengths, left_padded)
        lengths = dtypes.lengths(lengths)
    elif left_padded:
        raise ValueError("left_padded needs lengths: how many tokens of each prompt are real")
    tokens = checks.validated_tokens("tokens", tokens, model.config.vocabulary)
    ends, pad = _ends(model.config, stop, pad)
    static = {
        "left_padded": left_padded, "max_new_tokens": max_new_tokens, "ends": ends, "pad": pad,
    }  # fmt: skip
    options = sampling.checked(key=key, **choosing)
    return (tokens, lengths, key), options, static


def _without_padding(tokens: Any, lengths: Any, left_padded: bool) -> Any:
    """The tokens with 0, which is an id, in place of those that are not real."""
    known = checks.concrete(lengths)
    # What is NumPy's stays so, on whatever device JAX computes: its ids are checked
    xp: Any = jnp if isinstance(tokens, jax.Array) or known is None else np
    tokens, sizes = xp.asarray(tokens), xp.asarray(lengths if known is None else known)
    places = xp.arange(tokens.shape[1], dtype=np.int32)
    places = places[::-1] if left_padded else places
    return xp.where(places[None] < sizes[:, None].astype(np.int32), tokens, 0)


def _ends(config: Any, stop: Any, pad: int | None) -> tuple[tuple[int, ...], int]:
    """The ids that end a text, and the one that fills what follows."""
    stop = config.stop if stop is None else stop
    ends = tuple(np.atleast_1d(stop)) if np.size(stop) else ()
    pad = config.pad if pad is None else pad
    pad = (ends[0] if ends else 0) if pad is None else pad
    for name, token in [*(("stop", token) for token in ends), ("pad", pad)]:
        if np.ndim(token):
            must = f"{name} must be one id" + ", or a list of ids" * (name == "stop")
            raise ValueError(f"{must}, got {token!r}")
        checks.validated_tokens(name, token, config.vocabulary)
    return tuple(map(int, ends)), int(pad)


_compiled = functools.partial(
    jax.jit, static_argnums=0, static_argnames=("left_padded", "max_new_tokens", "ends", "pad")
)


@_compiled
def _generate(
    graphdef: Any, state: Any, tokens: Array, lengths: Any, key: Any, options: Any, **static: Any
) -> Decoded:
    model = nnx.merge(graphdef, state)
    loop = _prepared(model, tokens, lengths, key, options, **static)

    def unfinished(loop: _Loop) -> Array:
        return (loop.time < static["max_new_tokens"]) & ~jnp.all(loop.ended)

    def advance(loop: _Loop) -> _Loop:
        return _advanced(model, loop, options, **static)[0]

    found: _Loop = jax.lax.while_loop(unfinished, advance, compat.vary_alike(loop))
    return found.decoded


@_compiled
def _prepare(graphdef: Any, state: Any, *given: Any, **static: Any) -> _Loop:
    return _prepared(nnx.merge(graphdef, state), *given, **static)


@functools.partial(_compiled, donate_argnums=2)
def _advance_once(
    graphdef: Any, state: Any, loop: _Loop, options: Any, **static: Any
) -> tuple[_Loop, Array]:
    return _advanced(nnx.merge(graphdef, state), loop, options, **static)


def _prepared(
    model: Any, tokens: Array, lengths: Array | None, key: Array | None, options: Any,
    *, left_padded: bool, max_new_tokens: int, pad: int, **_: Any,
) -> _Loop:  # fmt: skip
    """Read all of the prompts but their last tokens, which the first step reads."""
    B, T = tokens.shape
    sizes = jnp.full_like(tokens[:, 0], T) if lengths is None else lengths
    places = jnp.arange(T, dtype=jnp.int32)[None]
    if left_padded:
        tokens = jnp.take_along_axis(tokens, (places - sizes[:, None]) % T, axis=1)
    last = jnp.take_along_axis(tokens, sizes[:, None] - 1, axis=1)[:, 0]
    # What was traced was not checked: an id outside the vocabulary makes all logits NaN
    is_allowed = (1 <= sizes) & (sizes <= T) & sampling.are_allowed(options)
    last = jnp.where(is_allowed, last, model.config.vocabulary)
    rope_length = sizes + max_new_tokens if model.config.rope.depends_on_length else None
    capacity = T - 1 + max_new_tokens
    caches = zeros_like_batch(functools.partial(model.empty_cache, B, capacity), tokens[:, 0])
    if T != 1:  # T may be a symbol of `jax.export`
        _, caches = model(
            tokens[:, :-1], lengths=None if lengths is None else sizes - 1, cache=caches,
            rope_length=rope_length,
        )  # fmt: skip
    seen, keys = None, None
    if "repetition_penalty" in options:
        C = model.config.vocabulary
        real = jnp.where(places < sizes[:, None], tokens, C)  # C is dropped
        seen = jax.vmap(lambda ids: jnp.zeros(C, bool).at[ids].set(True, mode="drop"))(real)
    if key is not None:
        rows = compat.automatically(lambda _: jnp.arange(B), jax.typeof(last).sharding.spec)(last)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    dtype = dtypes.accumulator(model.embedding.embedding.dtype)
    nothing = no_tokens(last, max_new_tokens, pad, dtype)
    ended = jnp.zeros_like(last, bool)
    return _Loop(jnp.int32(0), caches, last, rope_length, seen, keys, nothing, ended)


def _advanced(
    model: Any, loop: _Loop, options: Any, *, ends: tuple[int, ...], pad: int, **_: Any
) -> tuple[_Loop, Array]:
    """The loop after one more step, and the tokens that it chose."""
    caches, logits = model.step(loop.last, loop.caches, loop.rope_length)
    keys = None
    if loop.keys is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(loop.keys, loop.time)
    chosen = jnp.where(loop.ended, pad, sampling.choose(logits, loop.seen, keys, options))
    tokens, scores, lengths = loop.decoded
    gains = jax.nn.log_softmax(logits.astype(scores.dtype), axis=-1)
    gain = jnp.take_along_axis(gains, chosen[:, None], axis=1)[:, 0]
    now_ended = functools.reduce(jnp.logical_or, [chosen == end for end in ends], loop.ended)
    decoded = Decoded(
        written_at(tokens, loop.time, chosen),
        scores + jnp.where(loop.ended, 0, gain),
        jnp.where(loop.ended, lengths, loop.time + 1),
    )
    seen = loop.seen
    if seen is not None:
        seen = seen | jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool)
    advanced = _Loop(
        loop.time + 1, caches, chosen, loop.rope_length, seen, loop.keys, decoded, now_ended
    )
    return advanced, chosen
