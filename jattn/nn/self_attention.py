"""Small self-attentions: one head, heads that share projections, and the residual around any."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks, scores
from jattn.functional.heads import merge_heads, split_heads
from jattn.nn.pooling import DotProductAttention, project
from jattn.request import MaskLike

Array = jax.Array


class SelfAttention(nnx.Module):
    """One head: query, key and value are three projections of one sequence.

        output = softmax(Q Kᵀ / √H) V,   Q = x W_q + b_q,   K = x W_k + b_k,   V = x W_v + b_v

    Args:
      in_features: D.
      features: H, the width of the projections and of the output.
      use_bias: whether the projections have biases.
      param_dtype: dtype of the parameters.
      rngs: for initialisation.

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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(in_features=in_features, features=features)
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs
        )
        self.query = linear(in_features, features)
        self.key = linear(in_features, features)
        self.value = linear(in_features, features)
        self.pooling = DotProductAttention()

    def __call__(self, x: Array, *, mask: MaskLike = None, return_weights: bool = False) -> Any:
        """Attend from a sequence to itself.

        Args:
          x: `[..., T, D]`.
          mask: as `jattn.attend` takes it, with N = 1.
          return_weights: also return the weights `[..., T, T]`.

        Returns:
          `[..., T, H]`, or a tuple of it and the weights.
        """
        projected = (project("x", linear, x) for linear in (self.query, self.key, self.value))
        return self.pooling(*projected, mask=mask, return_weights=return_weights)


class SharedProjectionAttention(nnx.Module):
    """Multi-head self-attention whose heads share one small projection each of query, key, value.

        head_n = softmax(Q_n K_nᵀ / √H) V_n,   Q_n = x_n W_q,   K_n = x_n W_k,   V_n = x_n W_v
        output = Concat(head_1 … head_N) W_o + b_o

    Here x_n is the n-th slice of x, of width H = D / N. So the kernels are those of
    `MultiHeadAttention` with N equal blocks on the diagonal. Code that builds these projections but
    never calls them is the same with identity kernels.

    Args:
      num_heads: N.
      features: D = N · H, the width of the input and of the output.
      scale: factor of the scores, default 1 / √H; some code has 1 / √D.
      param_dtype: dtype of the parameters.
      rngs: for initialisation.

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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(num_heads=num_heads, features=features)
        if features % num_heads:
            raise ValueError(
                f"features ({features}) must be a positive multiple of num_heads ({num_heads})"
            )
        self.num_heads = num_heads
        self.scale = scale
        linear = functools.partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        width = features // num_heads
        self.query = linear(width, width, use_bias=False)
        self.key = linear(width, width, use_bias=False)
        self.value = linear(width, width, use_bias=False)
        self.out = linear(features, features)

    def __call__(self, x: Array, *, mask: MaskLike = None, return_weights: bool = False) -> Any:
        """Attend from a sequence to itself.

        Args:
          x: `[..., T, D]`.
          mask: as `jattn.attend` takes it.
          return_weights: also return the weights `[..., N, T, T]`.

        Returns:
          `[..., T, D]`, or a tuple of it and the weights.
        """
        heads = split_heads(sequence(x, self.out.in_features), self.num_heads)
        result = attend(
            self.query(heads), self.key(heads), self.value(heads),
            score=functools.partial(scores.scaled_dot_product, scale=self.scale),
            mask=mask, return_weights=return_weights,
        )  # fmt: skip
        if not return_weights:
            return self.out(merge_heads(result))
        output, weights = result
        return self.out(merge_heads(output)), weights


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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        out_features = in_features if out_features is None else out_features
        checks.assert_positive(in_features=in_features, out_features=out_features)
        linear = functools.partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        norm = functools.partial(
            nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs
        )
        self.in_features, self.out_features = in_features, out_features
        self.attention = attention
        self.skip = None if in_features == out_features else linear(in_features, out_features)
        self.norm = norm(out_features) if use_layer_norm else None

    def __call__(self, x: Array, *, return_weights: bool = False, **options: Any) -> Any:
        """Attend from a sequence to itself and add it.

        Args:
          x: `[..., T, D]`.
          return_weights: also return the weights of the attention.
          **options: for the attention: `mask`, ….

        Returns:
          `[..., T, F]`, or a tuple of it and the weights.
        """
        x = sequence(x, self.in_features)
        result = self.attention(x, return_weights=return_weights, **options)  # type: ignore[operator]
        pooled, weights = result if return_weights else (result, None)
        expected = (*x.shape[:-1], self.out_features)
        if pooled.shape != expected:
            raise ValueError(
                f"attention must return [..., length, out_features] = {expected},"
                f" got {pooled.shape}"
            )
        z = (x if self.skip is None else self.skip(x)) + pooled
        if self.norm is not None:
            # Inside, Flax promotes float64 with float32
            with jax.numpy_dtype_promotion("standard"):
                z = self.norm(z)
        return (z, weights) if return_weights else z


def sequence(x: Array, features: int) -> Array:
    """The sequence x as an array, checked to be floating point and `[..., length, features]`.

    Example:
      >>> sequence(jnp.ones((5, 3)), 3).shape
      (5, 3)
    """
    checks.assert_floating(x=x)
    if jnp.ndim(x) < 2 or jnp.shape(x)[-1] != features:
        raise ValueError(f"x must be [..., length, {features}], got shape {jnp.shape(x)}")
    return jnp.asarray(x)
