"""`torch.nn.MultiheadAttention`, its masks and all: the one place with PyTorch's conventions."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, masks, modifiers
from jattn.nn.multi_head import MultiHeadAttention

Array = jax.Array


class TorchMultiheadAttention(nnx.Module):
    """`torch.nn.MultiheadAttention` argument by argument, over a `MultiHeadAttention`.

    New code is better served by that. This module takes what PyTorch's code passes: masks in which
    True hides, float masks that are added, sequences before batches unless `batch_first`.

    It differs where PyTorch contradicts itself. For a query that may see nothing PyTorch gives
    zeros, NaN, or a mean of values, by which of its kernels runs; here its attention is 0, so that
    the output is the bias of the output projection, and its weights are 0. `is_causal` is a hint
    in PyTorch, which may then ignore `attn_mask`; here `attn_mask` decides. The weights are those
    before dropout.

    Args:
      embed_dim: E, the width of queries and output.
      num_heads: N.
      dropout: rate for the weights.
      bias: whether all four projections have biases.
      add_bias_kv: whether to append a learned key and value to every sequence, never hidden.
      add_zero_attn: whether to append a key and a value of zeros, after it, never hidden.
      kdim, vdim: the widths of keys and of values; None: E.
      batch_first: whether arrays are `[B, T, E]` instead of `[T, B, E]`.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation, as PyTorch's, and dropout.

    Attributes:
      attention: the `MultiHeadAttention`.
      bias_k, bias_v: the learned key and value `[E]`, or None.

    Raises:
      ValueError: a size is not positive, or E is no multiple of N.

    Example:
      >>> attention = TorchMultiheadAttention(6, 2, batch_first=True, rngs=nnx.Rngs(0))
      >>> x, later = jnp.ones((3, 5, 6)), ~jnp.tril(jnp.ones((5, 5), bool))
      >>> output, weights = attention(x, x, x, attn_mask=later)
      >>> output.shape, weights.shape
      ((3, 5, 6), (3, 5, 5))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_bool(
            bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first
        )
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first
        kdim, vdim = (embed_dim if width is None else width for width in (kdim, vdim))
        packed = kdim == vdim == embed_dim  # PyTorch draws one matrix [3E, E] for all three
        self.attention = MultiHeadAttention(
            num_heads, embed_dim, in_kv_features=kdim, in_value_features=vdim,
            use_bias=bias, dropout_rate=dropout, attend=attend,
            dtype=dtype, param_dtype=param_dtype,
            kernel_init=_packed_xavier if packed else initializers.xavier_uniform(),
            out_kernel_init=_linear, rngs=rngs,
        )  # fmt: skip

        def token() -> nnx.Param[Any]:
            return nnx.Param(
                jax.random.normal(rngs.params(), (embed_dim,), param_dtype) * embed_dim**-0.5
            )

        self.bias_k = nnx.data(token() if add_bias_kv else None)
        self.bias_v = nnx.data(token() if add_bias_kv else None)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        deterministic: bool | None = None,
    ) -> tuple[Array, Array | None]:
        """Attend, as PyTorch's `forward`.

        Args:
          query: `[T, B, E]`, with `batch_first` `[B, T, E]`, or unbatched `[T, E]`.
          key: `[S, B, kdim]`, and so on.
          value: `[S, B, vdim]`, and so on.
          key_padding_mask: `[B, S]`, or unbatched `[S]`: booleans, True hides a key; or floats that
            are added to its scores.
          need_weights: also return the weights.
          attn_mask: `[T, S]` or `[B · N, T, S]`, booleans or floats likewise.
          average_attn_weights: whether the weights are means over heads.
          is_causal: a promise that `attn_mask` is causal; changes nothing.
          deterministic: switches dropout off; None: as `module.train()`, `module.eval()` or
            `nnx.view` has set it.

        Returns:
          The output, of the query's shape, and the weights `[B, T, S]`, or `[B, N, T, S]` if they
          are not averaged (unbatched without B; S counts the appended keys); None if not needed.

        Raises:
          ValueError: a shape does not fit, or `is_causal` comes without `attn_mask`.
          TypeError: an array is not floating point, or a mask neither boolean nor floating point.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask, as in PyTorch, where it is only a hint")
        batched = jnp.ndim(query) == 3
        query, key, value = self._batch_first(batched, query=query, key=key, value=value)
        attention, (B, T), S = self.attention, query.shape[:2], key.shape[1]
        _check_mask("attn_mask", attn_mask, (T, S), (B * attention.num_heads, T, S))
        _check_mask("key_padding_mask", key_padding_mask, (B, S) if batched else (S,))
        keys, values = self._appended(*attention.project(key, value))
        mask, modifier = torch_masks(
            attn_mask,
            key_padding_mask,
            num_heads=attention.num_heads,
            appended=keys.shape[1] - S,
        )
        result = attention.attend_projected(
            query, keys, values, mask=mask, modifier=modifier, return_weights=need_weights,
            deterministic=deterministic,
        )  # fmt: skip
        output, weights = result if need_weights else (result, None)
        if weights is not None and average_attn_weights:
            weights = weights.mean(axis=1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else rearrange(output, "b t e -> t b e"), weights

    def _batch_first(self, batched: bool, **operands: Array) -> list[Array]:
        """The operands as `[B, length, width]`; without a batch as a batch of one."""
        patterns = {"query": "T E", "key": "S kdim", "value": "S vdim"}
        if batched:
            order = "B {} {}" if self.batch_first else "{} B {}"
            patterns = {name: order.format(*axes.split()) for name, axes in patterns.items()}
        given: dict[str, Any] = {name: (operands[name], patterns[name]) for name in operands}
        checks.assert_shapes(**given)
        checks.assert_floating(**operands)
        arrays = map(jnp.asarray, operands.values())
        if not batched:
            return [array[None] for array in arrays]
        order = "... -> ..." if self.batch_first else "t b e -> b t e"
        return [rearrange(array, order) for array in arrays]

    def _appended(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Heads `[B, S, N, H]` with the learned token and that of zeros behind them."""
        if self.bias_k is not None and self.bias_v is not None:
            key, value = _append(key, self.bias_k[...]), _append(value, self.bias_v[...])
        if self.add_zero_attn:
            key, value = _append(key), _append(value)
        return key, value


def _append(heads: Array, token: Array | None = None) -> Array:
    """Heads `[B, S, N, H]` with one more behind each sequence: a token `[N · H]`, or zeros."""
    _, S, N, _ = heads.shape
    behind = jnp.pad(heads, [(0, 0), (0, 1), (0, 0), (0, 0)])
    if token is None:
        return behind
    alone = rearrange(token.astype(heads.dtype), "(n h) -> 1 1 n h", n=N)
    return behind + jnp.pad(alone, [(0, 0), (S, 0), (0, 0), (0, 0)])


def torch_masks(
    attn_mask: Any = None,
    key_padding_mask: Any = None,
    *,
    num_heads: int | None = None,
    appended: int = 0,
) -> tuple[masks.Mask | None, tuple[modifiers.Modifier, ...] | None]:
    """The masks of PyTorch's attention layers as a mask and a modifier for `jattn.attend`.

    In PyTorch's layers True hides, and a float mask is added to the scores. (In its
    `scaled_dot_product_attention` True shows, as here: that mask needs no conversion.) An entry of
    −inf hides.

    Args:
      attn_mask: booleans or floats, `[T, S]`, or `[B · N, T, S]`, which needs `num_heads`.
      key_padding_mask: booleans or floats, `[B, S]` or `[S]`.
      num_heads: N.
      appended: keys behind those S, which no mask hides.

    Returns:
      The mask and the modifier; None for one that is not needed.

    Raises:
      ValueError: a shape does not fit.
      TypeError: a mask is neither boolean nor floating point.

    Example:
      >>> from jattn import attend
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> later = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
      >>> mask, modifier = torch_masks(later, key_padding_mask=np.array([[True, False, False]]))
      >>> weights = attend(x, x, x, mask=mask, modifier=modifier, return_weights=True)[1]
      >>> weights[0, 0].round(1).tolist()
      [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
    """
    visible: list[Array] = []
    added: list[Array] = []
    for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if given is None:
            continue
        array = _of_scores(name, jnp.asarray(given), num_heads)
        widths = [(0, 0)] * (array.ndim - 1) + [(0, appended)]
        array = jnp.pad(array, widths)  # False shows, and 0 adds nothing
        if array.dtype == bool:
            visible.append(~array)
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be boolean or floating point, got {array.dtype}")
        hidden = jnp.isneginf(array)
        visible.append(~hidden)
        concrete = checks.concrete(array)
        if concrete is None or not np.isin(concrete, (0, -np.inf)).all():
            added.append(jnp.where(hidden, 0, array))
    mask = functools.reduce(operator.and_, map(masks.from_array, visible)) if visible else None
    return mask, tuple(map(modifiers.bias, added)) or None


def _of_scores(name: str, array: Array, num_heads: int | None) -> Array:
    """A mask of PyTorch's as attend's scores broadcast it: `[T, S]`, `[B, N, T, S]`, …"""
    if name == "key_padding_mask":
        if array.ndim not in (1, 2):
            raise ValueError(f"{name} must be [B, S] or [S], got shape {array.shape}")
        return array[None] if array.ndim == 1 else rearrange(array, "b s -> b 1 1 s")
    if array.ndim == 2:
        return array
    if array.ndim != 3:
        raise ValueError(f"{name} must be [T, S] or [B · N, T, S], got shape {array.shape}")
    if num_heads is None:
        raise ValueError(f"{name} [B · N, T, S] needs num_heads, got shape {array.shape}")
    checks.assert_divisible(**{f"the first axis of {name}": (len(array), "num_heads", num_heads)})
    return rearrange(array, "(b n) t s -> b n t s", n=num_heads)


def _check_mask(name: str, mask: Any, *shapes: tuple[int, ...]) -> None:
    if mask is not None and jnp.shape(mask) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, got {jnp.shape(mask)}")


def _packed_xavier(key: Array, shape: Any, dtype: Any, *_: Any) -> Array:
    """Xavier's bound for a matrix three times as wide as each of its parts."""
    bound = (6 / (shape[0] + 3 * shape[1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _linear(key: Array, shape: Any, dtype: Any, *_: Any) -> Array:
    """The kernel of `torch.nn.Linear`."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
