"""attend: make a request of the arguments, choose a kernel, run it."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jattn.functional import checks, dtypes, masks, modifiers, scores
from jattn.kernels import dense
from jattn.kernels.choose import KERNELS, Implementation, choose, table
from jattn.request import MaskLike, ModifierLike, Precision, Request, Score, check_operands

Array = jax.Array


class _Options(TypedDict, total=False):
    """The options of `attend` that do not change the type of its result."""

    score: Score
    mask: MaskLike
    modifier: ModifierLike
    positions: tuple[Array, Array] | None
    dropout_rate: float
    dropout_key: Array | None
    precision: Precision
    implementation: Implementation


@overload
def attend(
    query: Array, key: Array, value: Array, *, return_lse: Literal[False] = False,
    return_weights: Literal[False] = False, **options: Unpack[_Options],
) -> Array: ...  # fmt: skip
@overload
def attend(
    query: Array, key: Array, value: Array, *, return_lse: Literal[True],
    return_weights: Literal[False] = False, **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def attend(
    query: Array, key: Array, value: Array, *, return_lse: Literal[False] = False,
    return_weights: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def attend(
    query: Array, key: Array, value: Array, *, return_lse: Literal[True],
    return_weights: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def attend(
    query: Array, key: Array, value: Array, *, return_lse: bool = False,
    return_weights: bool = False, **options: Unpack[_Options],
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...  # fmt: skip
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
    precision: Precision = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]:
    """Attention pooling: weights(score(query, key), mask) · value.

        weights[t, s] = softmax over s of modifier(score(query[t, n], key[s, n // G]))
        output[t, n]  = Σ_s weights[t, s] · value[s, n // G]

    for each head n, over the keys s that query t may attend to. A query with no such key gives
    output 0 and log-sum-exp −inf; a score of −inf is as good as forbidden. Keys that no query may
    attend to, and queries that may attend to nothing, affect neither output nor gradients, whatever
    they hold. A finite number never affects a query that may not see it. NaN or inf in a key or
    value that *some* query may see can reach other queries too, as in PyTorch: 0 · NaN is NaN.

    Args:
      query: `[..., T, N, H]`, floating point. float16 and bfloat16 are multiplied in that dtype and
        summed in float32.
      key: `[..., S, K, H']`; N is a multiple of K, and query head n uses key head n // (N / K).
      value: `[..., S, K, V]`.
      score: `(query [..., T, H], key [..., S, H']) -> [..., T, S]`; see `jattn.scores`. It must be
        pairwise: entry [t, s] depends on query t and key s alone. One that is not gives different
        numbers in each kernel, without an error. Every kernel passes it query and key in their
        common dtype.
      mask: a value of `jattn.masks`, a callable `(b, h, q_idx, k_idx) -> bool`, or a boolean array
        broadcastable to `[..., N, T, S]`, as NumPy broadcasts: two axes are `[T, S]`, shared by all
        examples, even where B = T. True = may attend. For lengths there is `masks.padding`.
      modifier: a value of `jattn.modifiers`, a callable `(score, b, h, q_idx, k_idx) -> score`, or
        a tuple of these, applied from left to right before the mask.
      positions: query positions `[T]` or `[..., T]` and key positions `[S]` or `[..., S]`,
        integers; default 0, 1, …. What masks and modifiers see as `q_idx` and `k_idx`.
      dropout_rate: probability, from 0 to 1, with which a weight is dropped after the softmax.
      dropout_key: a JAX random key, needed if `dropout_rate` > 0.
      precision: of float32 products, as `jax.default_matmul_precision` takes it; None: what it is.
      implementation: "dense", the specification, which holds all scores; "blockwise", whose memory
        is linear in T and S; "decode", for a few queries; "cudnn", NVIDIA's; or a tuple of names,
        of which the first that can runs. None: "decode" where few queries and a mask meet many
        keys, else "dense" up to 2²¹ scores (B · N · T · S on a device; symbols of `jax.export`
        count as few), from there on "blockwise"; never "dense" beyond 2²⁷ scores, unless
        weights are asked for. `jattn.explain` says which, and why. Those of jattn differ in
        rounding, never in meaning, and have derivatives of every kind and order. (Through a score
        with a `jax.custom_vjp` of its own, "blockwise" has reverse mode alone.)
      return_lse: also return the log-sum-exp of the scores, `[..., T, N]`, before dropout.
      return_weights: also return the weights, `[..., N, T, S]`, before dropout.

    Returns:
      Output `[..., T, N, V]`, or a tuple of it with what else was asked for, in the order of the
      arguments.

    Raises:
      ValueError: shapes, lengths or positions do not fit; dropout without a key; an unknown
        implementation.
      TypeError: query, key or value are not floating point, or a mask is not boolean.
      NotImplementedError: no kernel asked for can do it; names each and its reason.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> x = jnp.ones((2, 5, 3, 4))
      >>> attend(x, x, x, mask=masks.causal(), modifier=modifiers.soft_cap(30.0)).shape
      (2, 5, 3, 4)
    """
    request = Request.of(
        query,
        key,
        value,
        score=score,
        mask=mask,
        modifier=modifier,
        positions=positions,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    output, lse, weights = KERNELS[choose(request, implementation)].run(request)
    lse, weights = (lse if return_lse else None), (weights if return_weights else None)
    if lse is not None and weights is not None:
        return output, lse, weights
    extra = weights if lse is None else lse
    return output if extra is None else (output, extra)


def explain(
    query: Array,
    key: Array,
    value: Array,
    *,
    implementation: Implementation = None,
    score: Score = scores.scaled_dot_product,
    **options: Any,
) -> str:
    """Which kernel `attend` would run for these arguments, and why each other one is passed over.

    Nothing is computed: arrays may be given as `jax.ShapeDtypeStruct`s.

    Args:
      query, key, value, implementation, score, **options: those of `attend`.

    Returns:
      A line for each kernel, in the order in which they are asked.

    Raises:
      As `attend`, for bad input.

    Example:
      >>> x = jax.ShapeDtypeStruct((1, 5, 3, 4), jnp.float32)
      >>> print(explain(x, x, x, implementation=("blockwise", "dense"), return_weights=True))
      blockwise  passed over: it never holds all weights, for return_weights: "dense" does
      dense      runs: 75 scores on a device
    """
    lines: list[Any] = []

    def ask(query: Array, key: Array, value: Array) -> None:
        request = Request.of(query, key, value, score=score, **options)
        lines.extend((request.num_scores, line) for line in table(request, implementation))

    jax.eval_shape(ask, query, key, value)
    chosen = next((line.name for _, line in lines if line.refusal is None), None)
    width, told = max(len(line.name) for _, line in lines), []
    for num_scores, (name, refusal) in lines:
        if refusal is not None:
            said = f"passed over: {refusal}"
        elif name == chosen:
            said = f"runs: {num_scores:,} scores on a device"
        else:
            said = f"passed over: it can, but {chosen} comes first"
        told.append(f"{name:{width}}  {said}")
    return "\n".join(told)


def attention_weights(
    query: Array,
    key: Array,
    *,
    score: Score = scores.scaled_dot_product,
    mask: MaskLike = None,
    modifier: ModifierLike = None,
    positions: tuple[Array, Array] | None = None,
    precision: Precision = None,
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
    check_operands(query=query, key=key)
    request = Request.of(
        query,
        key,
        jnp.zeros((*key.shape[:-1], 0), key.dtype),
        score=score,
        mask=mask,
        modifier=modifier,
        positions=positions,
        precision=precision,
        return_weights=True,
    )
    weights = dense.run(request).weights
    assert weights is not None  # they were asked for
    return weights


def merge_partials(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Combine attention over disjoint parts of the keys into attention over all of them, exactly.

        lse = log Σ_i exp(lse_i),  output = Σ_i exp(lse_i − lse) · output_i

    Args:
      parts: pairs of output `[..., T, N, V]` and log-sum-exp `[..., T, N]`, as `attend(…,
        return_lse=True)` gives.

    Returns:
      The combined pair; 0 and −inf where every part is empty.

    Raises:
      ValueError: there is no part, or their shapes differ.

    Paper: Dao et al. 2022, https://arxiv.org/abs/2205.14135

    Example:
      >>> q, k = jnp.ones((1, 1, 2)), jnp.arange(8.0).reshape(4, 1, 2)
      >>> halves = [attend(q, half, half, return_lse=True) for half in (k[:2], k[2:])]
      >>> bool(jnp.allclose(merge_partials(halves)[0], attend(q, k, k)))
      True
    """
    parts = [(jnp.asarray(output), jnp.asarray(lse)) for output, lse in parts]
    if not parts:
        raise ValueError("parts must hold at least one (output, lse) pair, got none")
    for index, (output, lse) in enumerate(parts):
        checks.assert_floating(
            **{f"the output of parts[{index}]": output, f"the lse of parts[{index}]": lse}
        )
        if output.shape != parts[0][0].shape or lse.shape != output.shape[:-1]:
            must = f"an output {parts[0][0].shape} and an lse without its last axis"
            raise ValueError(f"parts[{index}] must be {must}, got {output.shape} and {lse.shape}")
    lses = jnp.stack([lse for _, lse in parts])
    maximum = jax.lax.stop_gradient(lses.max(0, keepdims=True))
    shares = jnp.exp(lses - jnp.where(jnp.isneginf(maximum), 0, maximum))
    total = shares.sum(0, keepdims=True)
    divisor = jnp.where(total == 0, 1, total)
    outputs = jnp.stack([output for output, _ in parts])
    # An empty part has no share, even if it holds NaN
    seen = jnp.where(shares[..., None] > 0, outputs.astype(shares.dtype), 0)
    output = (seen * (shares / divisor)[..., None]).sum(0)
    lse = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(divisor))
    return output.astype(outputs.dtype), lse[0]


def attend_with_sink(
    query: Array, key: Array, value: Array, sink: float | Array = 0.0, **options: Any
) -> Any:
    """`attend` with a sink: one more column of scores, which takes weight and gives nothing.

        weights[t, s] = exp(x[t, s]) / (exp(sink) + Σ_s exp(x[t, s]))
        output = σ(lse − sink) · attend(query, key, value)

    where x are the scores after modifier and mask. So the weights of a query may sum to less than
    1, and a query that finds nothing attends to nothing. A sink of 0 is softmax-off-by-one; one of
    −inf is none.

    Args:
      query, key, value: as `attend` takes them.
      sink: one number, or `[N]` with one for each query head, floating point; learned by gradients.
        It is not scaled, as scores are.
      **options: those of `attend`.

    Returns:
      What `attend` returns; log-sum-exp counts the sink, and weights are those above.

    Raises:
      ValueError: there is not one sink for each head; or as `attend`.
      TypeError: the sink is not floating point; or as `attend`.

    Papers: a learned sink for each head: OpenAI 2025, https://arxiv.org/abs/2508.10925; why models
    need one: Xiao et al. 2023, https://arxiv.org/abs/2309.17453

    Example:
      >>> x = jnp.zeros((1, 1, 2))
      >>> attend_with_sink(x, x, jnp.ones((1, 1, 2)))  # one key and the sink, with equal scores
      Array([[[0.5, 0.5]]], dtype=float32)
    """
    checks.assert_floating(sink=sink)
    N = jnp.shape(query)[-2] if jnp.ndim(query) > 2 else None
    if jnp.shape(sink) not in {(), (N,)}:
        must = f"sink must be one number or one for each query head, shape () or ({N},)"
        raise ValueError(f"{must}, got shape {jnp.shape(sink)}")
    wanted = {name: options.pop(name, False) for name in ("return_lse", "return_weights")}
    options["return_weights"] = wanted["return_weights"]
    output, lse, *weights = attend(query, key, value, return_lse=True, **options)
    sink = jnp.broadcast_to(jnp.asarray(sink, lse.dtype), lse.shape[-1:])
    sink = sink.reshape((1,) * (lse.ndim - 1) + sink.shape)
    empty = jnp.isneginf(lse)  # a row that sees nothing, to which a sink of −inf adds nothing
    share = jnp.where(empty, 0, jax.nn.sigmoid(jnp.where(empty, 0, lse) - sink))
    results = [output * share[..., None].astype(output.dtype)]
    if wanted["return_lse"]:
        results.append(jnp.logaddexp(lse, sink))
    results += [each * rearrange(share, "... T N -> ... N T 1") for each in weights]
    return results[0] if len(results) == 1 else tuple(results)


class _Masking(TypedDict, total=False):
    """The options of `dot_product_attention` that do not change the type of its result."""

    scale: float | None
    is_causal: bool
    query_seq_lengths: Array | None
    key_value_seq_lengths: Array | None
    local_window_size: int | tuple[int, int] | None
    implementation: Implementation


@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None,
    *, return_residual: Literal[False] = False, **options: Unpack[_Masking],
) -> Array: ...  # fmt: skip
@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None,
    *, return_residual: Literal[True], **options: Unpack[_Masking],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def dot_product_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, mask: Array | None = None,
    *, return_residual: bool, **options: Unpack[_Masking],
) -> Array | tuple[Array, Array]: ...  # fmt: skip
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
    implementation: Implementation = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """`jax.nn.dot_product_attention` by the rules of `attend`: change one import.

    Signature and numbers are the same, but for two rules. A query that may attend to nothing gives
    0 and residual −inf, where jax.nn gives a mean of values; and what hidden rows hold never
    reaches output or gradients. Any leading axes are allowed, and value may have its own width.
    A length that is negative or longer than its axis, and a window that holds no key, are errors
    here.

    Args:
      query: `[..., T, N, H]`.
      key: `[..., S, K, H]`.
      value: `[..., S, K, V]`.
      bias: added to the scaled scores, broadcastable to `[..., N, T, S]`; integers, too.
      mask: boolean, broadcastable to `[..., N, T, S]`; True = may attend.
      scale: factor of the scores, default 1 / √H.
      is_causal: only keys with index ≤ the query's index.
      query_seq_lengths: integers `[...]`; queries beyond are hidden and give 0.
      key_value_seq_lengths: integers `[...]`; keys beyond are hidden.
      local_window_size: keys seen to the left and to the right, or one number for both.
      implementation: as in `attend`; "xla" stands for the library's own choice.
      return_residual: also return the log-sum-exp `[..., T, N]`, in the dtype of the key and, as
        in jax.nn, without gradient; `attend(…, return_lse=True)` has one.

    Raises:
      As `attend`.

    Example:
      >>> x = jnp.ones((2, 5, 3, 4))
      >>> bool(jnp.allclose(dot_product_attention(x, x, x), jax.nn.dot_product_attention(x, x, x)))
      True
    """
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    check_operands(query=query, key=key, value=value)
    parts: list[masks.Mask] = [] if mask is None else [masks.from_array(mask)]
    if is_causal:
        parts.append(masks.causal())
    if local_window_size is not None:
        parts.append(_window(local_window_size))
    if key_value_seq_lengths is not None:
        lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, key)
        parts.append(masks.padding(lengths))
    if query_seq_lengths is not None:
        lengths = _lengths("query_seq_lengths", query_seq_lengths, query)
        slots = jnp.arange(query.shape[-3], dtype=jnp.int32).reshape((1,) * lengths.ndim + (-1,))
        parts.append(masks.from_array(rearrange(slots < lengths[..., None], "... T -> ... 1 T 1")))
    if bias is not None and not jnp.issubdtype(jnp.asarray(bias).dtype, jnp.floating):
        checks.assert_integers(bias=bias)
        bias = jnp.asarray(bias, dtypes.accumulator(query.dtype))
    results = attend(
        query,
        key,
        value,
        score=functools.partial(scores.scaled_dot_product, scale=scale),
        mask=functools.reduce(operator.and_, parts) if parts else None,
        modifier=None if bias is None else modifiers.bias(bias),
        implementation=None if implementation == "xla" else implementation,
        return_lse=return_residual,
    )
    if not isinstance(results, tuple):
        return results
    output, lse = results[0], results[1]
    return output, jax.lax.stop_gradient(lse.astype(key.dtype))


def _window(size: int | tuple[int, int]) -> masks.Mask:
    if np.shape(size) not in {(), (2,)}:
        raise ValueError(f"local_window_size must be an integer or a pair of them, got {size}")
    left, right = np.broadcast_to(np.asarray(size), 2).tolist()
    return masks.sliding_window(left, right)


def _lengths(name: str, lengths: Any, rows: Array) -> Array:
    checks.assert_integers(**{name: lengths})
    expected, got = rows.shape[:-3], np.shape(lengths)
    if got != expected:
        raise ValueError(f"{name} must have one length per example, shape {expected}, got {got}")
    checks.assert_in_range(name, lengths, 0, rows.shape[-3], "the length of the array")
    return dtypes.lengths(lengths)
