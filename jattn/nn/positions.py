"""Positions added to a sequence of embeddings, or known to its attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, modifiers
from jattn.functional.positions import sinusoidal_encoding
from jattn.nn._shared import attending, dropout, joined_modifiers, promoted, rows, sequence
from jattn.request import ModifierLike

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
            ids = checks.validated_tokens("positions", positions, max_length, "the last of them")
            table = rows(self.embedding[...], ids)
        elif _at_most(T, max_length):
            table = self.embedding[:T]
        else:
            raise ValueError(f"x has length {T}, beyond the {max_length} learned positions")
        x, table = promoted(self.dtype, x, table)
        return _plus(x, table)


class RelativePositions(nnx.Module):
    """Attention that knows distances by a learned table: the `attend=` of another module.

        score = (q · k + q · E[i − j + L − 1]) / √H       (BERT's relative_key)

    All heads share the table. With a cache, i and j are true positions. (For a score of another
    scale there is `modifiers.relative_key`.)

    Args:
      max_length: L, the number of tokens that the table is for.
      head_features: H, the width of a head.
      with_key: whether k · E[i − j + L − 1] is added, too (BERT's relative_key_query).
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier;
        or a module that is called as `jattn.attend`.
      param_dtype: dtype of the table.
      embedding_init: of the table; normal with standard deviation 0.02.
      rngs: for initialisation.

    Attributes:
      embedding: E, `[2 L − 1, H]`.

    Raises:
      ValueError: a size is not positive; in a call, there are more than L tokens, or heads of
        another width.

    Papers: Shaw et al. 2018, https://arxiv.org/abs/1803.02155; with the key Huang et al. 2020,
    https://arxiv.org/abs/2009.13658

    Example:
      >>> from jattn import nn
      >>> rngs = nnx.Rngs(0)
      >>> relative = RelativePositions(9, 3, rngs=rngs)
      >>> attention = nn.MultiHeadAttention(2, 6, attend=relative, rngs=rngs)
      >>> attention(jnp.ones((5, 6))).shape, relative.embedding.shape
      ((5, 6), (17, 3))
    """

    def __init__(
        self,
        max_length: int,
        head_features: int,
        *,
        with_key: bool = False,
        attend: Callable[..., Any] = attend,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable[..., Any] = initializers.normal(0.02),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(max_length=max_length, head_features=head_features)
        checks.assert_bool(with_key=with_key)
        self.max_length, self.with_key, self.attend = max_length, with_key, attending(attend)
        table = embedding_init(rngs.params(), (2 * max_length - 1, head_features), param_dtype)
        self.embedding = nnx.Param(table)

    @property
    def given(self) -> Mapping[str, Any]:
        """What the inner `attend` gives by itself."""
        return getattr(self.attend, "given", {})

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        **options: Any,
    ) -> Any:
        """Attend; arguments and results are those of `jattn.attend`.

        With positions, a distance of L or more gives NaN.
        """
        table, L = self.embedding[...], self.max_length
        if query.shape[-1] != table.shape[-1]:
            must = f"head_features is {table.shape[-1]}"
            raise ValueError(f"{must}, got a query with heads of width {query.shape[-1]}")
        if positions is None:
            longest = max(query.shape[-3], key.shape[-3], 1)
            if not _at_most(longest, L):
                raise ValueError(f"got {longest} tokens, beyond the {L} relative positions")
            if isinstance(longest, int):  # no symbol of `jax.export`
                table = table[L - longest : L + longest - 1]  # no other rows are read
        own = modifiers.relative_key(query, table, key=key if self.with_key else None)
        return self.attend(
            query, key, value,
            modifier=joined_modifiers(own, modifier), positions=positions, **options,
        )  # fmt: skip


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
            f"a length {length} may be beyond the {bound} learned positions: give "
            f'jax.export.symbolic_shape the constraint "{length} <= {bound}"'
        ) from None
