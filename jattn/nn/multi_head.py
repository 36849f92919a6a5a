"""Multi-head, grouped-query and multi-query attention as one module."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks
from jattn.functional.heads import merge_heads, split_heads
from jattn.nn.pooling import _Dropout, project
from jattn.request import MaskLike, ModifierLike

Array = jax.Array


class MultiHeadAttention(nnx.Module):
    """Several attentions side by side, each in its own learned subspace.

        head_n = softmax(Q_n K_nᵀ / √H) V_n,   output = Concat(head_1 … head_N) W_o

    With `num_kv_heads` = K < N, groups of N / K query heads share one key/value head (grouped-query
    attention); with K = 1 all share one (multi-query attention). Keys and values are never repeated
    in memory. With `out_features` = H every head is as wide as the output (wide heads).

    Args:
      num_heads: N.
      features: D = N · H, the width of the heads together.
      query_features: width of the query input, default D.
      key_features: width of the key input, default that of the query.
      value_features: width of the value input, default that of the key.
      out_features: width of the output, default D.
      num_kv_heads: K, default N.
      use_bias: whether the four projections have biases.
      dropout_rate: for the weights.
      param_dtype: dtype of the parameters.
      rngs: for initialisation and dropout.

    Attributes:
      query, key, value, out: the projections, each a Linear; heads are contiguous in their outputs.

    Raises:
      ValueError: D is not divisible by N, or N by K; in a call, shapes that do not fit.

    Papers: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762;
    Shazeer 2019, https://arxiv.org/abs/1911.02150;
    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> attention = MultiHeadAttention(6, 12, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> attention(jnp.ones((2, 5, 12))).shape
      (2, 5, 12)
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        query_features: int | None = None,
        key_features: int | None = None,
        value_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.assert_positive(
            num_heads=num_heads, features=features, num_kv_heads=self.num_kv_heads
        )
        for name, size, by, divisor in (
            ("features", features, "num_heads", num_heads),
            ("num_heads", num_heads, "num_kv_heads", self.num_kv_heads),
        ):
            if size % divisor:
                raise ValueError(f"{name} ({size}) must be a positive multiple of {by} ({divisor})")
        query_features = features if query_features is None else query_features
        key_features = query_features if key_features is None else key_features
        value_features = key_features if value_features is None else value_features
        out_features = features if out_features is None else out_features
        checks.assert_positive(
            query_features=query_features, key_features=key_features, value_features=value_features
        )
        checks.assert_positive(out_features=out_features)
        kv_width = features // num_heads * self.num_kv_heads
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs
        )
        self.query = linear(query_features, features)
        self.key = linear(key_features, kv_width)
        self.value = linear(value_features, kv_width)
        self.out = linear(features, out_features)
        self.dropout = _Dropout(dropout_rate, rngs)

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Attend from query to key and value.

        Args:
          query: `[..., T, Dq]`.
          key: `[..., S, Dk]`; None: the query (self-attention).
          value: `[..., S, Dv]`; None: the key.
          mask, modifier, positions: as `jattn.attend` takes them.
          return_weights: also return the weights `[..., N, T, S]`, before dropout.
          deterministic: switches dropout off; None: as `module.train()` and `module.eval()` have
            set it.

        Returns:
          `[..., T, out_features]`, or a tuple of it and the weights.
        """
        if key is None and value is not None:
            raise ValueError(
                "value without key: pass the key too, or leave out both for self-attention"
            )
        key = query if key is None else key
        value = key if value is None else value
        result = attend(
            split_heads(project("query", self.query, query), self.num_heads),
            split_heads(project("key", self.key, key), self.num_kv_heads),
            split_heads(project("value", self.value, value), self.num_kv_heads),
            mask=mask, modifier=modifier, positions=positions, return_weights=return_weights,
            **self.dropout.options(deterministic),
        )  # fmt: skip
        if not return_weights:
            return self.out(merge_heads(result))
        output, weights = result
        return self.out(merge_heads(output)), weights
