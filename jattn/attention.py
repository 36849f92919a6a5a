"""attend: check the arguments, choose a kernel, call it."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional import checks, masks, modifiers, scores
from jattn.functional.blocks import Block
from jattn.kernels import blockwise, cudnn, dense
from jattn.kernels.arrays import head_scores, heads_first

Array = jax.Array
Score = Callable[[Array, Array], Array]
MaskLike = masks.Mask | Array | np.ndarray | Callable[..., Array] | None
ModifierLike = modifiers.Modifier | Callable[..., Array] | Sequence[Any] | None

KERNELS: Mapping[str, Callable[..., tuple[Array, Array | None, Array | None]]] = MappingProxyType(
    {"dense": dense.attend, "blockwise": blockwise.attend, "cudnn": cudnn.attend}
)
# From so many scores on blockwise is preferred: on two CPU cores it took up to 1.3 times as long as dense at 2**20
# scores, and from 2**21 on dense took 1.0 to 3.8 times as long as it. Outside jit its loops would be compiled anew in
# every call, so there it is preferred only where the memory of dense would hurt.
MANY_SCORES, MANY_SCORES_OUTSIDE_JIT = 2**21, 2**27


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: Score = scores.scaled_dot_product,
    mask: MaskLike = None,
    modifier: ModifierLike = None,
    positions: tuple[Array, Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Any:
    """Attention pooling: weights(score(query, key), mask) · value.

        output[t, n] = Σ_s softmax_s(modifier(score(query[t, n], key[s, h // G]))) · value[s, h // G]  over allowed s

    A query with no allowed key gives output 0 and log-sum-exp −inf. Keys that no query may attend to, and queries that
    may attend to nothing, do not reach output or gradients, whatever they hold.

    Args:
      query: `[..., T, N, H]`, floating point; float16 and bfloat16 are accumulated in float32.
      key: `[..., S, K, H']`; N is a multiple of K, and query head n uses key head n // (N / K).
      value: `[..., S, K, V]`.
      score: `(query [..., T, H], key [..., S, H']) -> [..., T, S]`, pairwise; see `jattn.scores`.
      mask: a value of `jattn.masks`, a callable `(b, h, q_idx, k_idx) -> bool`, or a boolean array broadcastable to
        `[..., N, T, S]`. True = may attend.
      modifier: a value of `jattn.modifiers`, a callable `(score, b, h, q_idx, k_idx) -> score`, or a tuple of these,
        applied from left to right before the mask.
      positions: query positions `[T]` or `[..., T]` and key positions `[S]` or `[..., S]`, integers; default 0, 1, ….
        What masks and modifiers see as `q_idx` and `k_idx`.
      dropout_rate: probability, from 0 to 1, with which a weight is dropped after the softmax.
      dropout_key: a JAX random key, needed if `dropout_rate` > 0.
      implementation: "dense", the specification, which has derivatives of every kind and order; "blockwise", in
        linear memory, and "cudnn", NVIDIA's, which have first-order reverse-mode derivatives; None chooses one of the
        first two by the number of scores. For `jax.jvp` or a Hessian ask for "dense".
      return_lse: also return the log-sum-exp of the scores, `[..., T, N]`, before dropout.
      return_weights: also return the weights, `[..., N, T, S]`, before dropout.

    Returns:
      Output `[..., T, N, V]`, or a tuple of it with what else was asked for, in the order of the arguments.

    Raises:
      ValueError: shapes, lengths or positions do not fit; dropout without a key; an unknown implementation.
      TypeError: query, key or value are not floating point, or a mask is not boolean.
      NotImplementedError: the kernel asked for cannot honour the request.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> x = jnp.ones((2, 5, 3, 4))
      >>> attend(x, x, x, mask=masks.causal(), modifier=modifiers.soft_cap(30.0)).shape
      (2, 5, 3, 4)
    """
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    sizes = _check_operands(query=query, key=key, value=value)
    dtype = jnp.result_type(query, key, value)
    _check_score(score, query, key)
    prepared = _prepare(sizes, mask, modifier, positions)
    _check_dropout(dropout_rate, dropout_key)
    output, lse, weights = _first_that_can(
        _candidates(implementation, query, key),
        *(array.astype(dtype) for array in (query, key, value)),
        score=score,
        **prepared,
        dropout_rate=float(dropout_rate),
        dropout_key=dropout_key,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    extras = ([lse] if return_lse else []) + ([weights] if return_weights else [])
    return (output, *extras) if extras else output


def attention_weights(
    query: Array,
    key: Array,
    *,
    score: Score = scores.scaled_dot_product,
    mask: MaskLike = None,
    modifier: ModifierLike = None,
    positions: tuple[Array, Array] | None = None,
) -> Array:
    """The weights alone: softmax(modifier(score(query, key))) over the allowed keys.

    Args, errors and meaning are those of `attend`.

    Returns:
      `[..., N, T, S]`, in at least float32; a row with no allowed key is zeros.

    Example:
      >>> attention_weights(jnp.zeros((1, 1, 3)), jnp.zeros((2, 1, 3)))
      Array([[[0.5, 0.5]]], dtype=float32)
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    sizes = _check_operands(query=query, key=key)
    dtype = jnp.result_type(query, key)
    _check_score(score, query, key)
    prepared = _prepare(sizes, mask, modifier, positions)
    block = Block(sizes["..."], sizes["N"], (0, sizes["T"]), (0, sizes["S"]), prepared["positions"])
    allowed = None if prepared["mask"] is None else prepared["mask"].rule(block)
    weights, _ = dense.attention_weights(
        query.astype(dtype), key.astype(dtype),
        score=score, allowed=allowed, modifiers=prepared["modifiers"], block=block,
    )  # fmt: skip
    return weights


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Combine attention over disjoint parts of the keys into attention over all of them, exactly.

        lse = log Σ_i exp(lse_i),  output = Σ_i exp(lse_i − lse) · output_i

    Args:
      parts: pairs of output `[..., T, N, V]` and log-sum-exp `[..., T, N]`, as `attend(…, return_lse=True)` gives.

    Returns:
      The combined pair; 0 and −inf where every part is empty.

    Raises:
      ValueError: there is no part, or their shapes differ.

    Paper: Dao et al. 2022, https://arxiv.org/abs/2205.14135

    Example:
      >>> q, k = jnp.ones((1, 1, 2)), jnp.arange(8.0).reshape(4, 1, 2)
      >>> halves = [attend(q, half, half, return_lse=True) for half in (k[:2], k[2:])]
      >>> bool(jnp.allclose(merge(halves)[0], attend(q, k, k)))
      True
    """
    parts = [(jnp.asarray(output), jnp.asarray(lse)) for output, lse in parts]
    if not parts:
        raise ValueError("parts must hold at least one (output, lse) pair, got none")
    for index, (output, lse) in enumerate(parts):
        checks.floating(**{f"the output of parts[{index}]": output, f"the lse of parts[{index}]": lse})
        if output.shape != parts[0][0].shape or lse.shape != output.shape[:-1]:
            raise ValueError(
                f"parts[{index}] must be an output {parts[0][0].shape} and an lse without its last axis, "
                f"got {output.shape} and {lse.shape}"
            )
    lses = jnp.stack([lse for _, lse in parts])
    maximum = jax.lax.stop_gradient(lses.max(0))
    shares = jnp.exp(lses - jnp.where(jnp.isneginf(maximum), 0, maximum))
    total = shares.sum(0)
    divisor = jnp.where(total == 0, 1, total)
    outputs = jnp.stack([output for output, _ in parts])
    seen = jnp.where(shares[..., None] > 0, outputs.astype(shares.dtype), 0)  # what an empty part holds reaches nothing
    output = (seen * (shares / divisor)[..., None]).sum(0)
    return output.astype(outputs.dtype), jnp.where(total == 0, -jnp.inf, maximum + jnp.log(divisor))


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` with the rules of `attend`: same signature, same numbers; change one import.

    Two things differ. A query that may attend to nothing gives 0, where jax.nn gives a mean of values; and what hidden
    rows hold never reaches output or gradients. Any leading axes are allowed, and value may have its own width.

    Args:
      query: `[..., T, N, H]`.
      key: `[..., S, K, H]`.
      value: `[..., S, K, V]`.
      bias: added to the scaled scores, broadcastable to `[..., N, T, S]`.
      mask: boolean, broadcastable to `[..., N, T, S]`; True = may attend.
      scale: factor of the scores, default 1 / √H.
      is_causal: only keys with index ≤ the query's index.
      query_seq_lengths: integers `[...]`; queries beyond are hidden and give 0.
      key_value_seq_lengths: integers `[...]`; keys beyond are hidden.
      local_window_size: keys seen to the left and to the right, or one number for both.
      implementation: a kernel's name; "xla" stands for the library's own choice.
      return_residual: also return the log-sum-exp `[..., T, N]`.

    Raises:
      As `attend`.

    Example:
      >>> x = jnp.ones((2, 5, 3, 4))
      >>> bool(jnp.allclose(dot_product_attention(x, x, x), jax.nn.dot_product_attention(x, x, x)))
      True
    """
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    _check_operands(query=query, key=key, value=value)
    parts: list[masks.Mask] = [] if mask is None else [masks.dense(mask)]
    if is_causal:
        parts.append(masks.causal())
    if local_window_size is not None:
        if np.shape(local_window_size) not in {(), (2,)}:
            raise ValueError(f"local_window_size must be an integer or a pair of them, got {local_window_size}")
        left, right = np.broadcast_to(np.asarray(local_window_size), 2).tolist()
        parts.append(masks.sliding_window(left, right))
    if key_value_seq_lengths is not None:
        parts.append(masks.padding(_check_lengths("key_value_seq_lengths", key_value_seq_lengths, key)))
    if query_seq_lengths is not None:
        lengths = _check_lengths("query_seq_lengths", query_seq_lengths, query)
        real = jnp.arange(query.shape[-3], dtype=jnp.int32) < lengths[..., None].astype(jnp.int32)
        parts.append(masks.dense(rearrange(real, "... T -> ... 1 T 1")))
    return attend(
        query, key, value,
        score=functools.partial(scores.scaled_dot_product, scale=scale),
        mask=functools.reduce(operator.and_, parts) if parts else None,
        modifier=None if bias is None else modifiers.bias(bias),
        implementation=None if implementation == "xla" else implementation,
        return_lse=return_residual,
    )  # fmt: skip


def _check_lengths(name: str, lengths: Any, rows: Array) -> Array:
    checks.integers(**{name: lengths})
    if np.shape(lengths) != rows.shape[:-3]:
        raise ValueError(f"{name} must have one length per example, shape {rows.shape[:-3]}, got {np.shape(lengths)}")
    checks.in_range(name, lengths, 0, rows.shape[-3], "the length of the array")
    return jnp.asarray(lengths)


def _check_operands(**operands: Array) -> checks.Sizes:
    checks.floating(**operands)
    patterns = {"query": "... T N H", "key": "... S K H'", "value": "... S K V"}
    sizes = checks.shapes(swap_axes=(-3, -2), **{name: (array, patterns[name]) for name, array in operands.items()})
    N, K, T, S = (sizes[letter] for letter in "NKTS")
    if min(N, K, sizes["H"], sizes["H'"]) < 1:
        raise ValueError(f"heads and head width must be at least 1, got shapes {[x.shape for x in operands.values()]}")
    if N % K:
        swaps = {"query": (T, K), "key and value": (N, S), "all of them": (T, S)}
        fitting = [names for names, (queries, keys) in swaps.items() if queries and keys and queries % keys == 0]
        hint = ""
        if fitting:
            hint = f"; it would fit with axes -3 and -2 of {' or '.join(fitting)} swapped: [..., length, heads, width]"
        raise ValueError(f"the heads of query (N = {N}) must be a multiple of the heads of key (K = {K}){hint}")
    return sizes


def _check_score(score: Any, query: Array, key: Array) -> None:
    """Evaluate the score on shapes alone, so that what it does not take is known before anything runs."""
    if not callable(score):
        raise TypeError(f"score must be callable, (query, key) -> scores, got {type(score).__name__}")
    try:
        jax.eval_shape(lambda q, k: head_scores(score, heads_first(q), heads_first(k)), query, key)
    except (TypeError, ValueError) as error:
        message = f"score does not take query {query.shape} and key {key.shape}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


def _prepare(sizes: checks.Sizes, mask: Any, modifier: Any, positions: Any) -> dict[str, Any]:
    lead, N, T, S = sizes["..."], sizes["N"], sizes["T"], sizes["S"]
    mask = as_mask(mask)
    listed = modifier if isinstance(modifier, (tuple, list)) else () if modifier is None else (modifier,)
    prepared = tuple(_as_modifier(part) for part in listed)

    def check(N: int, T: int, S: int) -> tuple[Array, Array] | None:
        if mask is not None:
            mask.check(lead, N, T, S)
        for part in prepared:
            part.check(lead, N, T, S, positions is not None)
        return _as_positions(positions, lead, T, S)

    try:
        return {"mask": mask, "modifiers": prepared, "positions": check(N, T, S)}
    except ValueError as error:
        try:
            check(T, N, sizes["K"])
        except ValueError:
            raise error from None
        hint = "it would fit with axes -3 and -2 of the operands swapped: the layout is [..., length, heads, width]"
        raise ValueError(f"{error}; {hint}") from None


def as_mask(mask: MaskLike) -> masks.Mask | None:
    """Whatever `attend` takes for a mask, as a value of `jattn.masks`; None stays None.

    Example:
      >>> as_mask(lambda b, h, q_idx, k_idx: q_idx >= k_idx)
      mask_mod(<lambda>)
    """
    if mask is None or isinstance(mask, masks.Mask):
        return mask
    if hasattr(mask, "dtype") or isinstance(mask, (list, tuple)):
        return masks.dense(mask)
    _check_called("mask", mask, masks)
    return masks.mask_mod(mask)


def _as_modifier(modifier: Any) -> modifiers.Modifier:
    if isinstance(modifier, modifiers.Modifier):
        return modifier
    if not callable(modifier):
        kind = "jattn.modifiers.bias" if hasattr(modifier, "dtype") else "a callable"
        raise TypeError(f"modifier must be callable or a tuple of callables, got {type(modifier).__name__}: use {kind}")
    _check_called("modifier", modifier, modifiers)
    return modifiers.ScoreMod(modifier)


def _check_called(argument: str, function: Any, module: Any) -> None:
    """Parentheses are easily forgotten: `mask=masks.causal`."""
    if getattr(function, "__module__", None) == module.__name__:
        raise TypeError(f"{argument} is the function {function.__name__} itself: call it, {function.__name__}(…)")


def _as_positions(positions: Any, lead: tuple[int, ...], T: int, S: int) -> tuple[Array, Array] | None:
    if positions is None:
        return None
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise ValueError("positions must be a pair (q_positions, k_positions)")
    for name, array, length in zip(("query", "key"), positions, (T, S), strict=True):
        checks.index(**{f"{name} positions": array})
        if np.shape(array) not in {(length,), (*lead, length)}:
            expected = f"{(length,)} or {(*lead, length)}"
            raise ValueError(f"{name} positions must have shape {expected}, got {np.shape(array)}")
    return jnp.asarray(positions[0], jnp.int32), jnp.asarray(positions[1], jnp.int32)


def _check_dropout(rate: Any, key: Any) -> None:
    checks.probability(dropout_rate=rate)
    if rate > 0 and key is None:
        raise ValueError(f"dropout_rate = {rate} needs a dropout_key, got None")
    if key is not None:
        try:
            jax.random.key_data(key)
        except TypeError:
            raise TypeError(f"dropout_key must be a JAX random key (jax.random.key), got {key!r}") from None


def _candidates(implementation: str | None, query: Array, key: Array) -> list[Callable[..., Any]]:
    if implementation is not None:
        if not isinstance(implementation, str) or implementation not in KERNELS:
            raise ValueError(f"implementation must be None or one of {sorted(KERNELS)}, got {implementation!r}")
        return [KERNELS[implementation]]
    num_scores = query.size // query.shape[-1] * key.shape[-3]
    staged = isinstance(jnp.zeros(()), jax.core.Tracer)  # whether this is being compiled, whatever is traced
    many = num_scores >= (MANY_SCORES if staged else MANY_SCORES_OUTSIDE_JIT)
    names = sorted(KERNELS, key=lambda name: not (many and name == "blockwise"))
    return [KERNELS[name] for name in names if name != "cudnn"]


def _first_that_can(kernels: list[Callable[..., Any]], *operands: Array, **options: Any) -> Any:
    for kernel in kernels[:-1]:
        try:
            return kernel(*operands, **options)
        except NotImplementedError:
            continue
    return kernels[-1](*operands, **options)
