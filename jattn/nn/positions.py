"""Positions added to a sequence of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.functional import checks
from jattn.functional.positions import sinusoidal_encoding
from jattn.nn._shared import dropout, promoted, rows, sequence

Array = jax.Array


class SinusoidalPositions(nnx.Module):
    """Add the sinusoidal encoding and apply dropout: dropout(x + P). Any length.

    Args:
      features: D, even.
      dropout_rate: for the sum.
      dtype: to compute in; None: that of x.
      rngs: needed if `dropout_rate` > 0.

    Raises:
      ValueError: features is odd; dropout without rngs; in a call, x is not `[..., T, D]`.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> SinusoidalPositions(4)(jnp.zeros((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int,
        *,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        # An odd width is an error here rather than in the first call
        sinusoidal_encoding(0, features)
        self.features, self.dtype = features, dtype
        self.dropout = dropout(dropout_rate, rngs)

    def __call__(
        self, x: Array, *, positions: Array | None = None, deterministic: bool | None = None
    ) -> Array:
        """Encode x `[..., T, D]`; keeps its shape, and its dtype unless the module has one.

        Positions, `[T]` or `[..., T]`, are 0 … T − 1 unless given.
        """
        (x,) = promoted(self.dtype, sequence(x, self.features))
        _check(positions, x)
        where = x.shape[-2] if positions is None else positions
        encoding = sinusoidal_encoding(where, self.features).astype(x.dtype)
        return self.dropout(_plus(x, encoding), deterministic=deterministic)


class LearnedPositions(nnx.Module):
    """Add a learned embedding of the absolute position: x + E[:T].

    Args:
      max_length: number of positions that have an embedding.
      features: D.
      dtype: to compute in; None: the one to which x and the table promote.
      param_dtype: dtype of the table.
      rngs: for initialisation, normal with standard deviation 0.02.

    Attributes:
      embedding: E, `[max_length, D]`.

    Raises:
      ValueError: in a call, x is not `[..., T, D]`, or a position is beyond the table.

    Paper: Gehring et al. 2017, https://arxiv.org/abs/1705.03122

    Example:
      >>> LearnedPositions(7, 4, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        max_length: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(max_length=max_length, features=features)
        self.dtype = dtype
        initializer = initializers.normal(0.02)
        self.embedding = nnx.Param(initializer(rngs.params(), (max_length, features), param_dtype))

    def __call__(self, x: Array, *, positions: Array | None = None) -> Array:
        """Encode x `[..., T, D]`.

        Positions, integers `[T]` or `[..., T]`, are 0 … T − 1 unless given. Under jit, where their
        values cannot be seen, one beyond the table gives NaN.
        """
        max_length, features = self.embedding.shape
        x = sequence(x, features)
        _check(positions, x)
        T = x.shape[-2]
        if positions is not None:
            ids = checks.validated_tokens("positions", positions, max_length)
            table = rows(self.embedding[...], ids)
        elif _at_most(T, max_length):
            table = self.embedding[:T]
        else:
            raise ValueError(f"x has length {T}, beyond the {max_length} learned positions")
        x, table = promoted(self.dtype, x, table)
        return _plus(x, table)


def _check(positions: Any, x: Array) -> None:
    if positions is not None and jnp.shape(positions) not in {x.shape[-2:-1], x.shape[:-1]}:
        must = f"positions must be [T] or [..., T] for x of shape {x.shape}"
        raise ValueError(f"{must}, got {jnp.shape(positions)}")


def _plus(x: Array, encoding: Array) -> Array:
    return x + jnp.expand_dims(encoding, range(x.ndim - encoding.ndim))


def _at_most(length: Any, bound: int) -> bool:
    try:
        return length <= bound
    except jax.errors.InconclusiveDimensionOperation:
        raise ValueError(
            f"x has a length {length} that may be beyond the {bound} learned positions: give "
            f'jax.export.symbolic_shape the constraint "{length} <= {bound}"'
        ) from None
