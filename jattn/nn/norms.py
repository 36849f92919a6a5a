"""Norms that Flax has in another form."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.functional import checks, dtypes
from jattn.nn._shared import promoted

Array = jax.Array


class RMSNorm(nnx.Module):
    """Divide by the root of the mean square; no mean is subtracted.

        output = scale · x / √(mean x² + ε)

    Half precision is normalised in float32, rounded, and then multiplied by the scale: so do the
    models whose weights are in circulation. (`nnx.RMSNorm` rounds after the product.)

    Args:
      features: D.
      epsilon: ε.
      dtype: to compute in; None: the one to which input and scale promote.
      param_dtype: dtype of the scale.
      rngs: as other modules take it; nothing is drawn.

    Attributes:
      scale: `[D]`, begins as ones.

    Raises:
      ValueError: features or epsilon is not positive; in a call, the width does not fit.

    Paper: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467

    Example:
      >>> RMSNorm(2)(jnp.array([3.0, -3.0])).round(3)
      Array([ 1., -1.], dtype=float32)
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        checks.assert_positive(features=features)
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon!r}")
        self.features, self.epsilon, self.dtype = features, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise x `[..., D]` over its last axis."""
        checks.assert_floating(x=x)
        checks.assert_shapes(scale=(self.scale, "D"), x=(x, "... D"))
        x, scale = promoted(self.dtype, x, self.scale[...])
        wide = x.astype(dtypes.accumulator(x.dtype))
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalised = (wide * jax.lax.rsqrt(mean + self.epsilon)).astype(x.dtype)
        return normalised * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
