"""Bahdanau's translator: gated recurrent units, and a decoder that attends to the encoder.

Paper: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks, masks
from jattn.models.encoder_decoder import EncoderDecoder, Memory, check_config, per_step
from jattn.models.tokens import embed
from jattn.nn._shared import is_on
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

    def __post_init__(self):
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
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> encoder = Encoder(Config(11, 13, 3, 5, num_layers=2), rngs=nnx.Rngs(0))
      >>> outputs, state = encoder(jnp.ones((2, 7), int), lengths=jnp.array([4, 7]))
      >>> outputs.shape, state.shape
      ((2, 7, 5), (2, 2, 5))
    """

    def __init__(self, config: Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F = config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.embedding = nnx.Embed(config.source_vocabulary, D, **options)
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


class Decoder(nnx.Module):
    """One target token at a time: attend to the source with the top state, then update the states.

        c_t = attention(query = top layer of s_{t−1}, key = value = encoder outputs)
        s_t = GRU([c_t; embedding(y_{t−1})], s_{t−1})
        logits_t = W_out (top layer of s_t) + b_out

    Args:
      config: sizes.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> decoder = Decoder(Config(11, 13, 3, 5, num_layers=2), rngs=nnx.Rngs(0))
      >>> memory = decoder.remember(jnp.ones((2, 7, 5)))
      >>> logits, weights = decoder(jnp.ones((2, 4), int), jnp.zeros((2, 2, 5)), memory)
      >>> logits.shape, weights.shape
      ((2, 4, 13), (2, 4, 7))
    """

    def __init__(self, config: Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F = config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        rate = config.dropout_rate
        self.attention = AdditiveAttention(F, F, F, dropout_rate=rate, **options)
        self.embedding = nnx.Embed(config.target_vocabulary, D, **options)
        self.gru = GRU(F + D, F, num_layers=config.num_layers, dropout_rate=rate, **options)
        self.out = nnx.Linear(F, config.target_vocabulary, **options)

    def remember(self, outputs: Array, lengths: Array | None = None) -> Memory:
        """Project the keys of the encoder's outputs `[B, S, F]` once for all steps.

        Lengths `[B]` hide the padding.
        """
        mask = None if lengths is None else masks.padding(lengths)
        return Memory(self.attention.project_key(outputs), outputs, mask)

    def __call__(
        self, target_in: Array, state: Array, memory: Memory, *, deterministic: bool | None = None
    ) -> tuple[Array, Array]:
        """Decode with every step's input given (teacher forcing).

        Args:
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          state: of every layer before the first step, `[B, L, F]`: the encoder's.
          memory: from `remember`.
          deterministic: True switches dropout off; None follows the decoder's `train()` and
            `eval()`.

        Returns:
          Logits `[B, T, C]`, and attention weights `[B, T, S]` before dropout.

        Raises:
          ValueError: a shape does not fit, or an id is unknown (under jit: NaN).
        """
        checks.assert_shapes(
            target_in=(target_in, "B T"), state=(state, "B L F"), memory=(memory.value, "B S F")
        )
        random = any(is_on(part.dropout, deterministic) for part in (self.attention, self.gru))
        embedded = self._project_embedding("target_in", target_in)
        streams, decoder_of = per_step(self, embedded.shape[1], random=random)

        def advance(state, step):
            streams, embedded = step
            state, weights = decoder_of(streams)._advance(state, embedded, memory, not random)
            return state, (state[:, -1], weights)

        steps = (streams, rearrange(embedded, "b t gates -> t b gates"))
        _, (hidden, weights) = jax.lax.scan(advance, state, steps)
        return self.out(rearrange(hidden, "t b f -> b t f")), rearrange(weights, "t b s -> b t s")

    def step(self, tokens: Array, state: Array, memory: Memory) -> tuple[Array, Array]:
        """One step without dropout.

        Token ids `[B]` and state `[B, L, F]` give the next state and logits `[B, C]`.
        """
        state, _ = self._advance(state, self._project_embedding("tokens", tokens), memory, True)
        return state, self.out(state[:, -1])

    def _project_embedding(self, name: str, tokens: Array) -> Array:
        """The embedding's part of the first layer's input product; `_advance` adds the rest."""
        embedded = embed(name, tokens, self.embedding)
        return self.gru.layers[0].project(embedded, first=self.attention.key_features)

    def _advance(
        self, state: Array, embedded: Array, memory: Memory, off: bool
    ) -> tuple[Array, Array]:
        context, weights = self.attention.attend_projected(
            state[:, -1:],
            memory.key,
            memory.value,
            mask=memory.mask,
            return_weights=True,
            deterministic=off,
        )
        first = self.gru.layers[0]
        projected = first.project(context[:, 0], first=0, use_bias=False) + embedded
        return self.gru.step(projected, state, deterministic=off), weights[:, 0]


class BahdanauTranslator(EncoderDecoder):
    """Bahdanau's translator: `Encoder`, and a `Decoder` whose states begin as the encoder's end.

    Args:
      config: sizes and special ids.
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

    def __init__(self, config: Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, param_dtype=param_dtype, rngs=rngs)
        self.decoder = Decoder(config, param_dtype=param_dtype, rngs=rngs)
