"""Translation by an encoder and a decoder that attends to it: Bahdanau's model with gated recurrent units.

Paper: Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from jattn.functional import checks, masks
from jattn.models import decoding
from jattn.nn.attention import AdditiveAttention
from jattn.nn.recurrent import GRU

Array = jax.Array
_BEAM = ("width", "length_penalty")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `Seq2Seq` and its special token ids.

    Attributes:
      source_vocabulary: number of source ids.
      target_vocabulary: C, number of target ids, the special ones included.
      embedding_features: width of both embeddings.
      hidden_features: F, width of every recurrent layer and of the attention.
      num_layers: L, recurrent layers in encoder and decoder each.
      dropout_rate: between recurrent layers and of the attention weights.
      pad, start, end: target ids: what fills a sequence after its end, what the decoder reads first, what ends it.

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
        sizes = ("source_vocabulary", "target_vocabulary", "embedding_features", "hidden_features", "num_layers")
        checks.positive(**{name: getattr(self, name) for name in sizes})
        checks.probability(dropout_rate=self.dropout_rate)
        for name in ("pad", "start", "end"):
            checks.integers(**{name: getattr(self, name)})
            checks.in_range(name, getattr(self, name), 0, self.target_vocabulary - 1, "the last target id")

    @classmethod
    def small(cls, source_vocabulary: int, target_vocabulary: int) -> "Config":
        """The size of textbook examples: two layers of width 32."""
        return cls(source_vocabulary, target_vocabulary, 32, 32, num_layers=2, dropout_rate=0.1)


class Memory(NamedTuple):
    """What a decoder reads of one batch of sources at every step; made by `Decoder.remember`."""

    key: Array  # the encoder's outputs as the attention projects them, [B, S, F]
    value: Array  # the encoder's outputs, [B, S, F]
    mask: masks.Mask | None  # which of the S positions are real; None: all


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
        self.gru = GRU(D, F, num_layers=config.num_layers, dropout_rate=config.dropout_rate, **options)

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
          ValueError: a shape does not fit, or an id is unknown. (Under jit, where values cannot be seen: NaN.)
          TypeError: source or lengths are not integers.
        """
        return self.gru(_embed("source", source, self.embedding), lengths=lengths, deterministic=deterministic)


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
        self.dropout_rate = rate
        self.deterministic = False

    def remember(self, outputs: Array, lengths: Array | None = None) -> Memory:
        """Project the keys of the encoder's outputs `[B, S, F]` once for all steps; lengths `[B]` hide the padding."""
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
          deterministic: True switches dropout off; None follows the decoder's `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, and attention weights `[B, T, S]` before dropout.

        Raises:
          ValueError: a shape does not fit, or an id is unknown (under jit: NaN).
        """
        checks.shapes(target_in=(target_in, "B T"), state=(state, "B L F"), memory=(memory.value, "B S F"))
        off = self.deterministic if deterministic is None else deterministic
        embedded = self._project_embedding("target_in", target_in)
        streams, decoder_of = _per_step(self, embedded.shape[1], random=self.dropout_rate > 0 and not off)

        def advance(state, step):
            streams, embedded = step
            state, weights = decoder_of(streams)._advance(state, embedded, memory, off)
            return state, (state[:, -1], weights)

        steps = (streams, rearrange(embedded, "b t gates -> t b gates"))
        _, (hidden, weights) = jax.lax.scan(advance, state, steps)
        return self.out(rearrange(hidden, "t b f -> b t f")), rearrange(weights, "t b s -> b t s")

    def step(self, tokens: Array, state: Array, memory: Memory) -> tuple[Array, Array]:
        """One step without dropout: token ids `[B]` and state `[B, L, F]` to the next state and logits `[B, C]`."""
        state, _ = self._advance(state, self._project_embedding("tokens", tokens), memory, True)
        return state, self.out(state[:, -1])

    def _project_embedding(self, name: str, tokens: Array) -> Array:
        """The embedding's share of the first layer's input product; the context's share follows in `_advance`."""
        first: Any = self.gru.layers[0]
        kernel = first.input_kernel[self.attention.key.in_features :]
        return _embed(name, tokens, self.embedding) @ kernel + first.input_bias[...]

    def _advance(self, state: Array, embedded: Array, memory: Memory, off: bool) -> tuple[Array, Array]:
        context, weights = self.attention.attend_projected(
            state[:, -1:], memory.key, memory.value, mask=memory.mask, return_weights=True, deterministic=off
        )
        kernel = self.gru.layers[0].input_kernel[...]
        projected = context[:, 0] @ kernel[: context.shape[-1]] + embedded
        return self.gru.step(projected, state, deterministic=off), weights[:, 0]


class Seq2Seq(nnx.Module):
    """Bahdanau's translator: `Encoder`, and a `Decoder` whose states begin as the encoder's end.

    Args:
      config: sizes and special ids.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Example:
      >>> model = Seq2Seq(Config(11, 13, 3, 5), rngs=nnx.Rngs(0))
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

    def __call__(
        self,
        source: Array,
        target_in: Array,
        *,
        lengths: Array | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Any:
        """Predict every target token from those before it (teacher forcing).

        Args:
          source: token ids `[B, S]`.
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          lengths: of the sources, integers `[B]` from 1 to S. None: the encoder reads the padding, and the decoder
            attends to it, as widely copied code does.
          return_weights: also return the attention weights of every step.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, or a tuple of them and weights `[B, T, S]`.

        Raises:
          ValueError: a shape does not fit, an id is unknown, or a length lies outside 1 … S (under jit: NaN).
          TypeError: ids or lengths are not integers.
        """
        checks.shapes(source=(source, "B S"), target_in=(target_in, "B T"))
        self._check(source, lengths)
        _known("target_in", target_in, self.config.target_vocabulary)
        outputs, state = self.encoder(source, lengths=lengths, deterministic=deterministic)
        memory = self.decoder.remember(outputs, lengths)
        logits, weights = self.decoder(target_in, state, memory, deterministic=deterministic)
        return (logits, weights) if return_weights else logits

    def greedy(
        self, source: Array, *, lengths: Array | None = None, max_length: int, return_weights: bool = False
    ) -> Any:
        """Translate by the most probable token at every step (`decoding.greedy`), compiled, without dropout.

        Args:
          source: token ids `[B, S]`.
          lengths: of the sources, integers `[B]`, or None as in a call.
          max_length: L, the longest translation.
          return_weights: also return the attention weights of every step.

        Returns:
          A `Decoded` with tokens `[B, L]`, or a tuple of it and weights `[B, L, S]`, zero after the end.

        Raises:
          ValueError, TypeError: as in a call.
        """
        return self._decode(source, lengths, max_length=max_length, return_weights=return_weights)

    def beam(
        self,
        source: Array,
        *,
        lengths: Array | None = None,
        max_length: int,
        width: int,
        length_penalty: float = 0.0,
        return_weights: bool = False,
    ) -> Any:
        """Translate by beam search (`decoding.beam_search`), compiled, without dropout.

        Args:
          source, lengths, max_length, return_weights: as `greedy`.
          width: W, the number of hypotheses.
          length_penalty: α ≥ 0; larger values favour longer translations.

        Returns:
          A `Decoded` with tokens `[B, W, L]`, best first, or a tuple of it and weights `[B, W, L, S]`.

        Raises:
          ValueError, TypeError: as in a call, and as `decoding.beam_search`.
        """
        search = {"width": width, "length_penalty": length_penalty}
        return self._decode(source, lengths, max_length=max_length, return_weights=return_weights, **search)

    def _check(self, source: Array, lengths: Array | None) -> None:
        S = checks.shapes(source=(source, "B S"))["S"]
        _known("source", source, self.config.source_vocabulary)
        if lengths is not None:
            checks.shapes(source=(source, "B S"), lengths=(lengths, "B"))
            checks.integers(lengths=lengths)
            checks.in_range("lengths", lengths, 1, S, "S, the number of source positions")

    def _decode(self, source: Array, lengths: Array | None, **options: Any) -> Any:
        self._check(source, lengths)
        return _decode(*nnx.split(self), source, lengths, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_length", "return_weights", *_BEAM))
def _decode(graphdef, parameters, source, lengths, *, max_length, return_weights, **beam) -> Any:
    model = nnx.merge(graphdef, parameters)
    decoder, config = model.decoder, model.config
    outputs, state = model.encoder(source, lengths=lengths, deterministic=True)
    memory = decoder.remember(outputs, lengths)

    start = jnp.full(source.shape[:1], config.start, jnp.int32)
    found = (decoding.beam_search if beam else decoding.greedy)(
        lambda state, tokens: decoder.step(tokens, state, memory),
        state, start=start, end=config.end, pad=config.pad, max_length=max_length, **beam,
    )  # fmt: skip
    if not return_weights:
        return found

    def weights_of(tokens: Array) -> Array:  # reads them once more: simpler than a search that carries weights
        target_in = jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1)
        return decoder(target_in, state, memory, deterministic=True)[1]

    weights = (jax.vmap(weights_of, in_axes=1, out_axes=1) if beam else weights_of)(found.tokens)
    inside = jnp.arange(max_length, dtype=jnp.int32) < found.lengths[..., None]
    return found, jnp.where(inside[..., None], weights, 0)


def loss(logits: Array, targets: Array, *, lengths: Array | None = None) -> Array:
    """The mean negative log-likelihood of the real target tokens.

        −(1/n) Σ log softmax(logits)[target]   over the n real tokens

    Args:
      logits: `[..., T, C]`, floating point.
      targets: token ids `[..., T]`: what each step should predict, the end token included.
      lengths: integers `[...]`, how many targets of each sequence are real; None: all.

    Returns:
      A scalar in nats; NaN if no token is real.

    Raises:
      ValueError: a shape does not fit, an id is not in the vocabulary (under jit: NaN), or a length lies outside 0 … T.
      TypeError: logits are not floating point, or targets or lengths are not integers.

    Example:
      >>> loss(jnp.zeros((1, 3, 4)), jnp.array([[2, 1, 0]]), lengths=jnp.array([2])).round(3)  # log 4
      Array(1.386, dtype=float32)
    """
    sizes = checks.shapes(logits=(logits, "... T C"), targets=(targets, "... T"))
    checks.floating(logits=logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, _known("targets", targets, sizes["C"]))
    if lengths is None:
        return jnp.mean(losses)
    checks.shapes(targets=(targets, "... T"), lengths=(lengths, "..."))
    checks.integers(lengths=lengths)
    checks.in_range("lengths", lengths, 0, sizes["T"], "T, the number of targets")
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    return jnp.mean(losses, where=jnp.arange(sizes["T"], dtype=jnp.int32) < lengths[..., None])


def _embed(name: str, tokens: Array, embedding: nnx.Embed) -> Array:
    return embedding(_known(name, tokens, embedding.num_embeddings))


def _known(name: str, tokens: Array, vocabulary: int) -> Array:
    """Check token ids; where they cannot be seen, a negative one becomes too large, which yields NaN and not a row."""
    checks.integers(**{name: tokens})
    checks.in_range(name, tokens, 0, vocabulary - 1, "the last id of the vocabulary")
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    return jnp.where(tokens < 0, vocabulary, tokens)


def _per_step(module: nnx.Module, steps: int, *, random: bool) -> tuple[Any, Any]:
    """The random streams of every step, to scan over, and a function from those of one step to the module.

    A scan traces its body once: with one stream every step would drop the same weights.
    """
    if not random:
        return None, lambda streams: module
    with nnx.split_rngs(module, splits=steps):
        graphdef, streams, rest = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
        streams = jax.tree.map(jnp.asarray, streams)  # a copy: leaving the block restores the streams in place
    return streams, lambda streams: nnx.merge(graphdef, streams, rest)
