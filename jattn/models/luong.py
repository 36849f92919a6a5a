"""Luong's translator: multiplicative attention and input feeding on long short-term memories.

Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025; without attention Sutskever et al. 2014,
https://arxiv.org/abs/1409.3215
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks, masks
from jattn.models.encoder_decoder import EncoderDecoder, Memory, check_config, per_step
from jattn.models.tokens import embed
from jattn.nn.pooling import BilinearAttention
from jattn.nn.recurrent import LSTM
from jattn.nn.recurrent_cells import LSTMCell

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `LuongTranslator` translator, its form, and its special token ids.

    Attributes:
      source_vocabulary: number of source ids.
      target_vocabulary: C, number of target ids, the special ones included.
      embedding_features: D, width of both embeddings.
      hidden_features: F, width of the decoder and of each direction of the encoder.
      dropout_rate: of the decoder's outputs.
      attention: False: the plain LSTM encoder-decoder, in which the encoder's last states are all
        that the decoder knows of the source.
      feed: what a decoder step reads beside a token. `"output"`: the output of the step before
        (input feeding; nothing without attention, where that output is the state already).
        `"prediction"`: the embedding of the token that the step before held most probable.
      reverse_source: read each source from its end.
      pad, start, end: target ids: what fills a sequence after its end, what the decoder reads
        first, what ends it.

    Raises:
      ValueError: a size is not positive, a special id is not in the target vocabulary, or `feed` is
        neither.

    Example:
      >>> Config.plain(100, 120).attention
      False
    """

    source_vocabulary: int
    target_vocabulary: int
    embedding_features: int = 64
    hidden_features: int = 128
    dropout_rate: float = 0.0
    attention: bool = True
    feed: Literal["output", "prediction"] = "output"
    reverse_source: bool = False
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self):
        check_config(
            self, "source_vocabulary", "target_vocabulary", "embedding_features", "hidden_features"
        )
        if self.feed not in ("output", "prediction"):
            raise ValueError(f'feed must be "output" or "prediction", got {self.feed!r}')

    @classmethod
    def plain(cls, source_vocabulary: int, target_vocabulary: int) -> "Config":
        """Sutskever's: no attention, and the source is read from its end."""
        return cls(source_vocabulary, target_vocabulary, attention=False, reverse_source=True)


class State(NamedTuple):
    """What one decoder step hands to the next; made by `Decoder.begin`."""

    h: Array  # [B, F]
    c: Array  # [B, F]
    output: Array  # o, of which the logits are made, [B, F]
    fed: Array  # what the next step reads beside its token, [B, F], [B, D] or [B, 0]


class Encoder(nnx.Module):
    """Embedding, then a long short-term memory in both directions.

    Args:
      config: sizes, and whether sources are read from their end.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> encoder = Encoder(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
      >>> outputs, (h, c) = encoder(jnp.ones((2, 7), int), lengths=jnp.array([4, 7]))
      >>> outputs.shape, h.shape, c.shape
      ((2, 7, 10), (2, 2, 5), (2, 2, 5))
    """

    def __init__(self, config: Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F = config.embedding_features, config.hidden_features
        self.embedding = nnx.Embed(config.source_vocabulary, D, param_dtype=param_dtype, rngs=rngs)
        self.lstm = LSTM(D, F, bidirectional=True, param_dtype=param_dtype, rngs=rngs)
        self.reverse_source = config.reverse_source

    def __call__(
        self, source: Array, *, lengths: Array | None = None, deterministic: bool | None = None
    ) -> tuple[Array, tuple[Array, Array]]:
        """Encode.

        Args:
          source: token ids `[B, S]`.
          lengths: integers `[B]` from 1 to S; None: the padding is read as if it were text.
          deterministic: changes nothing: an encoder of one layer drops nothing.

        Returns:
          Outputs `[B, S, 2F]`, of both directions side by side, zero past the end of a sentence and
          in the source's own order whichever way it was read; and the last h and c of both
          directions, `[B, 2, F]` each.

        Raises:
          ValueError: a shape does not fit, or an id is unknown. (Under jit, where values cannot be
            seen: NaN.)
          TypeError: source or lengths are not integers.
        """
        embedded = embed("source", source, self.embedding)
        embedded = self._turned(embedded, lengths)
        outputs, state = self.lstm(embedded, lengths=lengths, deterministic=deterministic)
        return self._turned(outputs, lengths), state

    def _turned(self, sequences: Array, lengths: Array | None) -> Array:
        """Reverse each sequence within its own length, if sources are reversed.

        To do so twice changes nothing.
        """
        if not self.reverse_source:
            return sequences
        if lengths is None:
            return jnp.flip(sequences, axis=1)
        checks.assert_shapes(source=(sequences, "B S D"), lengths=(lengths, "B"))
        steps = jnp.arange(sequences.shape[1], dtype=jnp.int32)
        mirrored = jnp.asarray(lengths).astype(jnp.int32)[:, None] - 1 - steps
        order = jnp.where(mirrored >= 0, mirrored, steps)
        return jnp.take_along_axis(sequences, order[..., None], axis=1)


class Decoder(nnx.Module):
    """One target token at a time: update the state, then attend to the source with it.

        h_t, c_t = LSTMCell([embedding(y_{t−1}); o_{t−1}], h_{t−1}, c_{t−1})
        a_t = attention(query = h_t, key = value = encoder outputs), with scores hᵀ W k
        o_t = dropout(tanh(W_u [a_t; h_t])),   logits_t = W_v o_t

    With `feed="prediction"` the cell reads `[embedding(argmax logits_{t−1}); embedding(y_{t−1})]`;
    the first prediction is the start token. Without attention it reads `embedding(y_{t−1})`, and
    o_t = dropout(h_t).

    Args:
      config: sizes and form.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> decoder = Decoder(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
      >>> memory = decoder.remember(jnp.ones((2, 7, 10)))
      >>> state = decoder.begin(*jnp.ones((2, 2, 2, 5)))
      >>> logits, weights = decoder(jnp.ones((2, 4), int), state, memory)
      >>> logits.shape, weights.shape
      ((2, 4, 13), (2, 4, 7))
    """

    def __init__(self, config: Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F, C = config.embedding_features, config.hidden_features, config.target_vocabulary
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        bare = options | {"use_bias": False}
        self.config = config
        self.fed_features = D if config.feed == "prediction" else F if config.attention else 0
        self.embedding = nnx.Embed(C, D, **options)
        self.first_h = nnx.Linear(2 * F, F, **bare)
        self.first_c = nnx.Linear(2 * F, F, **bare)
        self.cell = LSTMCell(D + self.fed_features, F, **options)
        if config.attention:
            self.attention = BilinearAttention(F, 2 * F, **options)
            self.combine = nnx.Linear(3 * F, F, **bare)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs if config.dropout_rate else None)
        self.out = nnx.Linear(F, C, **bare)

    def remember(self, outputs: Array, lengths: Array | None = None) -> Memory:
        """The encoder's outputs `[B, S, 2F]` as key and value; lengths `[B]` hide the padding."""
        return Memory(outputs, outputs, None if lengths is None else masks.padding(lengths))

    def begin(self, h: Array, c: Array) -> State:
        """The state before the first step, from the encoder's last h and c, `[B, 2, F]` each."""
        h, c = (rearrange(part, "b directions f -> b (directions f)") for part in (h, c))
        h, c = self.first_h(h), self.first_c(c)
        fed = jnp.zeros((len(h), self.fed_features), h.dtype)
        if self.config.feed == "prediction":
            fed = self.embedding(jnp.full(len(h), self.config.start, jnp.int32))
        return State(h, c, jnp.zeros_like(h), fed)

    def __call__(
        self, target_in: Array, state: State, memory: Memory, *, deterministic: bool | None = None
    ) -> tuple[Array, Array | None]:
        """Decode with every step's input given (teacher forcing).

        Args:
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          state: before the first step, from `begin`.
          memory: from `remember`.
          deterministic: True switches dropout off; None follows the decoder's `train()` and
            `eval()`.

        Returns:
          Logits `[B, T, C]`, and attention weights `[B, T, S]`, or None without attention.

        Raises:
          ValueError: a shape does not fit, or an id is unknown (under jit: NaN).
        """
        checks.assert_shapes(
            target_in=(target_in, "B T"), state=(state.h, "B F"), memory=(memory.value, "B S width")
        )
        off = self.dropout.deterministic if deterministic is None else deterministic
        embedded = embed("target_in", target_in, self.embedding)
        streams, decoder_of = per_step(
            self, embedded.shape[1], random=self.dropout.rate > 0 and not off
        )

        def advance(state, step):
            streams, embedded = step
            state, weights = decoder_of(streams)._advance(state, embedded, memory, off)
            return state, (state.output, weights)

        _, (outputs, weights) = jax.lax.scan(
            advance, state, (streams, rearrange(embedded, "b t d -> t b d"))
        )
        logits = self.out(rearrange(outputs, "t b f -> b t f"))
        return logits, None if weights is None else rearrange(weights, "t b s -> b t s")

    def step(self, tokens: Array, state: State, memory: Memory) -> tuple[State, Array]:
        """One step without dropout: ids `[B]` and a state to the next state and logits `[B, C]`."""
        state, _ = self._advance(state, embed("tokens", tokens, self.embedding), memory, True)
        return state, self.out(state.output)

    def _advance(
        self, state: State, embedded: Array, memory: Memory, off: bool
    ) -> tuple[State, Array | None]:
        parts = (state.fed, embedded) if self.config.feed == "prediction" else (embedded, state.fed)
        h, c = self.cell(jnp.concatenate(parts, axis=-1), (state.h, state.c))
        output, weights = self._attend(h, memory) if self.config.attention else (h, None)
        output = self.dropout(output, deterministic=off)
        if self.config.feed == "prediction":
            fed = self.embedding(jnp.argmax(self.out(output), axis=-1))
        else:
            fed = output[:, : self.fed_features]  # all of it, or nothing
        return State(h, c, output, fed), weights

    def _attend(self, h: Array, memory: Memory) -> tuple[Array, Array]:
        """tanh(W_u [a; h]), and the weights."""
        context, weights = self.attention(
            h[:, None], memory.key, memory.value, mask=memory.mask, return_weights=True
        )
        return jnp.tanh(self.combine(jnp.concatenate([context[:, 0], h], axis=-1))), weights[:, 0]


class LuongTranslator(EncoderDecoder):
    """Luong's translator; its `Decoder` begins in a projection of the last state of its `Encoder`.

    Without attention there are no weights to return.

    Args:
      config: sizes, form and special ids.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025

    Example:
      >>> model = LuongTranslator(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
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

    def _read(
        self, source: Array, lengths: Array | None, deterministic: bool | None
    ) -> tuple[Memory, Any]:
        memory, last = super()._read(source, lengths, deterministic)
        return memory, self.decoder.begin(*last)

    def _check(self, source: Array, lengths: Array | None, return_weights: bool) -> None:
        if return_weights and not self.config.attention:
            raise ValueError(
                "return_weights=True needs attention=True in the config:"
                " without it there are no weights"
            )
        super()._check(source, lengths, return_weights)
