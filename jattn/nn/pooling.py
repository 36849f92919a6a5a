"""Attention pooling with one head: modules own the parameters, project, and call `attend`.

Query `[..., T, Dq]`, key `[..., S, Dk]`, value `[..., S, V]` have no head axis; masks are as in
`attend` with N = 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, scores
from jattn.request import MaskLike, Score

Array = jax.Array


class _Dropout(nnx.Module):
    """The dropout of attention weights: its rate, its random stream, and its switch."""

    def __init__(self, rate: float, rngs: nnx.Rngs | None):
        checks.assert_probability(dropout_rate=rate)
        if rate > 0 and rngs is None:
            raise ValueError(f"dropout_rate = {rate} needs rngs, got None")
        self.rate = rate
        self.deterministic = False
        self.rngs = rngs.dropout.fork() if rate > 0 and rngs is not None else None

    def options(self, deterministic: bool | None) -> dict[str, Any]:
        """The arguments of `attend` for one call; a key is drawn only if weights are dropped."""
        off = self.deterministic if deterministic is None else deterministic
        if off or self.rngs is None:
            return {}
        return {"dropout_rate": self.rate, "dropout_key": self.rngs()}


class _Pooling(nnx.Module):
    """Single-head pooling; what the modules below share. Each has a score of its own."""

    dropout: _Dropout

    def _score(self) -> Score:
        raise NotImplementedError

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: MaskLike = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Pool value `[..., S, V]` into `[..., T, V]`.

        Args:
          query: `[..., T, Dq]`.
          key: `[..., S, Dk]`.
          value: `[..., S, V]`.
          mask: as `jattn.attend` takes it.
          return_weights: also return the weights `[..., T, S]`, before dropout.
          deterministic: switches dropout off; None: as `module.train()` and `module.eval()` have
            set it.

        Returns:
          `[..., T, V]`, or a tuple of it and the weights.
        """
        checks.assert_shapes(
            query=(query, "... T Dq"), key=(key, "... S Dk"), value=(value, "... S V")
        )
        result = attend(
            *(jnp.asarray(array)[..., None, :] for array in (query, key, value)),
            score=self._score(), mask=mask, return_weights=return_weights,
            **self.dropout.options(deterministic),
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
        self, *, scaled: bool = True, dropout_rate: float = 0.0, rngs: nnx.Rngs | None = None
    ):
        self.scaled = scaled
        self.dropout = _Dropout(dropout_rate, rngs)

    def _score(self) -> Score:
        return scores.scaled_dot_product if self.scaled else scores.dot_product


class CosineAttention(_Pooling):
    """Pooling by the cosine of the angle between query and key, which have one width.

        output = softmax(scale · cos(Q, K)) V

    Args:
      scale: the inverse temperature.
      dropout_rate: for the weights.
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
        self, *, scale: float = 1.0, dropout_rate: float = 0.0, rngs: nnx.Rngs | None = None
    ):
        self.scale = scale
        self.dropout = _Dropout(dropout_rate, rngs)

    def _score(self) -> Score:
        return functools.partial(scores.cosine, scale=self.scale)


class BilinearAttention(_Pooling):
    """Pooling by the multiplicative ("general") score qᵀ W k.

    Args:
      query_features: Dq.
      key_features: Dk.
      dropout_rate: for the weights.
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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(query_features=query_features, key_features=key_features)
        initializer = initializers.lecun_normal()
        self.weight = nnx.Param(
            initializer(rngs.params(), (query_features, key_features), param_dtype)
        )
        self.dropout = _Dropout(dropout_rate, rngs)

    def _score(self) -> Score:
        return functools.partial(scores.bilinear, weight=self.weight[...])


class AdditiveAttention(_Pooling):
    """Bahdanau's pooling: a small network scores the sum of projected query and projected key.

        a(q, k) = wᵀ tanh(W_q q + W_k k)

    Args:
      query_features: Dq.
      key_features: Dk.
      hidden_features: width of the projections.
      dropout_rate: for the weights.
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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(
            query_features=query_features,
            key_features=key_features,
            hidden_features=hidden_features,
        )
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.query = linear(query_features, hidden_features)
        self.key = linear(key_features, hidden_features)
        weight = initializers.lecun_normal()(rngs.params(), (hidden_features, 1), param_dtype)
        self.weight = nnx.Param(weight[:, 0])
        self.dropout = _Dropout(dropout_rate, rngs)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: MaskLike = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Pool value `[..., S, V]` into `[..., T, V]`.

        On request also return the weights `[..., T, S]`.
        """
        return self.attend_projected(
            query,
            self.project_key(key),
            value,
            mask=mask,
            return_weights=return_weights,
            deterministic=deterministic,
        )

    def project_key(self, key: Array) -> Array:
        """W_k k, `[..., S, Dk] -> [..., S, hidden_features]`: once for all queries of a decoder."""
        return project("key", self.key, key)

    def attend_projected(
        self,
        query: Array,
        projected_key: Array,
        value: Array,
        *,
        mask: MaskLike = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """As a call, with the key as `project_key` returned it."""
        return super().__call__(
            project("query", self.query, query), projected_key, value,
            mask=mask, return_weights=return_weights, deterministic=deterministic,
        )  # fmt: skip

    def _score(self) -> Score:
        return functools.partial(scores.additive, weight=self.weight[...])


class NadarayaWatson(_Pooling):
    """Kernel regression with a learned Gaussian kernel: the weighted mean of the values seen.

        f(x) = Σ_i softmax_i(−‖(x − x_i) w‖² / 2) y_i

    For training, predict each point from the others: `mask=masks.no_self()`.

    Args:
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

    def __init__(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (), param_dtype))
        self.dropout = _Dropout(0.0, None)

    def _score(self) -> Score:
        return functools.partial(scores.gaussian, weight=self.weight[...])


def project(name: str, linear: Callable[[Array], Array], x: Array) -> Array:
    """Apply a Linear to `[..., length, features]`, naming the argument if its width does not fit.

    Example:
      >>> project("query", nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3))).shape
      (5, 2)
    """
    checks.assert_floating(**{name: x})
    expected = linear.in_features  # type: ignore[attr-defined]
    if jnp.ndim(x) < 2 or jnp.shape(x)[-1] != expected:
        raise ValueError(f"{name} must be [..., length, {expected}], got shape {jnp.shape(x)}")
    return linear(jnp.asarray(x))
