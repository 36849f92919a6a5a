"""A table of vectors, one for each id, with PyTorch's padding, norms and counted gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.functional import checks, compat
from jattn.nn._shared import promoted, rows, times

Array = jax.Array


class Embedding(nnx.Module):
    """Look up a row of a table for every id; `torch.nn.Embedding`.

        output = E[tokens]

    With `max_norm`, rows that are longer than it are rescaled in the output:
    r · max_norm / (‖r‖ + 1e-7). PyTorch rewrites its weights in place instead; outputs and
    gradients are the same: the gradient is that of the rescaled row, as if it were the parameter.
    Where the stored table is to follow PyTorch's through training, see `renormalized`. PyTorch's
    `sparse` chooses a form of storage for gradients that JAX does not have; there is no such
    option.

    Args:
      num_embeddings: C, the number of ids.
      features: D.
      padding_idx: an id whose row begins as zeros and never gets a gradient; −C … C − 1, negative
        from the end.
      max_norm: the length above which a row is rescaled; None: no limit.
      norm_type: p of the norm (Σ |r|ᵖ)^(1/p) that measures it.
      scale_grad_by_freq: divide a row's gradient by the number of times that its id stands in the
        tokens of the call (under `jax.vmap`: of one example).
      dtype: of the output; None: that of the table.
      param_dtype: dtype of the table.
      embedding_init: of the table; standard normal numbers, as PyTorch has them.
      rngs: random streams; uses `params`.

    Attributes:
      embedding: E, `[C, D]`.

    Raises:
      ValueError: a size is not positive, `padding_idx` is no id, or `max_norm` or `norm_type` is
        not positive.

    Example:
      >>> embedding = Embedding(11, 3, padding_idx=0, rngs=nnx.Rngs(0))
      >>> embedding(jnp.array([[4, 0]]))[0, 1]
      Array([0., 0., 0.], dtype=float32)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable[..., Any] = initializers.normal(1.0),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(num_embeddings=num_embeddings, features=features)
        for name, number in (("max_norm", max_norm), ("norm_type", norm_type)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive, got {number!r}")
        checks.assert_bool(scale_grad_by_freq=scale_grad_by_freq)
        table = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        if padding_idx is not None:
            checks.assert_integers(padding_idx=padding_idx)
            checks.assert_in_range(
                "padding_idx",
                padding_idx,
                -num_embeddings,
                num_embeddings - 1,
                "the ids, from either end",
            )
            padding_idx = int(padding_idx) % num_embeddings
            table = table.at[padding_idx].set(0)
        self.embedding = nnx.Param(table)
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.num_embeddings, self.features, self.dtype = num_embeddings, features, dtype

    def __call__(self, tokens: Array) -> Array:
        """The rows of the ids.

        Args:
          tokens: integers `[...]` from 0 to C − 1.

        Returns:
          `[..., D]`.

        Raises:
          ValueError: an id is unknown. Under jit, where ids cannot be seen, its row is NaN.
          TypeError: tokens are not integers.
        """
        tokens = checks.validated_tokens("tokens", tokens, self.num_embeddings)
        found = rows(self.embedding[...], tokens)
        found = found if self.dtype is None else found.astype(self.dtype)
        if self.padding_idx is None and self.max_norm is None and not self.scale_grad_by_freq:
            return found
        source = found
        if self.scale_grad_by_freq:
            source = source / self._counts(tokens).astype(source.dtype)[..., None]
        if self.padding_idx is not None:
            source = jnp.where((tokens == self.padding_idx)[..., None], 0, source)
        return _with_gradient_of(self._rescaled(found), source)

    def attend(self, query: Array) -> Array:
        """The products of queries with every row, as of a Linear tied to the table: x Eᵀ.

        Args:
          query: `[..., D]`, floating point.

        Returns:
          `[..., C]`. The gradient reaches the row of `padding_idx`, as in PyTorch.

        Raises:
          ValueError: the width does not fit.
          TypeError: the query is not floating point.
        """
        checks.assert_floating(query=query)
        checks.assert_shapes(embedding=(self.embedding, "C D"), query=(query, "... D"))
        query, table = promoted(self.dtype, query, self.embedding[...])
        return times(query, table.T)

    def _counts(self, tokens: Array) -> Array:
        """How often each token stands among the tokens; any number for one that is unknown."""

        def count(tokens: Array) -> Array:
            counts = jnp.zeros(self.num_embeddings, jnp.int32).at[tokens].add(1, mode="drop")
            return counts.at[tokens].get(mode="fill", fill_value=1)

        return compat.automatically(count, jax.typeof(tokens).sharding.spec)(tokens)

    def renormalized(self, tokens: Array) -> Array:
        """The table in which the rows of some ids, where longer than `max_norm`, are rescaled.

        It is what PyTorch stores after a call: before an update of the parameters,
        `embedding.embedding[...] = embedding.renormalized(tokens)`.

        Args:
          tokens: integers `[...]` from 0 to C − 1.

        Returns:
          `[C, D]`.

        Raises:
          ValueError, TypeError: as in a call.

        Example:
          >>> embedding = Embedding(11, 3, max_norm=0.5, rngs=nnx.Rngs(0))
          >>> embedding.embedding[...] = embedding.renormalized(jnp.array([4, 7]))
          >>> (jnp.linalg.norm(embedding.embedding, axis=1) <= 0.5).nonzero()[0]
          Array([4, 7], dtype=int32)
        """
        tokens = checks.validated_tokens("tokens", tokens, self.num_embeddings)
        table = self.embedding[...]
        return table.at[tokens].set(self._rescaled(rows(table, tokens)), mode="drop")

    def _rescaled(self, rows: Array) -> Array:
        if self.max_norm is None:
            return rows
        norms = jnp.linalg.norm(rows, ord=self.norm_type, axis=-1, keepdims=True)
        return jnp.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)


@jax.custom_jvp
def _with_gradient_of(value: Array, source: Array) -> Array:
    """The value, with the derivatives of the source; value + (source − source) has NaN for inf."""
    del source
    return value


@_with_gradient_of.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _with_gradient_of(*primals), tangents[1]
