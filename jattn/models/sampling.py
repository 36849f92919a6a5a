"""Choose the next token of logits `[..., C]`: filters, and a draw.

A filter sets the logits of the tokens that it forbids to −inf. Filters compose as functions do.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, dtypes

Array = jax.Array
Options = Mapping[str, Any]


def top_k(logits: Array, k: int | Array) -> Array:
    """Keep the k greatest logits, and all that equal the k-th.

    Args:
      logits: `[..., C]`, floating point.
      k: an integer of at least 1; C or more keeps all.

    Raises:
      ValueError: k is not positive (traced: NaN), or not a single number.
      TypeError: k is not an integer, or logits are not floating point.

    Paper: Fan et al. 2018, https://arxiv.org/abs/1805.04833

    Example:
      >>> top_k(jnp.array([0.0, 3.0, 1.0, 2.0]), 2)
      Array([-inf,   3., -inf,   2.], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    k = _number("top_k", k)
    index = jnp.clip(k, 1, logits.shape[-1]) - 1
    least = jnp.take(jnp.sort(logits, axis=-1, descending=True), index, axis=-1)[..., None]
    return _where_allowed("top_k", k, jnp.where(logits < least, -jnp.inf, logits))


def top_p(logits: Array, p: float | Array) -> Array:
    """Keep the fewest tokens whose probabilities sum to at least p; among ties the lower ids.

    Args:
      logits: `[..., C]`, floating point.
      p: above 0, up to 1, which keeps all.

    Raises:
      ValueError: p lies outside (0, 1] (traced: NaN), or is not a single number.
      TypeError: p is not a number, or logits are not floating point.

    Paper: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751

    Example:
      >>> top_p(jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.6).round(1)
      Array([-inf, -0.7, -1.2], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    p = _number("top_p", p)
    below = _below_greatest(logits)
    order = jnp.argsort(below, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(below, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A sum that is p but for rounding has reached p; but one that is 1 may be so by rounding
    enough = p.astype(before.dtype) * (1 - 8 * jnp.finfo(before.dtype).eps)
    needless = (before >= enough) & (p < 1)
    needless = jnp.take_along_axis(needless, jnp.argsort(order, axis=-1), axis=-1)
    return _where_allowed("top_p", p, jnp.where(needless, -jnp.inf, logits))


def min_p(logits: Array, p: float | Array) -> Array:
    """Keep the tokens that are at least p times as probable as the most probable one.

    Args:
      logits: `[..., C]`, floating point.
      p: from 0, which keeps all, to 1.

    Raises:
      ValueError: p lies outside 0 … 1 (traced: NaN), or is not a single number.
      TypeError: p is not a number, or logits are not floating point.

    Paper: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082

    Example:
      >>> min_p(jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.5).round(1)
      Array([-inf, -0.7, -1.2], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    p = _number("min_p", p)
    ratios = jnp.exp(_below_greatest(logits))
    kept = jnp.where(ratios < p.astype(ratios.dtype), -jnp.inf, logits)
    return _where_allowed("min_p", p, kept)


def repetition_penalty(logits: Array, seen: Array, penalty: float | Array) -> Array:
    """Divide the positive logits of tokens that the text holds, multiply the negative ones.

    Args:
      logits: `[..., C]`, floating point.
      seen: boolean `[..., C]`, which tokens stand in the text.
      penalty: positive; above 1 they become less probable.

    Raises:
      ValueError: the penalty is not positive and finite (traced: NaN), or a shape does not fit.
      TypeError: the penalty is not a number, or logits are not floating point.

    Paper: Keskar et al. 2019, https://arxiv.org/abs/1909.05858

    Example:
      >>> repetition_penalty(jnp.array([1.0, 1.0, -1.0]), jnp.array([True, False, True]), 2.0)
      Array([ 0.5,  1. , -2. ], dtype=float32)
    """
    checks.assert_floating(logits=logits)
    checks.assert_shapes(logits=(logits, "... C"), seen=(seen, "... C"))
    penalty = _number("repetition_penalty", penalty)
    wide = logits.astype(dtypes.accumulator(logits.dtype))
    factor = penalty.astype(wide.dtype)
    penalised = jnp.where(wide > 0, wide / factor, wide * factor).astype(logits.dtype)
    return _where_allowed("repetition_penalty", penalty, jnp.where(seen, penalised, logits))


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
    # From the greatest on, so that no temperature makes all logits infinite, or one of them NaN
    below = _below_greatest(logits)
    temperature = _number("temperature", options["temperature"]).astype(below.dtype)
    logits = jnp.where((below == 0) | (below == -jnp.inf), below, below / temperature)
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
) -> dict[str, Array]:
    """The options of `choose` that are given, as arrays, after a check of their values.

    Raises:
      ValueError: a number lies outside its range, a filter or a key comes without a temperature, or
        a temperature without a key.
      TypeError: an option is not a number, or the key is none.

    Example:
      >>> checked(temperature=0.5, key=jax.random.key(0), top_k=None, top_p=0.75)
      {'temperature': Array(0.5, dtype=float32), 'top_p': Array(0.75, dtype=float32)}
    """
    drawing = {name: _number(name, given) for name, given in filters.items() if given is not None}
    always = {}
    if repetition_penalty is not None:
        always["repetition_penalty"] = _number("repetition_penalty", repetition_penalty)
    number, known = _number("temperature", temperature), checks.concrete(temperature)
    if known is None or known > 0:
        if key is None:
            raise ValueError(
                f"temperature = {temperature} draws tokens: pass key=jax.random.key(…)"
            )
        _check_key(key)
        return {"temperature": number} | drawing | always
    if drawing or key is not None:
        given = ", ".join([*drawing, *(["key"] if key is not None else [])])
        raise ValueError(f"{given} needs a temperature above 0, which draws tokens")
    return always


def are_allowed(options: Options) -> Array:
    """Whether all numbers lie in their ranges: those that are traced were not checked.

    Example:
      >>> are_allowed({"temperature": jnp.array(0.5), "top_p": jnp.array(1.5)})
      Array(False, dtype=bool)
    """
    allowed = [_RANGES[name][0](number) for name, number in options.items()]
    return functools.reduce(jnp.logical_and, allowed, jnp.array(True))


_RANGES: Mapping[str, Any] = {
    "temperature": (lambda t: (t >= 0) & (t < jnp.inf), "0 or more, and finite"),
    "top_k": (lambda k: k >= 1, "at least 1"),
    "top_p": (lambda p: (p > 0) & (p <= 1), "above 0 and at most 1"),
    "min_p": (lambda p: (p >= 0) & (p <= 1), "from 0 to 1"),
    "repetition_penalty": (lambda p: (p > 0) & (p < jnp.inf), "positive and finite"),
}


def _number(name: str, given: Any) -> Array:
    """A number as an array, after a check of its kind and, where it is known, of its value."""
    dtype = given.dtype if hasattr(given, "dtype") else np.asarray(given).dtype
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    if not (is_integer or (name != "top_k" and jnp.issubdtype(dtype, jnp.floating))):
        wanted = "an integer" if name == "top_k" else "a real number"
        raise TypeError(f"{name} must be {wanted}, got {given!r}")
    if np.ndim(given):
        raise ValueError(f"{name} must be one number, got shape {np.shape(given)}")
    allowed, expected = _RANGES[name]
    known = checks.concrete(given)
    if known is not None and not allowed(known):
        raise ValueError(f"{name} must be {expected}, got {given!r}")
    if name == "top_k":
        return dtypes.lengths(given if known is None else min(int(known), 2**31 - 1))
    return jnp.asarray(given, jnp.result_type(float))


def _where_allowed(name: str, number: Array, logits: Array) -> Array:
    return jnp.where(_RANGES[name][0](number), logits, jnp.nan)


def _below_greatest(logits: Array) -> Array:
    """Logits minus the greatest of them, which may be infinite."""
    logits = logits.astype(dtypes.accumulator(logits.dtype))
    greatest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == greatest, 0, logits - greatest)


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (is_key and key.ndim == 0) and not (dtype == jnp.uint32 and key.ndim == 1):
        raise TypeError(f"key must be one random key, such as jax.random.key(0), got {key!r}")
