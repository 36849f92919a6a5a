"""A table of vectors, one for each id, with PyTorch's padding, norms and counted gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.functional import checks

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
      param_dtype: dtype of the table.
      rngs: random streams; uses `params`: the rows begin as standard normal numbers.

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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(num_embeddings=num_embeddings, features=features)
        for name, number in (("max_norm", max_norm), ("norm_type", norm_type)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive, got {number!r}")
        table = jax.random.normal(rngs.params(), (num_embeddings, features), param_dtype)
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
        tokens = self._known(tokens)
        rows = self._rows(tokens)
        if self.padding_idx is None and self.max_norm is None and not self.scale_grad_by_freq:
            return rows
        # Zero: it carries the gradient, as it should be, to the table
        change = rows - jax.lax.stop_gradient(rows)
        if self.scale_grad_by_freq:
            count = jnp.zeros(len(self.embedding), jnp.int32).at[tokens].add(1, mode="drop")
            change = (
                change
                / count.at[tokens].get(mode="fill", fill_value=1).astype(change.dtype)[..., None]
            )
        if self.padding_idx is not None:
            change = jnp.where((tokens == self.padding_idx)[..., None], 0, change)
        return jax.lax.stop_gradient(self._rescaled(rows)) + change

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
        tokens = self._known(tokens)
        return self.embedding[...].at[tokens].set(self._rescaled(self._rows(tokens)), mode="drop")

    def _known(self, tokens: Array) -> Array:
        """Check ids; where they cannot be seen, a negative one becomes too large.

        So it has no row, rather than one from the end.
        """
        checks.assert_integers(tokens=tokens)
        checks.assert_in_range("tokens", tokens, 0, len(self.embedding) - 1, "the last id")
        tokens = jnp.asarray(tokens).astype(jnp.int32)
        return jnp.where(tokens < 0, np.int32(len(self.embedding)), tokens)

    def _rows(self, tokens: Array) -> Array:
        return self.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan)

    def _rescaled(self, rows: Array) -> Array:
        if self.max_norm is None:
            return rows
        norms = jnp.linalg.norm(rows, ord=self.norm_type, axis=-1, keepdims=True)
        return jnp.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)
