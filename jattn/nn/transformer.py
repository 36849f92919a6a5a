"""Stacks of the Transformer's layers, and the whole of encoder and decoder.

Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks
from jattn.nn._shared import normalized
from jattn.nn.cache import Cache, of_layers
from jattn.nn.transformer_layers import (
    Activation,
    Heads,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    layer_norm,
)
from jattn.request import MaskLike, ModifierLike

Array = jax.Array
Caches = tuple[Cache, ...]


class TransformerEncoder(nnx.Module):
    """Layers one after another, and a norm behind them if one is given.

    Args:
      layers: a list of `TransformerEncoderLayer`s, or of modules that are called as they are.
      norm: a module, such as a LayerNorm, for the output of the last layer; None: none. (PyTorch's
        LayerNorm has `epsilon=1e-5`, that of Flax 1e-6.)

    Raises:
      ValueError: there is no layer.
      TypeError: the layers are no list.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> layers = [TransformerEncoderLayer(4, 2, 16, rngs=rngs) for _ in range(3)]
      >>> encoder = TransformerEncoder(layers, nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs))
      >>> encoder(jnp.ones((2, 5, 4)), deterministic=True).shape
      (2, 5, 4)
    """

    def __init__(
        self, layers: Sequence[Callable[..., Any]], norm: Callable[[Array], Array] | None = None
    ):
        self.layers, self.norm = _stack(layers), nnx.data(norm)

    def empty_cache(
        self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None
    ) -> Caches:
        """A cache for each layer, for up to `capacity` tokens an example."""
        return tuple(layer.empty_cache(batch, capacity, dtype=dtype) for layer in self.layers)

    def __call__(
        self,
        x: Array,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        cache: Caches | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Encode x `[..., T, D]`.

        The arguments are those of a layer, which all layers get; `cache` is one for each layer, and
        so is what is returned beside the output.
        """
        options: dict[str, Any] = {
            "mask": mask, "modifier": modifier, "deterministic": deterministic,
        }  # fmt: skip
        new = []
        for layer, of_layer in zip(self.layers, of_layers(cache, len(self.layers)), strict=True):
            if of_layer is None:
                x = layer(x, **options)
            else:
                x, of_layer = layer(x, cache=of_layer, **options)
                new.append(of_layer)
        x = x if self.norm is None else normalized(self.norm, x)
        return x if cache is None else (x, tuple(new))


class TransformerDecoder(nnx.Module):
    """Layers one after another, all of which attend to the memory, and a norm if one is given.

    Args:
      layers: a list of `TransformerDecoderLayer`s, or of modules that are called as they are.
      norm: as `TransformerEncoder` takes it.

    Raises:
      ValueError: there is no layer.
      TypeError: the layers are no list.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> decoder = TransformerDecoder([TransformerDecoderLayer(4, 2, 16, rngs=rngs)])
      >>> decoder(jnp.ones((2, 5, 4)), jnp.ones((2, 7, 4)), deterministic=True).shape
      (2, 5, 4)
    """

    def __init__(
        self, layers: Sequence[Callable[..., Any]], norm: Callable[[Array], Array] | None = None
    ):
        self.layers, self.norm = _stack(layers), nnx.data(norm)

    def empty_cache(
        self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None
    ) -> Caches:
        """A cache for each layer, for up to `capacity` tokens an example."""
        return tuple(layer.empty_cache(batch, capacity, dtype=dtype) for layer in self.layers)

    def remember(self, memory: Array) -> tuple[Heads, ...]:
        """The heads of the encoder's output for each layer: what a call takes in its place."""
        return tuple(layer.remember(memory) for layer in self.layers)

    def __call__(
        self,
        x: Array,
        memory: Array | tuple[Heads, ...],
        *,
        cache: Caches | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """Decode x `[..., T, D]`.

        Args:
          x: `[..., T, D]`.
          memory: the encoder's output `[..., S, D]`, or what `remember` makes of it.
          cache: one for each layer.
          return_weights: also return the weights of each layer's attention to the memory.
          **options: `mask`, `modifier`, `memory_mask`, `memory_modifier` and `deterministic`, as a
            layer takes them; all layers get them.

        Returns:
          `[..., T, D]`; or a tuple of it, of the weights if asked for, and of the new caches if
          there is a cache. Weights and caches are tuples with an entry for each layer.
        """
        several = isinstance(memory, (tuple, list))
        if several and len(memory) != len(self.layers):
            must = f"memory must have an entry for each layer, {len(self.layers)}"
            raise ValueError(f"{must}, got {len(memory)}: `remember` makes them")
        weights, new = [], []
        for n, of_layer in enumerate(of_layers(cache, len(self.layers))):
            result = self.layers[n](
                x, memory[n] if several else memory, cache=of_layer,
                return_weights=return_weights, **options,
            )  # fmt: skip
            x, *extras = result if isinstance(result, tuple) else (result,)
            if return_weights:
                weights.append(extras.pop(0))
            new += extras
        x = x if self.norm is None else normalized(self.norm, x)
        extras = [tuple(weights)] * return_weights + [tuple(new)] * (cache is not None)
        return (x, *extras) if extras else x


def _stack(layers: Sequence[Callable[..., Any]]) -> Any:
    if not isinstance(layers, (list, tuple, nnx.List)):
        raise TypeError(f"layers must be a list of layers, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    return nnx.List(layers)


class Transformer(nnx.Module):
    """Encoder and decoder, as `torch.nn.Transformer`: both end in a LayerNorm.

    Args:
      features: D.
      num_heads: N.
      num_encoder_layers, num_decoder_layers: the number of layers of each.
      mlp_features: the width between the Linears of a layer.
      dropout_rate, activation, epsilon, norm_first, use_bias, attend, dtype, param_dtype,
        kernel_init, rngs: as `TransformerEncoderLayer` takes them.

    Attributes:
      encoder: a `TransformerEncoder`; any module that is called as it is may take its place.
      decoder: a `TransformerDecoder`; likewise.

    Raises:
      ValueError: a size does not fit, or the activation has an unknown name.

    Example:
      >>> from jattn import masks
      >>> model = Transformer(4, 2, 1, 1, 16, rngs=nnx.Rngs(0))
      >>> source, target = jnp.ones((2, 7, 4)), jnp.ones((2, 5, 4))
      >>> model(source, target, target_mask=masks.causal(), deterministic=True).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        features: int = 512,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
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
        checks.assert_positive(
            num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers
        )
        common: dict[str, Any] = {
            "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs,
        }  # fmt: skip
        options = common | {
            "dropout_rate": dropout_rate, "activation": activation, "epsilon": epsilon,
            "norm_first": norm_first, "attend": attend, "kernel_init": kernel_init,
        }  # fmt: skip

        def layers(kind: Callable[..., Any], number: int) -> list[Any]:
            return [kind(features, num_heads, mlp_features, **options) for _ in range(number)]

        def norm() -> nnx.LayerNorm:
            return layer_norm(features, epsilon, common)

        encoder_layers = layers(TransformerEncoderLayer, num_encoder_layers)
        self.encoder = TransformerEncoder(encoder_layers, norm())
        decoder_layers = layers(TransformerDecoderLayer, num_decoder_layers)
        self.decoder = TransformerDecoder(decoder_layers, norm())

    def __call__(
        self,
        source: Array,
        target: Array,
        *,
        source_mask: MaskLike = None,
        source_modifier: ModifierLike = None,
        target_mask: MaskLike = None,
        target_modifier: ModifierLike = None,
        memory_mask: MaskLike = None,
        memory_modifier: ModifierLike = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Encode the source, then decode the target.

        Args:
          source: `[..., S, D]`.
          target: `[..., T, D]`.
          source_mask, source_modifier: of the encoder, as `jattn.attend` takes them.
          target_mask, target_modifier: of the decoder's self-attention; usually `masks.causal()`.
          memory_mask, memory_modifier: of the decoder's attention to the encoder's output: for
            padded sources the padding again, which nothing derives from `source_mask`.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          `[..., T, D]`.

        Raises:
          ValueError: a shape does not fit.
          TypeError: source or target is not floating point.
        """
        memory = self.encoder(
            source, mask=source_mask, modifier=source_modifier, deterministic=deterministic
        )
        return self.decoder(
            target, memory,
            mask=target_mask, modifier=target_modifier,
            memory_mask=memory_mask, memory_modifier=memory_modifier,
            deterministic=deterministic,
        )  # fmt: skip
