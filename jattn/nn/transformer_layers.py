"""The Transformer's layers: all that PyTorch's can do, with jattn's masks, the batch first.

Papers: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; normalised first: Xiong et al. 2020,
https://arxiv.org/abs/2002.04745
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks
from jattn.nn._shared import Linear, by_rows, dropout, normalized, promoted, sequence
from jattn.nn.cache import Cache
from jattn.nn.multi_head import MultiHeadAttention
from jattn.request import MaskLike, ModifierLike

Array = jax.Array
Activation = str | Callable[[Array], Array]
Heads = tuple[Array, Array]


def relu(x: Array) -> Array:
    """max(x, 0). (`jax.nn.relu` cannot be pickled.)

    Example:
      >>> relu(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(x)


def gelu(x: Array) -> Array:
    """x · Φ(x), by the error function; `jax.nn.gelu` approximates it by tanh.

    Example:
      >>> gelu(jnp.array([0.0, 10.0]))
      Array([ 0., 10.], dtype=float32)
    """
    return jax.nn.gelu(x, approximate=False)


def silu(x: Array) -> Array:
    """x · σ(x). (`jax.nn.silu` cannot be pickled.)

    Example:
      >>> silu(jnp.array([0.0, 100.0]))
      Array([  0., 100.], dtype=float32)
    """
    return jax.nn.silu(x)


def gelu_tanh(x: Array) -> Array:
    """x · Φ(x), approximated by tanh: GPT-2's, which `transformers` calls gelu_new.

    Example:
      >>> gelu_tanh(jnp.array([0.0, 10.0]))
      Array([ 0., 10.], dtype=float32)
    """
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": relu, "gelu": gelu}
_OF_ENTRIES = relu, gelu, gelu_tanh, silu  # a user's function may look at other axes


def activation_of(activation: Activation) -> Callable[[Array], Array]:
    """The activation that a name means, "relu" or "gelu" (by the error function), or a function.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is neither a name nor a function.

    Example:
      >>> activation_of("relu").__name__
      'relu'
    """
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            expected = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"activation must be {expected} or a function, got {activation!r}")
        activation = _ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a name or a function, got {activation!r}")
    return activation


class FeedForward(nnx.Module):
    """Two Linears with an activation and dropout between them.

        output = W₂ dropout(activation(W₁ x + b₁)) + b₂

    Args:
      features: D, the width of input and output.
      mlp_features: the width between the Linears.
      activation: "relu", "gelu" (by the error function), or a function.
      dropout_rate: between the Linears.
      use_bias: whether the Linears have biases.
      dtype: to compute in; None: the one to which input and parameters promote.
      param_dtype: dtype of the parameters.
      kernel_init: of both kernels.
      rngs: for initialisation and dropout.

    Raises:
      ValueError: a size is not positive, or the activation has an unknown name.
      TypeError: the activation is neither a name nor a function.

    Example:
      >>> FeedForward(4, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int,
        mlp_features: int,
        *,
        activation: Activation = "relu",
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = initializers.xavier_uniform(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(features=features, mlp_features=mlp_features)
        checks.assert_bool(use_bias=use_bias)
        options: dict[str, Any] = {
            "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype,
            "kernel_init": kernel_init, "rngs": rngs,
        }  # fmt: skip
        self.linear1 = Linear(features, mlp_features, **options)
        self.linear2 = Linear(mlp_features, features, **options)
        self.activation = activation_of(activation)
        self.dropout = dropout(dropout_rate, rngs)

    def __call__(self, x: Array, *, deterministic: bool | None = None) -> Array:
        """Map x `[..., D]` to `[..., D]`."""

        def of_rows(x: Array) -> Array:
            inner = self.activation(self.linear1(x))
            return self.linear2(self.dropout(inner, deterministic=deterministic))

        if self.activation in _OF_ENTRIES and not self.dropout.broadcast_dims:
            return by_rows(of_rows, x)
        return of_rows(x)


class GatedFeedForward(nnx.Module):
    """Two Linears, one of which gates the other, and a third (SwiGLU).

        output = W_down (activation(W_gate x) ⊙ W_up x)

    Args:
      features: D, the width of input and output.
      mlp_features: the width between the Linears.
      activation: a function; `silu` makes it SwiGLU.
      use_bias: whether the Linears have biases.
      dtype: to compute in; None: the one to which input and parameters promote.
      param_dtype: dtype of the parameters.
      kernel_init: of the kernels.
      rngs: for initialisation.

    Attributes:
      gate, up, down: the Linears.

    Raises:
      ValueError: a size is not positive.
      TypeError: the activation is no function.

    Paper: Shazeer 2020, https://arxiv.org/abs/2002.05202

    Example:
      >>> GatedFeedForward(4, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 4))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int,
        mlp_features: int,
        *,
        activation: Callable[[Array], Array] = silu,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = initializers.lecun_normal(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(features=features, mlp_features=mlp_features)
        checks.assert_bool(use_bias=use_bias)
        if not callable(activation):
            raise TypeError(f"activation must be a function, got {activation!r}")
        options: dict[str, Any] = {
            "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype,
            "kernel_init": kernel_init, "rngs": rngs,
        }  # fmt: skip
        self.gate = Linear(features, mlp_features, **options)
        self.up = Linear(features, mlp_features, **options)
        self.down = Linear(mlp_features, features, **options)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """Map x `[..., D]` to `[..., D]`."""

        def of_rows(x: Array) -> Array:
            return self.down(self.activation(self.gate(x)) * self.up(x))

        return by_rows(of_rows, x) if self.activation in _OF_ENTRIES else of_rows(x)


class TransformerEncoderLayer(nnx.Module):
    """Self-attention and a network of two Linears, each with a residual connection.

        post-norm:  y = norm₁(x + attention(x)),   output = norm₂(y + mlp(y))
        pre-norm:   y = x + attention(norm₁(x)),   output = y + mlp(norm₂(y))

    With `mask=masks.causal()` and a cache it is the layer of a decoder without an encoder.

    Args:
      features: D.
      num_heads: N.
      mlp_features: the width between the Linears.
      dropout_rate: of the attention weights, after the attention, between the Linears, after them.
      activation: "relu", "gelu" (by the error function), or a function.
      epsilon: of the norms.
      norm_first: pre-norm.
      use_bias: whether Linears and norms have biases.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: the one to which input and parameters promote.
      param_dtype: dtype of the parameters.
      kernel_init: of every kernel.
      rngs: for initialisation and dropout.

    Attributes:
      self_attention: a `MultiHeadAttention`.
      mlp: a `FeedForward`.
      norm1, norm2: LayerNorms.

    Raises:
      ValueError: a size does not fit, or the activation has an unknown name.

    Example:
      >>> layer = TransformerEncoderLayer(4, 2, 16, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 4)), deterministic=True).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int = 2048,
        *,
        dropout_rate: float = 0.1,
        activation: Activation = "relu",
        epsilon: float = 1e-5,
        norm_first: bool = False,
        use_bias: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = initializers.xavier_uniform(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_bool(norm_first=norm_first)
        self.features, self.norm_first, self.dtype = features, norm_first, dtype
        options: dict[str, Any] = {
            "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs,
        }  # fmt: skip
        inner = options | {"dropout_rate": dropout_rate, "kernel_init": kernel_init}
        self.self_attention = MultiHeadAttention(num_heads, features, attend=attend, **inner)
        self.mlp = FeedForward(features, mlp_features, activation=activation, **inner)
        self.norm1, self.norm2 = (layer_norm(features, epsilon, options) for _ in range(2))
        self.dropout = dropout(dropout_rate, rngs)

    def empty_cache(
        self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None
    ) -> Cache:
        """A cache for up to `capacity` tokens an example."""
        return self.self_attention.empty_cache(batch, capacity, dtype=dtype)

    def __call__(
        self,
        x: Array,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        cache: Cache | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Encode.

        Args:
          x: `[..., T, D]`.
          mask, modifier: as `jattn.attend` takes them.
          cache: keys and values of earlier tokens, as `MultiHeadAttention` takes it.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          `[..., T, D]`; with a cache a tuple of it and the new cache.

        Raises:
          ValueError: a shape does not fit.
          TypeError: x is not floating point.
        """
        x = _input(self, "x", x)

        def attention(x: Array) -> Any:
            return self.self_attention(
                x, mask=mask, modifier=modifier, cache=cache, deterministic=deterministic
            )

        x, new = _residual(self, x, self.norm1, attention, deterministic)
        x = _feed_forward(self, x, self.norm2, deterministic)
        return x if cache is None else (x, new)


class TransformerDecoderLayer(nnx.Module):
    """Self-attention, attention to the encoder's output, and a network of two Linears.

        post-norm:  y = norm₁(x + attention(x)),   z = norm₂(y + attention(y, memory)),
                    output = norm₃(z + mlp(z))
        pre-norm:   y = x + attention(norm₁(x)),   z = y + attention(norm₂(y), memory),
                    output = z + mlp(norm₃(z))

    Args:
      features: D.
      num_heads: N.
      mlp_features: the width between the Linears.
      dropout_rate: of the weights of both attentions, after each, between the Linears, after them.
      activation, epsilon, norm_first, use_bias, attend, dtype, param_dtype, kernel_init, rngs: as
        `TransformerEncoderLayer` takes them.

    Attributes:
      self_attention, cross_attention: `MultiHeadAttention`s.
      mlp: a `FeedForward`.
      norm1, norm2, norm3: LayerNorms.

    Raises:
      ValueError: a size does not fit, or the activation has an unknown name.

    Example:
      >>> from jattn import masks
      >>> layer = TransformerDecoderLayer(4, 2, 16, rngs=nnx.Rngs(0))
      >>> x, memory = jnp.ones((2, 5, 4)), jnp.ones((2, 7, 4))
      >>> layer(x, memory, mask=masks.causal(), deterministic=True).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int = 2048,
        *,
        dropout_rate: float = 0.1,
        activation: Activation = "relu",
        epsilon: float = 1e-5,
        norm_first: bool = False,
        use_bias: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = initializers.xavier_uniform(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_bool(norm_first=norm_first)
        self.features, self.norm_first, self.dtype = features, norm_first, dtype
        options: dict[str, Any] = {
            "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs,
        }  # fmt: skip
        inner = options | {"dropout_rate": dropout_rate, "kernel_init": kernel_init}
        self.self_attention = MultiHeadAttention(num_heads, features, attend=attend, **inner)
        self.cross_attention = MultiHeadAttention(num_heads, features, attend=attend, **inner)
        self.mlp = FeedForward(features, mlp_features, activation=activation, **inner)
        norms = (layer_norm(features, epsilon, options) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = norms
        self.dropout = dropout(dropout_rate, rngs)

    def empty_cache(
        self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None
    ) -> Cache:
        """A cache of the self-attention, for up to `capacity` tokens an example."""
        return self.self_attention.empty_cache(batch, capacity, dtype=dtype)

    def remember(self, memory: Array) -> Heads:
        """The heads of the encoder's output `[..., S, D]`: what a call takes in its place."""
        return self.cross_attention.project(_input(self, "memory", memory))

    def __call__(
        self,
        x: Array,
        memory: Array | Heads,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        memory_mask: MaskLike = None,
        memory_modifier: ModifierLike = None,
        cache: Cache | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Decode.

        Args:
          x: `[..., T, D]`.
          memory: the encoder's output `[..., S, D]`, or its heads, as `remember` gives them.
          mask, modifier: of the self-attention, as `jattn.attend` takes them; none is causal by
            itself.
          memory_mask, memory_modifier: of the attention to the encoder's output.
          cache: keys and values of earlier tokens, as `MultiHeadAttention` takes it.
          return_weights: also return the weights of the attention to the encoder's output.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          `[..., T, D]`; or a tuple of it, of the weights `[..., N, T, S]` if asked for, and of the
          new cache if one is given.

        Raises:
          ValueError: a shape does not fit.
          TypeError: x or memory is not floating point.
        """
        x = _input(self, "x", x)
        key, value = memory if isinstance(memory, (tuple, list)) else self.remember(memory)
        positions = None
        if cache is not None:
            places = jnp.arange(key.shape[-3], dtype=jnp.int32)
            positions = cache.next_positions(x.shape[-2]), places

        def attention(x: Array) -> Any:
            return self.self_attention(
                x, mask=mask, modifier=modifier, cache=cache, deterministic=deterministic
            )

        def cross_attention(x: Array) -> Any:
            return self.cross_attention.attend_projected(
                x, key, value, mask=memory_mask, modifier=memory_modifier, positions=positions,
                return_weights=return_weights, deterministic=deterministic,
            )  # fmt: skip

        x, new = _residual(self, x, self.norm1, attention, deterministic)
        x, weights = _residual(self, x, self.norm2, cross_attention, deterministic)
        x = _feed_forward(self, x, self.norm3, deterministic)
        extras = (*([weights] if return_weights else []), *([new] if cache is not None else []))
        return (x, *extras) if extras else x


def layer_norm(features: int, epsilon: float, options: dict[str, Any]) -> nnx.LayerNorm:
    """The LayerNorm of a layer, or behind a stack of layers.

    Example:
      >>> layer_norm(3, 1e-5, {"rngs": nnx.Rngs(0)}).epsilon
      1e-05
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon!r}")
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=False, **options)


def _input(layer: Any, name: str, x: Array) -> Array:
    """x, checked, in the dtype in which the layer computes."""
    x = sequence(x, layer.features, name)
    return promoted(layer.dtype, x, layer.mlp.linear1.kernel[...])[0]


def _residual(
    layer: Any, x: Array, norm: nnx.LayerNorm, block: Callable[[Array], Any], deterministic: Any
) -> tuple[Array, Any]:
    """A block with its residual connection, and what it returns besides its output, or None."""

    def dropped(x: Array) -> tuple[Array, Any]:
        result = block(x)
        output, extra = result if isinstance(result, tuple) else (result, None)
        return layer.dropout(output, deterministic=deterministic), extra

    if layer.norm_first:
        output, extra = dropped(normalized(norm, x))
        return x + output, extra
    output, extra = dropped(x)
    return normalized(norm, x + output), extra


def _feed_forward(layer: Any, x: Array, norm: nnx.LayerNorm, deterministic: Any) -> Array:
    def mlp(x: Array) -> Array:
        return layer.mlp(x, deterministic=deterministic)

    return _residual(layer, x, norm, mlp, deterministic)[0]
