"""Luong's translator: multiplicative attention and input feeding on long short-term memories.

Paper: Luong et al. 2015, https://arxiv.org/abs/1508.04025; without attention Sutskever et al. 2014,
https://arxiv.org/abs/1409.3215
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks
from jattn.functional.pytree import named_tuple
from jattn.models import encoder_decoder
from jattn.models.encoder_decoder import EncoderDecoder, Memory, check_config
from jattn.models.tokens import Embed, embed
from jattn.nn._shared import Linear, dropout
from jattn.nn.pooling import BilinearAttention
from jattn.nn.recurrent import LSTM
from jattn.nn.recurrent_cells import LSTMCell

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `LuongTranslator`, its form, and its special token ids.

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

    def __post_init__(self) -> None:
        check_config(
            self, "source_vocabulary", "target_vocabulary", "embedding_features", "hidden_features"
        )
        if self.feed not in ("output", "prediction"):
            raise ValueError(f'feed must be "output" or "prediction", got {self.feed!r}')

    @classmethod
    def plain(cls, source_vocabulary: int, target_vocabulary: int) -> "Config":
        """Sutskever's: no attention, and the source is read from its end."""
        return cls(source_vocabulary, target_vocabulary, attention=False, reverse_source=True)


@named_tuple
class State(NamedTuple):
    """What one decoder step hands to the next; made by `Decoder.begin`."""

    h: Array  # [B, F]
    c: Array  # [B, F]
    output: Array  # o, of which the logits are made, [B, F]
    input_feed: Array | None  # what the next step reads beside its token, [B, F] or [B, D]


class Encoder(nnx.Module):
    """Embedding, then a long short-term memory in both directions.

    Args:
      config: sizes, and whether sources are read from their end.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> encoder = Encoder(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
      >>> outputs, (h, c) = encoder(jnp.ones((2, 7), int), lengths=jnp.array([4, 7]))
      >>> outputs.shape, h.shape, c.shape
      ((2, 7, 10), (2, 2, 5), (2, 2, 5))
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
        self.lstm = LSTM(D, F, bidirectional=True, **options)
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
          in the order of the source, even if it is read from its end; and the last h and c of both
          directions, `[B, 2, F]` each.

        Raises:
          ValueError: a shape does not fit, or an id is unknown. (Under jit, where values cannot be
            seen: NaN.)
          TypeError: source or lengths are not integers.
        """
        embedded = embed("source", source, self.embedding)
        embedded = self._reverse(embedded, lengths)
        outputs, state = self.lstm(embedded, lengths=lengths, deterministic=deterministic)
        return self._reverse(outputs, lengths), state

    def _reverse(self, sequences: Array, lengths: Array | None) -> Array:
        """Reverse each sequence within its own length, if sources are reversed.

        To do so twice changes nothing.
        """
        if not self.reverse_source:
            return sequences
        if lengths is None:
            return jnp.flip(sequences, axis=1)
        checks.assert_shapes(source=(sequences, "B S D"), lengths=(lengths, "B"))
        steps = jnp.arange(sequences.shape[1], dtype=jnp.int32)[None]
        mirrored = jnp.asarray(lengths).astype(jnp.int32)[:, None] - 1 - steps
        order = jnp.where(mirrored >= 0, mirrored, steps)
        return jnp.take_along_axis(sequences, order[..., None], axis=1)


class Decoder(encoder_decoder.Decoder):
    """One target token at a time: update the state, then attend to the source with it.

        h_t, c_t = LSTMCell([embedding(y_{t−1}); o_{t−1}], h_{t−1}, c_{t−1})
        a_t = attention(query = h_t, key = value = encoder outputs), with scores hᵀ W k
        o_t = dropout(tanh(W_u [a_t; h_t])),   logits_t = W_v o_t

    With `feed="prediction"` the cell reads `[embedding(argmax logits_{t−1}); embedding(y_{t−1})]`;
    the first prediction is the start token. Without attention it reads `embedding(y_{t−1})`, and
    o_t = dropout(h_t).

    Args:
      config: sizes and form.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> decoder = Decoder(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
      >>> memory = decoder.remember(jnp.ones((2, 7, 10)))
      >>> state = decoder.begin(*jnp.ones((2, 2, 2, 5)))
      >>> tokens = jnp.ones((2, 4), int)
      >>> logits, weights = decoder(tokens, state, memory, return_weights=True)
      >>> logits.shape, weights.shape
      ((2, 4, 13), (2, 4, 7))
    """

    state_pattern = "B F"

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, F, C = config.embedding_features, config.hidden_features, config.target_vocabulary
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        bare = options | {"use_bias": False}
        self.config, self.dtype, self.memory_features = config, dtype, 2 * F
        self.embedding = Embed(C, D, **options)
        self.first_h = Linear(2 * F, F, **bare)
        self.first_c = Linear(2 * F, F, **bare)
        fed = D if config.feed == "prediction" else F if config.attention else 0
        self.cell = LSTMCell(D + fed, F, **options)
        if config.attention:
            self.attention = BilinearAttention(F, 2 * F, attend=attend, **options)
            self.combine = Linear(3 * F, F, **bare)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.out = Linear(F, C, **bare)

    def begin(self, h: Array, c: Array) -> State:
        """The state before the first step, from the encoder's last h and c, `[B, 2, F]` each."""
        h, c = (rearrange(part, "b directions f -> b (directions f)") for part in (h, c))
        h, c = self.first_h(h), self.first_c(c)
        output = jnp.zeros_like(h)
        start = jnp.full_like(h[:, 0], self.config.start, jnp.int32)
        return State(h, c, output, self._feed(output, start))

    def _advance(
        self,
        state: State,
        embedded: Array,
        memory: Memory,
        *,
        return_weights: bool,
        deterministic: bool | None,
    ) -> tuple[State, tuple[Array, Array | None]]:
        predicts = self.config.feed == "prediction"
        parts = (state.input_feed, embedded) if predicts else (embedded, state.input_feed)
        read = jnp.concatenate([part for part in parts if part is not None], axis=-1)
        h, c = self.cell(read, (state.h, state.c))
        output, weights = self._attend(h, memory, return_weights)
        output = self.dropout(output, deterministic=deterministic)
        prediction = jnp.argmax(self.out(output), axis=-1) if predicts else None
        return State(h, c, output, self._feed(output, prediction)), (output, weights)

    def _feed(self, output: Array, prediction: Array | None) -> Array | None:
        """What the next step reads beside its token; None: nothing."""
        if self.config.feed == "prediction" and prediction is not None:
            return self.embedding(prediction).astype(output.dtype)
        return output if self.config.attention else None

    def _attend(self, h: Array, memory: Memory, return_weights: bool) -> tuple[Array, Array | None]:
        """tanh(W_u [a; h]), and the weights if they are asked for."""
        if not self.config.attention:
            if return_weights:
                raise ValueError(
                    "return_weights=True needs attention=True in the config:"
                    " without it there are no weights"
                )
            return h, None
        found = self.attention(
            h[:, None], memory.key, memory.value, mask=memory.mask, return_weights=return_weights
        )
        context, weights = found if isinstance(found, tuple) else (found, None)
        output = jnp.tanh(self.combine(jnp.concatenate([context[:, 0], h], axis=-1)))
        return output, None if weights is None else weights[:, 0]


class LuongTranslator(EncoderDecoder):
    """Luong's translator; its `Decoder` begins in a projection of the last state of its `Encoder`.

    Without attention there are no weights to return.

    Args:
      config: sizes, form and special ids.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
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

    def _read(
        self, source: Array, lengths: Array | None, deterministic: bool | None
    ) -> tuple[Memory, Any]:
        memory, last = super()._read(source, lengths, deterministic)
        decoder: Any = self.decoder
        return memory, decoder.begin(*last)
