"""A sequence pooled into a few vectors by attention whose queries are learned, or constant.

Each module says what query, key and value are, one line each; `attend` with the dot-product score
does the rest.
"""

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, masks, modifiers, scores
from jattn.nn._shared import (
    Given,
    Linear,
    attending,
    is_real,
    joined_masks,
    joined_modifiers,
    promoted,
    sequence,
)
from jattn.request import MaskLike, ModifierLike

Array = jax.Array


class _SequencePooling(nnx.Module):
    """Pooling over time; what the modules below share."""

    features: int
    attend: Callable[..., Any]
    dtype: Any
    context_pattern: str  # of attend's output [..., T, N, V]
    weights_pattern: str  # of attend's weights [..., N, T, S]

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        """Query `[T, N, H]`, key `[..., S, N, H]` and value `[..., S, N, V]`."""
        raise NotImplementedError

    def _bias(self) -> Array | None:
        """What is added to the scores."""
        return None

    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: Literal[False] = False,
        **options: Unpack[Given],
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: Literal[True],
        **options: Unpack[Given],
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: bool,
        **options: Unpack[Given],
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def __call__(
        self,
        x: Array,
        *,
        lengths: Array | None = None,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        return_weights: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Pool x `[..., S, D]` over S.

        Args:
          x: `[..., S, D]`, floating point.
          lengths: integers `[...]` from 0 to S, the number of real steps of each sequence. What
            lies past them changes nothing, not even where it is NaN. A sequence of none gives
            zeros. Traced lengths beyond S allow all. None: all steps are real.
          mask, modifier, positions: as `jattn.attend` takes them, with the class's N and T.
          return_weights: also return the weights.

        Returns:
          The context, or a tuple of it and the weights; the class says their shapes.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 0 … S.
          TypeError: x is not floating point, or lengths are not integers.
        """
        x = sequence(x, self.features)
        if lengths is not None:
            checks.assert_shapes(x=(x, "... S D"), lengths=(lengths, "..."))
            mask = joined_masks(masks.padding(lengths), mask)
            # A NaN past the end would reach the gradient of the kernel
            x = jnp.where(is_real(lengths, x.shape[-2])[..., None], x, 0)
        query, key, value = promoted(self.dtype, *self._operands(x))
        bias = self._bias()
        if bias is not None:
            modifier = joined_modifiers(modifiers.bias(bias.astype(query.dtype)), modifier)
        result = self.attend(
            jnp.broadcast_to(query, (*x.shape[:-2], *query.shape)), key, value,
            score=scores.dot_product, mask=mask, modifier=modifier, positions=positions,
            return_weights=return_weights,
        )  # fmt: skip
        if not return_weights:
            return rearrange(result, self.context_pattern)
        context, weights = result
        return rearrange(context, self.context_pattern), rearrange(weights, self.weights_pattern)


class FeaturePooling(_SequencePooling):
    """Every feature is pooled with its own weights: a head of width 1, scored by the whole step.

        α = softmax over time of tanh(W x + b),   context = Σ_t α_t ⊙ x_t

    The context is `[..., D]`, the weights α are `[..., S, D]`.

    Args:
      features: D.
      use_bias: whether there is a b.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation.

    Attributes:
      key: W and b, a Linear `[D, D]`.

    Raises:
      ValueError: D is not positive; in a call, shapes or lengths that do not fit.

    Paper: Shen et al. 2018, https://arxiv.org/abs/1709.04696, whose score has one more layer

    Example:
      >>> pooling = FeaturePooling(3, rngs=nnx.Rngs(0))
      >>> context, weights = pooling(jnp.ones((2, 5, 3)), return_weights=True)
      >>> context.shape, weights.shape
      ((2, 3), (2, 5, 3))
    """

    context_pattern = "... 1 D 1 -> ... D"
    weights_pattern = "... D 1 S -> ... S D"

    def __init__(
        self,
        features: int,
        *,
        use_bias: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(features=features)
        checks.assert_bool(use_bias=use_bias)
        self.features, self.attend, self.dtype = features, attending(attend), dtype
        self.key = Linear(
            features, features, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        key = jnp.tanh(self.key(x))
        return jnp.ones((1, self.features, 1), key.dtype), key[..., None], x[..., None]


class MultiHopPooling(_SequencePooling):
    """Several learned queries, each of which pools the sequence into one row.

        A = softmax over time of W x + b,   context = Aᵀ x

    Row r of W is the query of hop r. The softmax cancels b, which is here for the weights of
    others. The context is `[..., R, D]`, the weights Aᵀ are `[..., R, S]`.

    Args:
      features: D.
      num_hops: R.
      use_bias: whether there is a b.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation.

    Attributes:
      query: W, `[R, D]`.
      bias: b, `[R]`, or None.

    Raises:
      ValueError: a size is not positive; in a call, shapes or lengths that do not fit.

    Paper: Lin et al. 2017, https://arxiv.org/abs/1703.03130, whose score has one more layer

    Example:
      >>> pooling = MultiHopPooling(3, 2, rngs=nnx.Rngs(0))
      >>> context, weights = pooling(jnp.ones((5, 3)), return_weights=True)
      >>> context.shape, weights.shape
      ((2, 3), (2, 5))
    """

    context_pattern = "... R 1 D -> ... R D"
    weights_pattern = "... 1 R S -> ... R S"

    def __init__(
        self,
        features: int,
        num_hops: int,
        *,
        use_bias: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(features=features, num_hops=num_hops)
        checks.assert_bool(use_bias=use_bias)
        self.features, self.attend, self.dtype = features, attending(attend), dtype
        initializer = initializers.lecun_normal(in_axis=-1, out_axis=-2)
        self.query = nnx.Param(initializer(rngs.params(), (num_hops, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_hops, param_dtype)) if use_bias else nnx.data(None)

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        return self.query[:, None], x[..., None, :], x[..., None, :]

    def _bias(self) -> Array | None:
        return None if self.bias is None else self.bias[:, None]


class LearnedQueryPooling(_SequencePooling):
    """One learned query, which the projected steps are compared with.

        u = tanh(W h + b),   α = softmax(uᵀ u_w),   context = Σ_t α_t h_t

    The context is `[..., D]`, the weights α are `[..., S]`.

    Args:
      features: D.
      hidden_features: width of u and u_w, default D.
      use_bias: whether there is a b.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: for initialisation.

    Attributes:
      key: W and b, a Linear `[D, hidden_features]`.
      query: u_w, `[hidden_features]`.

    Raises:
      ValueError: a width is not positive; in a call, shapes or lengths that do not fit.

    Paper: Yang et al. 2016, https://aclanthology.org/N16-1174

    Example:
      >>> pooling = LearnedQueryPooling(3, rngs=nnx.Rngs(0))
      >>> context, weights = pooling(jnp.ones((5, 3)), return_weights=True)
      >>> context.shape, weights.shape
      ((3,), (5,))
    """

    context_pattern = "... 1 1 D -> ... D"
    weights_pattern = "... 1 1 S -> ... S"

    def __init__(
        self,
        features: int,
        hidden_features: int | None = None,
        *,
        use_bias: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden_features = features if hidden_features is None else hidden_features
        checks.assert_positive(features=features, hidden_features=hidden_features)
        checks.assert_bool(use_bias=use_bias)
        self.features, self.attend, self.dtype = features, attending(attend), dtype
        self.key = Linear(
            features,
            hidden_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        weight = initializers.lecun_normal()(rngs.params(), (hidden_features, 1), param_dtype)
        self.query = nnx.Param(weight[:, 0])

    def _operands(self, x: Array) -> tuple[Array, Array, Array]:
        key = jnp.tanh(self.key(x))
        return self.query[None, None, :], key[..., None, :], x[..., None, :]
