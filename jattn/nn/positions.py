"""Positions added to a sequence of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.functional import checks
from jattn.functional.positions import sinusoidal_encoding

Array = jax.Array


class SinusoidalPositions(nnx.Module):
    """Add the sinusoidal encoding and apply dropout: dropout(x + P). Any length.

    Args:
      features: D, even.
      dropout_rate: for the sum.
      rngs: needed if `dropout_rate` > 0.

    Raises:
      ValueError: features is odd; dropout without rngs; in a call, x is not `[..., T, D]`.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> SinusoidalPositions(4)(jnp.zeros((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(self, features: int, *, dropout_rate: float = 0.0, rngs: nnx.Rngs | None = None):
        # An odd width is an error here rather than in the first call
        sinusoidal_encoding(0, features)
        checks.assert_probability(dropout_rate=dropout_rate)
        if dropout_rate > 0 and rngs is None:
            raise ValueError(f"dropout_rate = {dropout_rate} needs rngs, got None")
        self.features = features
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: Array, *, deterministic: bool | None = None) -> Array:
        """Encode x `[..., T, D]`; keeps its shape and dtype."""
        T, x = _length(x, self.features), jnp.asarray(x)
        return self.dropout(
            x + sinusoidal_encoding(T, self.features).astype(x.dtype), deterministic=deterministic
        )


class LearnedPositions(nnx.Module):
    """Add a learned embedding of the absolute position: x + E[:T].

    Args:
      max_length: number of positions that have an embedding.
      features: D.
      param_dtype: dtype of the table.
      rngs: for initialisation, normal with standard deviation 0.02.

    Attributes:
      embedding: E, `[max_length, D]`.

    Raises:
      ValueError: in a call, x is not `[..., T, D]`, or T is beyond the table.

    Paper: Gehring et al. 2017, https://arxiv.org/abs/1705.03122

    Example:
      >>> LearnedPositions(7, 4, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(
        self, max_length: int, features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        checks.assert_positive(max_length=max_length, features=features)
        initializer = initializers.normal(0.02)
        self.embedding = nnx.Param(initializer(rngs.params(), (max_length, features), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Encode x `[..., T, D]`."""
        max_length, features = self.embedding.shape
        T = _length(x, features)
        if T > max_length:
            raise ValueError(f"x has length {T}, beyond the {max_length} learned positions")
        return jnp.asarray(x) + self.embedding[:T]


def _length(x: Array, features: int) -> int:
    checks.assert_floating(x=x)
    if jnp.ndim(x) < 2 or jnp.shape(x)[-1] != features:
        raise ValueError(f"x must be [..., T, {features}], got shape {jnp.shape(x)}")
    return jnp.shape(x)[-2]
