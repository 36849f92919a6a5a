"""Small self-attentions: one head, heads that share projections, and the residual around any."""

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks, scores
from jattn.functional.heads import merge_heads, split_heads
from jattn.nn._shared import (
    Linear,
    Options,
    attending,
    dropout,
    dropped_weights,
    normalized,
    promoted,
    sequence,
)
from jattn.request import MaskLike, ModifierLike

Array = jax.Array


class _SelfAttention(nnx.Module):
    """Attention of a sequence to itself; what the modules below share.

    Each says what query, key and value are, and what becomes of the heads.
    """

    attend: Callable[..., Any]
    dropout: nnx.Dropout
    features: int
    scale: float | None = None

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        """Query, key and value, each `[..., T, N, H]`."""
        raise NotImplementedError

    def _merged(self, heads: Array) -> Array:
        """`[..., T, N, H]` to the output."""
        raise NotImplementedError

    @overload
    def __call__(
        self, x: Array, *, return_weights: Literal[False] = False, **options: Unpack[Options]
    ) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, return_weights: Literal[True], **options: Unpack[Options]
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, x: Array, *, return_weights: bool, **options: Unpack[Options]
    ) -> Array | tuple[Array, Array]: ...
    def __call__(
        self,
        x: Array,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attend from a sequence to itself.

        Args:
          x: `[..., T, D]`.
          mask, modifier, positions: as `jattn.attend` takes them.
          return_weights: also return the weights before dropout, `[..., N, T, T]`; of a single head
            `[..., T, T]`.
          deterministic: switches dropout off; None: as `module.train()`, `module.eval()` or
            `nnx.view` has set it.

        Returns:
          `[..., T, F]`, or a tuple of it and the weights; the class says what F is.

        Raises:
          ValueError: a shape does not fit.
          TypeError: x is not floating point, or an argument is given by `attend=` too.
        """
        score = None
        if self.scale is not None:
            score = functools.partial(scores.scaled_dot_product, scale=self.scale)
        result = self.attend(
            *self._operands(sequence(x, self.features)),
            score=score, mask=mask, modifier=modifier, positions=positions,
            return_weights=return_weights, **dropped_weights(self.dropout, deterministic),
        )  # fmt: skip
        if not return_weights:
            return self._merged(result)
        output, weights = result
        return self._merged(output), self._weights(weights)

    def _weights(self, weights: Array) -> Array:
        return weights


class SelfAttention(_SelfAttention):
    """One head: query, key and value are three projections of one sequence.

        output = softmax(Q Kᵀ / √H) V,   Q = x W_q + b_q,   K = x W_k + b_k,   V = x W_v + b_v

    Args:
      in_features: D.
      features: H, the width of the projections and of the output.
      use_bias: whether the projections have biases.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, a score, a mask or
        a modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation and dropout.

    Attributes:
      query, key, value: the projections, each a Linear.

    Raises:
      ValueError: a width is not positive; in a call, shapes that do not fit.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> SelfAttention(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(in_features=in_features, features=features)
        checks.assert_bool(use_bias=use_bias)
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.features = in_features
        self.query = linear(in_features, features)
        self.key = linear(in_features, features)
        self.value = linear(in_features, features)
        self.attend, self.dropout = attending(attend), dropout(dropout_rate, rngs)

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        return query[..., None, :], key[..., None, :], value[..., None, :]

    def _merged(self, heads: Array) -> Array:
        return heads.squeeze(-2)

    def _weights(self, weights: Array) -> Array:
        return weights.squeeze(-3)


class SharedProjectionAttention(_SelfAttention):
    """Multi-head self-attention whose heads share one small projection each of query, key, value.

        head_n = softmax(Q_n K_nᵀ / √H) V_n,   Q_n = x_n W_q,   K_n = x_n W_k,   V_n = x_n W_v
        output = Concat(head_1 … head_N) W_o + b_o

    Here x_n is the n-th slice of x, of width H = D / N. So the kernels are those of
    `MultiHeadAttention` with N equal blocks on the diagonal. Code that builds these projections but
    never calls them is the same with identity kernels.

    Args:
      num_heads: N.
      features: D = N · H, the width of the input and of the output.
      scale: factor of the scores; None: 1 / √H; some code has 1 / √D.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, a score, a mask or
        a modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation and dropout.

    Attributes:
      query, key, value: the shared projections, each a Linear `[H, H]` without bias.
      out: the output projection, a Linear with bias.

    Raises:
      ValueError: D is not divisible by N; in a call, shapes that do not fit.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, whose heads have projections of
    their own

    Example:
      >>> attention = SharedProjectionAttention(3, 12, rngs=nnx.Rngs(0))
      >>> attention(jnp.ones((2, 5, 12))).shape, attention.query.kernel.shape
      ((2, 5, 12), (4, 4))
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(num_heads=num_heads, features=features)
        checks.assert_divisible(features=(features, "num_heads", num_heads))
        self.num_heads, self.features, self.scale = num_heads, features, scale
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = features // num_heads
        self.query = linear(width, width, use_bias=False)
        self.key = linear(width, width, use_bias=False)
        self.value = linear(width, width, use_bias=False)
        self.out = linear(features, features)
        self.attend, self.dropout = attending(attend), dropout(dropout_rate, rngs)

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        heads = split_heads(x, self.num_heads)
        return self.query(heads), self.key(heads), self.value(heads)

    def _merged(self, heads: Array) -> Array:
        return self.out(merge_heads(heads))


class ResidualAttention(nnx.Module):
    """A self-attention with its input added, and optionally normalised.

        z = LayerNorm(skip(x) + attention(x))

    The skip path is a Linear where the widths differ, else x itself.

    Args:
      attention: any module that maps `[..., T, D]` to `[..., T, F]`: `SelfAttention`,
        `MultiHeadAttention`, ….
      in_features: D.
      out_features: F, default D.
      use_layer_norm: whether a LayerNorm (ε = 1e-5) follows the sum.
      dtype: in which skip and norm compute; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters of skip and norm.
      rngs: for initialisation.

    Attributes:
      attention: as given.
      skip: a Linear, or None.
      norm: a LayerNorm, or None.

    Raises:
      ValueError: a width is not positive; in a call, shapes that do not fit.

    Papers: He et al. 2016, https://arxiv.org/abs/1512.03385;
    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> attention = SelfAttention(3, 4, rngs=rngs)
      >>> residual = ResidualAttention(attention, 3, 4, use_layer_norm=True, rngs=rngs)
      >>> residual(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        attention: nnx.Module,
        in_features: int,
        out_features: int | None = None,
        *,
        use_layer_norm: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        out_features = in_features if out_features is None else out_features
        checks.assert_positive(in_features=in_features, out_features=out_features)
        checks.assert_bool(use_layer_norm=use_layer_norm)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_features, self.out_features = in_features, out_features
        self.attention, self.dtype = attention, dtype
        self.skip = self.norm = nnx.data(None)
        if in_features != out_features:
            self.skip = Linear(in_features, out_features, **options)
        if use_layer_norm:
            self.norm = nnx.LayerNorm(
                out_features, epsilon=1e-5, use_fast_variance=False, **options
            )

    @overload
    def __call__(
        self, x: Array, *, return_weights: Literal[False] = False, **options: Any
    ) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, return_weights: Literal[True], **options: Any
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, x: Array, *, return_weights: bool, **options: Any
    ) -> Array | tuple[Array, Array]: ...
    def __call__(
        self, x: Array, *, return_weights: bool = False, **options: Any
    ) -> Array | tuple[Array, Array]:
        """Attend from a sequence to itself and add it.

        Args:
          x: `[..., T, D]`.
          return_weights: also return the weights of the attention.
          **options: for the attention: `mask`, ….

        Returns:
          `[..., T, F]`, or a tuple of it and the weights.
        """
        x = sequence(x, self.in_features)
        attention: Any = self.attention
        result = attention(x, return_weights=return_weights, **options)
        pooled = result[0] if return_weights else result
        expected = (*x.shape[:-1], self.out_features)
        if pooled.shape != expected:
            raise ValueError(
                f"attention must return [..., length, out_features] = {expected},"
                f" got {pooled.shape}"
            )
        z = operator.add(*promoted(self.dtype, x if self.skip is None else self.skip(x), pooled))
        if self.norm is not None:
            z = normalized(self.norm, z)
        return (z, result[1]) if return_weights else z
