"""A Transformer that translates.

Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks, masks
from jattn.functional.pytree import named_tuple
from jattn.models.decoding import zeros_like_batch
from jattn.models.encoder_decoder import (
    EncoderDecoder,
    check_config,
    check_lengths,
    nan_where_lengths_are_wrong,
)
from jattn.models.tokens import Embed, embed
from jattn.nn._shared import Linear
from jattn.nn.positions import SinusoidalPositions
from jattn.nn.transformer import Caches, TransformerDecoder, TransformerEncoder
from jattn.nn.transformer_layers import (
    Activation,
    Heads,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    layer_norm,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `TransformerTranslator`, its form, and its special token ids.

    Attributes:
      source_vocabulary: number of source ids.
      target_vocabulary: C, number of target ids, the special ones included.
      features: D, the width of embeddings and layers; even.
      num_heads: N.
      num_encoder_layers, num_decoder_layers: the number of layers of each.
      mlp_features: the width between the two Linears of a layer.
      dropout_rate: of the embeddings, and in every layer.
      activation: "relu", "gelu" (by the error function), or a function.
      norm_first: whether a layer normalises its input rather than its output.
      tied: whether the table of target embeddings is also the kernel of the logits, which then have
        no bias.
      pad, start, end: target ids: what fills a sequence after its end, what the decoder reads
        first, what ends it.

    Raises:
      ValueError: a size is not positive, the rate lies outside 0 … 1, or a special id is not in the
        target vocabulary.

    Example:
      >>> Config.small(100, 120).features
      64
    """

    source_vocabulary: int
    target_vocabulary: int
    features: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    mlp_features: int = 2048
    dropout_rate: float = 0.1
    activation: Activation = "relu"
    norm_first: bool = False
    tied: bool = False
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        check_config(
            self, "source_vocabulary", "target_vocabulary", "features", "num_heads",
            "num_encoder_layers", "num_decoder_layers", "mlp_features",
        )  # fmt: skip
        checks.assert_bool(norm_first=self.norm_first, tied=self.tied)

    @classmethod
    def small(cls, source_vocabulary: int, target_vocabulary: int) -> "Config":
        """Two layers of width 64 on each side, normalised first."""
        return cls(source_vocabulary, target_vocabulary, 64, 4, 2, 2, 128, norm_first=True)


class Encoder(nnx.Module):
    """Embedding and positions, then a `TransformerEncoder` that ends in a LayerNorm.

    Args:
      config: sizes and form.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> encoder = Encoder(Config.small(11, 13), rngs=nnx.Rngs(0))
      >>> outputs, _ = encoder(jnp.ones((2, 7), int), lengths=jnp.array([4, 7]), deterministic=True)
      >>> outputs.shape
      (2, 7, 64)
    """

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedding = Embed(config.source_vocabulary, config.features, **options)
        self.positions = _positions(config, rngs)
        layers = _layers(TransformerEncoderLayer, config.num_encoder_layers, config)
        self.stack = TransformerEncoder(
            [layer(attend=attend, **options) for layer in layers],
            layer_norm(config.features, 1e-5, options),
        )

    def __call__(
        self, source: Array, *, lengths: Array | None = None, deterministic: bool | None = None
    ) -> tuple[Array, None]:
        """Encode.

        Args:
          source: token ids `[B, S]`.
          lengths: integers `[B]` from 1 to S; None: the padding is read as if it were text.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Outputs `[B, S, D]`, and None for a state.

        Raises:
          ValueError: a shape does not fit, an id is unknown, or a length lies outside 1 … S. (Under
            jit, where values cannot be seen: NaN.)
          TypeError: source or lengths are not integers.
        """
        check_lengths(lengths, source=source)
        embedded = _scaled(embed("source", source, self.embedding))
        x = self.positions(embedded, deterministic=deterministic)
        mask = None if lengths is None else masks.padding(lengths)
        outputs = self.stack(x, mask=mask, deterministic=deterministic)
        return nan_where_lengths_are_wrong(outputs, lengths, 1), None


@named_tuple
class Memory(NamedTuple):
    """What a decoder reads of a batch of sources at every step; its `remember` makes it."""

    heads: tuple[Heads, ...]  # key and value of each layer, [B, S, N, H]
    lengths: Array | None  # how many of the S positions are real, [B]; None: all

    @property
    def mask(self) -> masks.Mask | None:
        """The positions that are real; None: all."""
        return None if self.lengths is None else masks.padding(self.lengths)


class Decoder(nnx.Module):
    """Embedding and positions, a `TransformerDecoder` that ends in a LayerNorm, and logits.

    Its state is a cache for each layer, of the keys and values of the tokens so far.

    Args:
      config, attend, dtype, param_dtype, rngs: as `Encoder` takes them.

    Example:
      >>> decoder = Decoder(Config.small(11, 13), rngs=nnx.Rngs(0))
      >>> memory, caches = decoder.remember(jnp.ones((2, 7, 64))), decoder.stack.empty_cache(2, 5)
      >>> caches, logits = decoder.step(jnp.ones(2, int), caches, memory)
      >>> logits.shape
      (2, 13)
    """

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedding = Embed(config.target_vocabulary, config.features, **options)
        self.positions = _positions(config, rngs)
        layers = _layers(TransformerDecoderLayer, config.num_decoder_layers, config)
        self.stack = TransformerDecoder(
            [layer(attend=attend, **options) for layer in layers],
            layer_norm(config.features, 1e-5, options),
        )
        self.out = nnx.data(None)
        if not config.tied:
            self.out = Linear(config.features, config.target_vocabulary, **options)

    def remember(self, outputs: Array, lengths: Array | None = None) -> Memory:
        """What the decoder attends to: the heads of the encoder's outputs `[B, S, D]`.

        Lengths, integers `[B]`, hide the padding.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 1 … S.
          TypeError: the outputs are not floating point, or the lengths no integers.
        """
        checks.assert_shapes(outputs=(outputs, "B S width"))
        check_lengths(lengths, outputs=outputs)
        outputs = nan_where_lengths_are_wrong(outputs, lengths, 1)
        if lengths is not None:  # a length of 0 would hide the NaN
            lengths = jnp.maximum(jnp.asarray(lengths), 1)
        return Memory(self.stack.remember(outputs), lengths)

    def __call__(
        self,
        target_in: Array,
        state: Caches | None,
        memory: Memory,
        *,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Decode with every step's input given (teacher forcing), all at once.

        Args:
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          state: caches of earlier tokens, or None.
          memory: from `remember`.
          return_weights: also return the weights with which the last layer attends to the source,
            the mean of its heads.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, or a tuple of them and weights `[B, T, S]` before dropout.

        Raises:
          ValueError: a shape does not fit; or an id is unknown (under jit: NaN).
          TypeError: ids are not integers.
        """
        checks.assert_shapes(target_in=(target_in, "B T"))
        _, logits, weights = self._decode(
            "target_in", target_in, state, memory, return_weights, deterministic
        )
        return (logits, weights) if return_weights else logits

    def step(self, tokens: Array, state: Caches, memory: Memory) -> tuple[Caches, Array]:
        """One step without dropout.

        Token ids `[B]` and a state give the next state and logits `[B, C]`.
        """
        checks.assert_shapes(tokens=(tokens, "B"))
        tokens = jnp.asarray(tokens)[:, None]
        state, logits, _ = self._decode("tokens", tokens, state, memory, False, True)
        return state, logits[:, 0]

    def _decode(
        self,
        name: str,
        tokens: Array,
        state: Caches | None,
        memory: Memory,
        return_weights: bool,
        deterministic: bool | None,
    ) -> tuple[Any, Array, Array | None]:
        """The next state, logits and weights."""
        positions = None if state is None else state[0].next_positions(tokens.shape[1])
        embedded = _scaled(embed(name, tokens, self.embedding))
        x = self.positions(embedded, positions=positions, deterministic=deterministic)
        result = self.stack(
            x, memory.heads, mask=masks.causal(), memory_mask=memory.mask, cache=state,
            return_weights=return_weights, deterministic=deterministic,
        )  # fmt: skip
        x, *extras = result if isinstance(result, tuple) else (result,)
        weights = extras[0][-1].mean(axis=-3) if return_weights else None
        return (None if state is None else extras[-1]), self._logits(x), weights

    def _logits(self, x: Array) -> Array:
        return self.embedding.attend(x) if self.out is None else self.out(x)


class TransformerTranslator(EncoderDecoder):
    """A Transformer that translates: sinusoidal positions, embeddings times √D.

        logits = W decoder(√D E_y y + P, encoder(√D E_x x + P)) + b

    All steps of training run at once; a search keeps the keys and values of earlier tokens.

    Args:
      config: sizes, form and special ids.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> model = TransformerTranslator(Config.small(11, 13), rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> source, lengths = jnp.array([[3, 4, 5], [6, 7, 0]]), jnp.array([3, 2])
      >>> model(source, jnp.ones((2, 4), int), lengths=lengths).shape
      (2, 4, 13)
      >>> found, weights = model.greedy(source, lengths=lengths, max_length=6, return_weights=True)
      >>> found.tokens.shape, weights.shape
      ((2, 6), (2, 6, 3))
    """

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.encoder = Encoder(config, attend=attend, **options)
        self.decoder = Decoder(config, attend=attend, **options)

    def _begin(self, state: None, source: Array, max_length: int) -> Caches:
        """Empty caches, sharded as the source is."""
        make = functools.partial(self.decoder.stack.empty_cache, source.shape[0], max_length)
        return zeros_like_batch(make, source[:, 0])


def _positions(config: Config, rngs: nnx.Rngs) -> SinusoidalPositions:
    return SinusoidalPositions(config.features, dropout_rate=config.dropout_rate, rngs=rngs)


def _scaled(embedded: Array) -> Array:
    """The embeddings times √D."""
    return embedded * jnp.asarray(embedded.shape[-1] ** 0.5, embedded.dtype)


def _layers(kind: Callable[..., Any], number: int, config: Any) -> list[Callable[..., Any]]:
    """Constructors of layers of the sizes and form of a config."""
    layer = functools.partial(
        kind, config.features, config.num_heads, config.mlp_features,
        dropout_rate=config.dropout_rate, activation=config.activation,
        norm_first=config.norm_first,
    )  # fmt: skip
    return [layer] * number
