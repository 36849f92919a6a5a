"""Attention pooling with one head: modules own the parameters, project, and call `attend`.

Query `[..., T, Dq]`, key `[..., S, Dk]`, value `[..., S, V]` have no head axis; masks are as in
`attend` with N = 1.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, scores
from jattn.nn._shared import Given, Options, attending, dropout, dropped_weights, project, promoted
from jattn.request import MaskLike, ModifierLike, Score

Array = jax.Array


class _Pooling(nnx.Module):
    """Single-head pooling; what the modules below share. Each has a score of its own."""

    attend: Callable[..., Any]
    dropout: nnx.Dropout
    dtype: Any
    weight: Any = None  # of the score, if it has one

    def _score(self, dtype: Any) -> Score:
        raise NotImplementedError

    @overload
    def __call__(
        self, query: Array, key: Array, value: Array, *, return_weights: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array, value: Array, *, return_weights: Literal[True],
        **options: Unpack[Options],
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array, value: Array, *, return_weights: bool,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Pool value `[..., S, V]` into `[..., T, V]`.

        Args:
          query: `[..., T, Dq]`.
          key: `[..., S, Dk]`.
          value: `[..., S, V]`.
          mask, modifier, positions: as `jattn.attend` takes them.
          return_weights: also return the weights `[..., T, S]`, before dropout.
          deterministic: switches dropout off; None: as `module.train()`, `module.eval()` or
            `nnx.view` has set it.

        Returns:
          `[..., T, V]`, or a tuple of it and the weights.

        Raises:
          ValueError: a shape does not fit.
          TypeError: an argument is not floating point, or is given by `attend=` too.
        """
        checks.assert_shapes(
            query=(query, "... T Dq"), key=(key, "... S Dk"), value=(value, "... S V")
        )
        checks.assert_floating(query=query, key=key, value=value)
        query, key = self._compared(query, key)
        return self._pool(
            query, key, value,
            mask=mask, modifier=modifier, positions=positions, return_weights=return_weights,
            deterministic=deterministic,
        )  # fmt: skip

    def _compared(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Query and key as the score compares them."""
        return query, key

    def _pool(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        return_weights: bool,
        deterministic: bool | None,
        **options: Any,
    ) -> Any:
        weight = () if self.weight is None else (self.weight[...],)
        query, key, value, *_ = promoted(self.dtype, query, key, value, *weight)
        result = self.attend(
            *(array[..., None, :] for array in (query, key, value)),
            score=self._score(query.dtype), return_weights=return_weights, **options,
            **dropped_weights(self.dropout, deterministic),
        )  # fmt: skip
        if not return_weights:
            return result.squeeze(-2)
        output, weights = result
        return output.squeeze(-2), weights.squeeze(-3)


class DotProductAttention(_Pooling):
    """Pooling by the inner product of query and key, which have one width.

        output = softmax(Q Kᵀ / √D) V

    Args:
      scaled: divide by √D (the default), or use the bare product.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which the inputs promote.
      rngs: needed if `dropout_rate` > 0.

    Raises:
      ValueError: dropout without rngs; in a call, shapes that do not fit.

    Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    Example:
      >>> x = jnp.ones((2, 5, 3))
      >>> DotProductAttention()(x, x, x).shape
      (2, 5, 3)
    """

    def __init__(
        self,
        *,
        scaled: bool = True,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        self.scaled = scaled
        self.attend, self.dtype = attending(attend), dtype
        self.dropout = dropout(dropout_rate, rngs)

    def _score(self, dtype: Any) -> Score:
        return scores.scaled_dot_product if self.scaled else scores.dot_product


class CosineAttention(_Pooling):
    """Pooling by the cosine of the angle between query and key, which have one width.

        output = softmax(scale · cos(Q, K)) V

    Args:
      scale: the inverse temperature.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which the inputs promote.
      rngs: needed if `dropout_rate` > 0.

    Raises:
      ValueError: dropout without rngs; in a call, shapes that do not fit.

    Paper: Graves et al. 2014, https://arxiv.org/abs/1410.5401

    Example:
      >>> x = jnp.ones((2, 5, 3))
      >>> CosineAttention(scale=10.0)(x, x, x).shape
      (2, 5, 3)
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = scale
        self.attend, self.dtype = attending(attend), dtype
        self.dropout = dropout(dropout_rate, rngs)

    def _score(self, dtype: Any) -> Score:
        return functools.partial(scores.cosine, scale=self.scale)


class BilinearAttention(_Pooling):
    """Pooling by the multiplicative ("general") score qᵀ W k.

    Args:
      query_features: Dq.
      key_features: Dk.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation and dropout.

    Attributes:
      weight: W, `[Dq, Dk]`.

    Raises:
      ValueError: in a call, shapes that do not fit.

    Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025

    Example:
      >>> attention = BilinearAttention(3, 5, rngs=nnx.Rngs(0))
      >>> attention(jnp.ones((2, 3)), jnp.ones((7, 5)), jnp.ones((7, 4))).shape
      (2, 4)
    """

    def __init__(
        self,
        query_features: int,
        key_features: int,
        *,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(query_features=query_features, key_features=key_features)
        initializer = initializers.lecun_normal()
        self.weight = nnx.Param(
            initializer(rngs.params(), (query_features, key_features), param_dtype)
        )
        self.attend, self.dtype = attending(attend), dtype
        self.dropout = dropout(dropout_rate, rngs)

    def _score(self, dtype: Any) -> Score:
        return functools.partial(scores.bilinear, weight=self.weight.astype(dtype))


class AdditiveAttention(_Pooling):
    """Bahdanau's pooling: a small network scores the sum of projected query and projected key.

        a(q, k) = wᵀ tanh(W_q q + W_k k)

    Args:
      query_features: Dq.
      key_features: Dk.
      hidden_features: width of the projections.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation and dropout.

    Attributes:
      query: W_q, a Linear without bias.
      key: W_k, a Linear without bias.
      weight: w, `[hidden_features]`.

    Raises:
      ValueError: in a call, shapes that do not fit.

    Paper: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473

    Example:
      >>> attention = AdditiveAttention(3, 5, 8, rngs=nnx.Rngs(0))
      >>> attention(jnp.ones((2, 3)), jnp.ones((7, 5)), jnp.ones((7, 4))).shape
      (2, 4)
    """

    def __init__(
        self,
        query_features: int,
        key_features: int,
        hidden_features: int,
        *,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(
            query_features=query_features,
            key_features=key_features,
            hidden_features=hidden_features,
        )
        self.query_features, self.key_features = query_features, key_features
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query = linear(query_features, hidden_features)
        self.key = linear(key_features, hidden_features)
        weight = initializers.lecun_normal()(rngs.params(), (hidden_features, 1), param_dtype)
        self.weight = nnx.Param(weight[:, 0])
        self.attend, self.dtype = attending(attend), dtype
        self.dropout = dropout(dropout_rate, rngs)

    def project_key(self, key: Array) -> Array:
        """W_k k, `[..., S, Dk] -> [..., S, hidden_features]`: once for all queries of a decoder."""
        return project("key", self.key, key, self.key_features)

    def attend_projected(
        self,
        query: Array,
        projected_key: Array,
        value: Array,
        *,
        return_weights: bool = False,
        deterministic: bool | None = None,
        **options: Unpack[Given],
    ) -> Any:
        """As a call, with the key as `project_key` returned it."""
        query = project("query", self.query, query, self.query_features)
        return self._pool(
            query, projected_key, value,
            return_weights=return_weights, deterministic=deterministic, **options,
        )  # fmt: skip

    def _compared(self, query: Array, key: Array) -> tuple[Array, Array]:
        return project("query", self.query, query, self.query_features), self.project_key(key)

    def _score(self, dtype: Any) -> Score:
        return functools.partial(scores.additive, weight=self.weight.astype(dtype))


class NadarayaWatson(_Pooling):
    """Kernel regression with a learned Gaussian kernel: the weighted mean of the values seen.

        f(x) = Σ_i softmax_i(−‖(x − x_i) w‖² / 2) y_i

    For training, predict each point from the others: `mask=masks.no_self()`.

    Args:
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameter promote.
      param_dtype: dtype of the parameter.
      rngs: for initialisation, uniform in 0 … 1.

    Attributes:
      weight: w, a scalar, the inverse bandwidth.

    Raises:
      ValueError: in a call, shapes that do not fit.

    Papers: Nadaraya 1964, https://doi.org/10.1137/1109020;
    Watson 1964, https://www.jstor.org/stable/25049340

    Example:
      >>> x = jnp.linspace(0, 1, 5)[:, None]
      >>> NadarayaWatson(rngs=nnx.Rngs(0))(x, x, jnp.sin(x)).shape
      (5, 1)
    """

    def __init__(
        self,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (), param_dtype))
        self.attend, self.dtype = attending(attend), dtype
        self.dropout = dropout(0.0, None)

    def _score(self, dtype: Any) -> Score:
        return functools.partial(scores.gaussian, weight=self.weight.astype(dtype))
