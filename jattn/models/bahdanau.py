"""Bahdanau's translator: gated recurrent units, and a decoder that attends to the encoder.

Paper: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.models import encoder_decoder
from jattn.models.encoder_decoder import EncoderDecoder, Memory, check_config
from jattn.models.tokens import Embed, embed
from jattn.nn._shared import Linear
from jattn.nn.pooling import AdditiveAttention
from jattn.nn.recurrent import GRU

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `BahdanauTranslator` and its special token ids.

    Attributes:
      source_vocabulary: number of source ids.
      target_vocabulary: C, number of target ids, the special ones included.
      embedding_features: width of both embeddings.
      hidden_features: F, width of every recurrent layer and of the attention.
      num_layers: L, recurrent layers in encoder and decoder each.
      dropout_rate: between recurrent layers and of the attention weights.
      pad, start, end: target ids: what fills a sequence after its end, what the decoder reads
        first, what ends it.

    Raises:
      ValueError: a size is not positive, or a special id is not in the target vocabulary.

    Example:
      >>> Config.small(100, 120).hidden_features
      32
    """

    source_vocabulary: int
    target_vocabulary: int
    embedding_features: int = 64
    hidden_features: int = 128
    num_layers: int = 1
    dropout_rate: float = 0.0
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        check_config(
            self,
            "source_vocabulary",
            "target_vocabulary",
            "embedding_features",
            "hidden_features",
            "num_layers",
        )

    @classmethod
    def small(cls, source_vocabulary: int, target_vocabulary: int) -> "Config":
        """The size of textbook examples: two layers of width 32."""
        return cls(source_vocabulary, target_vocabulary, 32, 32, num_layers=2, dropout_rate=0.1)


class Encoder(nnx.Module):
    """Embedding, then a stack of gated recurrent units.

    Args:
      config: sizes.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> encoder = Encoder(Config(11, 13, 3, 5, num_layers=2), rngs=nnx.Rngs(0))
      >>> outputs, state = encoder(jnp.ones((2, 7), int), lengths=jnp.array([4, 7]))
      >>> outputs.shape, state.shape
      ((2, 7, 5), (2, 2, 5))
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, F = config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedding = Embed(config.source_vocabulary, D, **options)
        self.gru = GRU(
            D, F, num_layers=config.num_layers, dropout_rate=config.dropout_rate, **options
        )

    def __call__(
        self, source: Array, *, lengths: Array | None = None, deterministic: bool | None = None
    ) -> tuple[Array, Array]:
        """Encode.

        Args:
          source: token ids `[B, S]`.
          lengths: integers `[B]` from 1 to S; None: the padding is read as if it were text.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Outputs `[B, S, F]`, zero past the end of a sentence, and the final states `[B, L, F]`.

        Raises:
          ValueError: a shape does not fit, or an id is unknown. (Under jit, where values cannot be
            seen: NaN.)
          TypeError: source or lengths are not integers.
        """
        return self.gru(
            embed("source", source, self.embedding), lengths=lengths, deterministic=deterministic
        )


class Decoder(encoder_decoder.Decoder):
    """One target token at a time: attend to the source with the top state, then update the states.

        c_t = attention(query = top layer of s_{t−1}, key = value = encoder outputs)
        s_t = GRU([c_t; embedding(y_{t−1})], s_{t−1})
        logits_t = W_out (top layer of s_t) + b_out

    Args:
      config: sizes.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> decoder = Decoder(Config(11, 13, 3, 5, num_layers=2), rngs=nnx.Rngs(0))
      >>> memory = decoder.remember(jnp.ones((2, 7, 5)))
      >>> tokens, state = jnp.ones((2, 4), int), jnp.zeros((2, 2, 5))
      >>> logits, weights = decoder(tokens, state, memory, return_weights=True)
      >>> logits.shape, weights.shape
      ((2, 4, 13), (2, 4, 7))
    """

    state_pattern = "B L F"

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, F = config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        rate = config.dropout_rate
        self.dtype, self.memory_features = dtype, F
        self.attention = AdditiveAttention(F, F, F, dropout_rate=rate, attend=attend, **options)
        self.embedding = Embed(config.target_vocabulary, D, **options)
        self.gru = GRU(F + D, F, num_layers=config.num_layers, dropout_rate=rate, **options)
        self.out = Linear(F, config.target_vocabulary, **options)

    def _keys(self, outputs: Array) -> Array:
        """Projected once for all steps."""
        return self.attention.project_key(outputs)

    def _embed(self, name: str, tokens: Array) -> Array:
        """The embedding's part of the first layer's input product; `_advance` adds the rest."""
        embedded = embed(name, tokens, self.embedding)
        return self.gru.layers[0].project(embedded, first=self.attention.key_features)

    def _advance(
        self,
        state: Array,
        embedded: Array,
        memory: Memory,
        *,
        return_weights: bool,
        deterministic: bool | None,
    ) -> tuple[Array, tuple[Array, Array | None]]:
        found = self.attention.attend_projected(
            state[:, -1:],
            memory.key,
            memory.value,
            mask=memory.mask,
            return_weights=return_weights,
            deterministic=deterministic,
        )
        context, weights = found if return_weights else (found, None)
        first = self.gru.layers[0]
        projected = first.project(context[:, 0], first=0, use_bias=False) + embedded
        state = self.gru.step(projected, state, deterministic=deterministic)
        return state, (state[:, -1], None if weights is None else weights[:, 0])


class BahdanauTranslator(EncoderDecoder):
    """Bahdanau's translator: `Encoder`, and a `Decoder` whose states begin as the encoder's end.

    Args:
      config: sizes and special ids.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> model = BahdanauTranslator(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
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
        self.encoder = Encoder(config, **options)
        self.decoder = Decoder(config, attend=attend, **options)
