"""Choose the next token of logits `[..., C]`: filters, and a draw.

A filter sets the logits of the tokens that it forbids to −inf. Filters compose as functions do.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jattn.functional import checks, dtypes

Array = jax.Array
Options = Mapping[str, Any]


def top_k(logits: Array, k: int | Array) -> Array:
    """Keep the k greatest logits, and all that equal the k-th.

    Args:
      logits: `[..., C]`, floating point.
      k: at least 1; C or more keeps all.

    Raises:
      ValueError: k is not positive.
      TypeError: logits are not floating point.

    Paper: Fan et al. 2018, https://arxiv.org/abs/1805.04833

    Example:
      >>> top_k(jnp.array([0.0, 3.0, 1.0, 2.0]), 2)
      Array([-inf,   3., -inf,   2.], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    checks.assert_in_range("top_k", k, 1, 2**31 - 1, "k, the number of tokens kept")
    C = logits.shape[-1]
    index = jnp.clip(jnp.asarray(k, jnp.int32), 1, C) - 1
    least = jnp.take(jnp.sort(logits, axis=-1, descending=True), index, axis=-1)[..., None]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: Array, p: float | Array) -> Array:
    """Keep the fewest tokens whose probabilities sum to at least p; among ties the lower ids.

    Args:
      logits: `[..., C]`, floating point.
      p: above 0, up to 1, which keeps all.

    Raises:
      ValueError: p lies outside (0, 1].
      TypeError: logits are not floating point.

    Paper: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751

    Example:
      >>> top_p(jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.6).round(1)
      Array([-inf, -0.7, -1.2], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    _check("top_p", p, lambda p: 0 < p <= 1, "above 0 and at most 1")
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < p).at[..., 0].set(True) | jnp.asarray(p >= 1)  # sums round up to 1
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def min_p(logits: Array, p: float | Array) -> Array:
    """Keep the tokens that are at least p times as probable as the most probable one.

    Args:
      logits: `[..., C]`, floating point.
      p: from 0, which keeps all, to 1.

    Raises:
      ValueError: p lies outside 0 … 1.
      TypeError: logits are not floating point.

    Paper: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082

    Example:
      >>> min_p(jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.5).round(1)
      Array([-inf, -0.7, -1.2], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    _check("min_p", p, lambda p: 0 <= p <= 1, "from 0 to 1")
    probabilities = jax.nn.softmax(logits, axis=-1)
    greatest = probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < p * greatest, -jnp.inf, logits)


def repetition_penalty(logits: Array, seen: Array, penalty: float | Array) -> Array:
    """Divide the positive logits of tokens that the text holds, multiply the negative ones.

    Args:
      logits: `[..., C]`, floating point.
      seen: boolean `[..., C]`, which tokens stand in the text.
      penalty: positive; above 1 they become less probable.

    Raises:
      ValueError: the penalty is not positive, or a shape does not fit.
      TypeError: logits are not floating point.

    Paper: Keskar et al. 2019, https://arxiv.org/abs/1909.05858

    Example:
      >>> repetition_penalty(jnp.array([1.0, 1.0, -1.0]), jnp.array([True, False, True]), 2.0)
      Array([ 0.5,  1. , -2. ], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    checks.assert_shapes(logits=(logits, "... C"), seen=(seen, "... C"))
    _check("repetition_penalty", penalty, lambda penalty: 0 < penalty, "positive")
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalised, logits)


_FILTERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def choose(logits: Array, seen: Array | None, keys: Array | None, options: Options) -> Array:
    """The next token of each example.

    In this order, each on what the former left: repetition penalty, temperature, top-k, top-p,
    min-p. Without a temperature the most probable token is taken, and of several the lowest id.

    Args:
      logits: `[B, C]`.
      seen: boolean `[B, C]`, which tokens stand in the text; with a repetition penalty alone.
      keys: random keys `[B]`; with a temperature alone.
      options: of `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` those that are
        wanted.

    Returns:
      int32 `[B]`.

    Example:
      >>> logits, seen = jnp.array([[0.0, 3.0, 2.9]]), jnp.array([[False, True, False]])
      >>> choose(logits, seen, None, {"repetition_penalty": 1.5})
      Array([2], dtype=int32)
    """
    logits = logits.astype(dtypes.accumulator(logits.dtype))
    if seen is not None:
        logits = repetition_penalty(logits, seen, options["repetition_penalty"])
    if "temperature" not in options:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / options["temperature"]
    for name, keep in _FILTERS.items():
        if name in options:
            logits = keep(logits, options[name])
    draw: Any = jax.vmap(jax.random.categorical)
    return draw(keys, logits).astype(jnp.int32)


def checked(
    temperature: float | Array = 0.0,
    key: Array | None = None,
    *,
    repetition_penalty: float | Array | None = None,
    **filters: Any,
) -> dict[str, Any]:
    """The options of `choose` that are given, after a check of their values.

    Raises:
      ValueError: a number lies outside its range, a filter comes without a temperature, or a
        temperature without a key.

    Example:
      >>> checked(temperature=0.5, key=jax.random.key(0), top_k=None, top_p=0.9)
      {'temperature': 0.5, 'top_p': 0.9}
    """
    _check("temperature", temperature, lambda t: 0 <= t < jnp.inf, "0 or more")
    options = {name: number for name, number in filters.items() if number is not None}
    known = checks.concrete(temperature)
    if known is None or known > 0:
        if key is None:
            raise ValueError(
                f"temperature = {temperature} draws tokens: pass key=jax.random.key(…)"
            )
        options = {"temperature": temperature} | options
    elif options or key is not None:
        given = ", ".join([*options, *(["key"] if key is not None else [])])
        raise ValueError(f"{given} needs a temperature above 0, which draws tokens")
    if repetition_penalty is not None:
        _check("repetition_penalty", repetition_penalty, lambda p: p > 0, "positive")
        options["repetition_penalty"] = repetition_penalty
    for name, keep in _FILTERS.items():  # each checks its own number
        if name in options:
            keep(jnp.zeros(2), options[name])
    return options


def _check(name: str, number: Any, is_allowed: Any, expected: str) -> None:
    known = checks.concrete(number)
    if known is not None and not (known.ndim == 0 and is_allowed(known)):
        raise ValueError(f"{name} must be {expected}, got {number!r}")
