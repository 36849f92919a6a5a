"""What translators share: an encoder reads the source, a decoder writes one token at a time."""

import functools
from typing import Any, ClassVar, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks, compat, masks
from jattn.functional.pytree import named_tuple
from jattn.models import decoding
from jattn.models.decoding import Decoded
from jattn.models.tokens import embed
from jattn.nn._shared import is_on, is_real, promoted, sequence
from jattn.nn.embedding import Embedding

Array = jax.Array
_BEAM = ("width", "length_penalty")


@named_tuple
class Memory(NamedTuple):
    """What a decoder reads of a batch of sources at every step; its `remember` makes it."""

    key: Array  # the encoder's outputs as the attention compares them, [B, S, width]
    value: Array  # the encoder's outputs, [B, S, width]
    lengths: Array | None  # how many of the S positions are real, [B]; None: all

    @property
    def mask(self) -> masks.Mask | None:
        """The positions that are real; None: all."""
        return None if self.lengths is None else masks.padding(self.lengths)


class Decoder(nnx.Module):
    """A decoder that writes one token at a time; each model has its own `_advance`.

    Its state is a pytree of floating-point arrays `[B, ...]`.
    """

    embedding: Embedding
    out: nnx.Linear
    dtype: Any
    memory_features: int  # of the encoder's outputs
    state_pattern: ClassVar[str]  # of the first array of the state

    def remember(self, outputs: Array, lengths: Array | None = None) -> Memory:
        """What the decoder attends to.

        Args:
          outputs: the encoder's, `[B, S, width]`, floating point.
          lengths: integers `[B]`, the number of real positions; the rest is hidden. None: all.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 1 … S.
          TypeError: the outputs are not floating point, or the lengths no integers.
        """
        checks.assert_shapes(outputs=(outputs, "B S width"))
        outputs = sequence(outputs, self.memory_features, "outputs")
        check_lengths(lengths, outputs=outputs)
        return Memory(self._keys(outputs), outputs, lengths)

    @overload
    def __call__(
        self, target_in: Array, state: Any, memory: Memory, *,
        return_weights: Literal[False] = False, deterministic: bool | None = None,
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, target_in: Array, state: Any, memory: Memory, *,
        return_weights: Literal[True], deterministic: bool | None = None,
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, target_in: Array, state: Any, memory: Memory, *,
        return_weights: bool, deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def __call__(
        self,
        target_in: Array,
        state: Any,
        memory: Memory,
        *,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Decode with every step's input given (teacher forcing).

        Args:
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          state: before the first step.
          memory: from `remember`.
          return_weights: also return the attention weights of every step.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, or a tuple of them and weights `[B, T, S]` before dropout.

        Raises:
          ValueError: a shape does not fit; an id is unknown (under jit: NaN); or
            `return_weights` is true without attention.
          TypeError: ids are not integers.
        """
        self._check_shapes(state, memory, target_in=(target_in, "B T"))
        embedded = self._embed("target_in", target_in)
        state, embedded, memory = self._alike(state, embedded, memory)
        streams, decoder_of = per_step(self, target_in.shape[1], deterministic, like=embedded)

        def advance(state: Any, step: Any) -> Any:
            streams, embedded = step
            return decoder_of(streams)._advance(
                state, embedded, memory, return_weights=return_weights, deterministic=deterministic
            )

        steps = streams, rearrange(embedded, "b t d -> t b d")
        _, (outputs, weights) = jax.lax.scan(advance, state, steps)
        logits = self.out(rearrange(outputs, "t b f -> b t f"))
        return (logits, rearrange(weights, "t b s -> b t s")) if return_weights else logits

    def step(self, tokens: Array, state: Any, memory: Memory) -> tuple[Any, Array]:
        """One step without dropout.

        Token ids `[B]` and a state give the next state and logits `[B, C]`.
        """
        self._check_shapes(state, memory, tokens=(tokens, "B"))
        embedded = self._embed("tokens", tokens)
        state, embedded, memory = self._alike(state, embedded, memory)
        state, (output, _) = self._advance(
            state, embedded, memory, return_weights=False, deterministic=True
        )
        return state, self.out(output)

    def _check_shapes(self, state: Any, memory: Memory, **tokens: Any) -> None:
        first = jax.tree.leaves(state)[0]
        value = (memory.value, "B S width")
        checks.assert_shapes(**tokens, state=(first, self.state_pattern), memory=value)

    def _keys(self, outputs: Array) -> Array:
        """The encoder's outputs as the attention compares them."""
        return outputs

    def _embed(self, name: str, tokens: Array) -> Array:
        """What `_advance` reads of the tokens, `[..., width]`."""
        return embed(name, tokens, self.embedding)

    def _advance(
        self,
        state: Any,
        embedded: Array,
        memory: Memory,
        *,
        return_weights: bool,
        deterministic: bool | None,
    ) -> tuple[Any, tuple[Array, Array | None]]:
        """The next state, the output `[B, F]` of which the logits are made, and the weights."""
        raise NotImplementedError

    def _alike(self, state: Any, embedded: Array, memory: Memory) -> tuple[Any, Array, Memory]:
        """The three in one dtype, and differing over the same axes of a `jax.shard_map`."""
        arrays = state, embedded, memory.key, memory.value
        leaves, structure = jax.tree.flatten(arrays)
        leaves = compat.vary_alike(promoted(self.dtype, *leaves), (memory.lengths, nnx.state(self)))
        state, embedded, key, value = jax.tree.unflatten(structure, leaves)
        return state, embedded, Memory(key, value, memory.lengths)


class EncoderDecoder(nnx.Module):
    """A translator of two parts; each model has its own `config`, `encoder` and `decoder`.

    The encoder turns `(source, lengths=…, deterministic=…)` into outputs and states. The decoder
    has the methods `remember` and `step` of `Decoder`, and is called as it is.
    """

    config: Any
    encoder: Any
    decoder: Any

    @overload
    def __call__(
        self, source: Array, target_in: Array, *, lengths: Array | None = None,
        return_weights: Literal[False] = False, deterministic: bool | None = None,
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, source: Array, target_in: Array, *, lengths: Array | None = None,
        return_weights: Literal[True], deterministic: bool | None = None,
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, source: Array, target_in: Array, *, lengths: Array | None = None,
        return_weights: bool, deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def __call__(
        self,
        source: Array,
        target_in: Array,
        *,
        lengths: Array | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Predict every target token from those before it (teacher forcing).

        Args:
          source: token ids `[B, S]`.
          target_in: token ids `[B, T]`: the start token, then the target without its last token.
          lengths: of the sources, integers `[B]` from 1 to S. None: the encoder reads the padding,
            and the decoder attends to it, as widely copied code does.
          return_weights: also return the attention weights of every step.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, or a tuple of them and weights `[B, T, S]`.

        Raises:
          ValueError: a shape does not fit; an id is unknown, or a length lies outside 1 … S (under
            jit: NaN); or `return_weights` is true without attention.
          TypeError: ids or lengths are not integers.
        """
        checks.assert_shapes(source=(source, "B S"), target_in=(target_in, "B T"))
        self._check(source, lengths)
        checks.validated_tokens("target_in", target_in, self.config.target_vocabulary)
        memory, state = self._read(source, lengths, deterministic)
        return self.decoder(
            target_in, state, memory, return_weights=return_weights, deterministic=deterministic
        )

    @overload
    def greedy(
        self, source: Array, *, lengths: Array | None = None, max_length: int,
        return_weights: Literal[False] = False,
    ) -> Decoded: ...  # fmt: skip
    @overload
    def greedy(
        self, source: Array, *, lengths: Array | None = None, max_length: int,
        return_weights: Literal[True],
    ) -> tuple[Decoded, Array]: ...  # fmt: skip
    @overload
    def greedy(
        self, source: Array, *, lengths: Array | None = None, max_length: int,
        return_weights: bool,
    ) -> Decoded | tuple[Decoded, Array]: ...  # fmt: skip
    def greedy(
        self,
        source: Array,
        *,
        lengths: Array | None = None,
        max_length: int,
        return_weights: bool = False,
    ) -> Decoded | tuple[Decoded, Array]:
        """Translate by the most probable token at every step (`decoding.greedy`), without dropout.

        The search is compiled.

        Args:
          source: token ids `[B, S]`.
          lengths: of the sources, integers `[B]`, or None as in a call.
          max_length: L, the longest translation.
          return_weights: also return the attention weights of every step.

        Returns:
          A `Decoded` with tokens `[B, L]`, or a tuple of it and weights `[B, L, S]`, zero after the
          end.

        Raises:
          ValueError, TypeError: as in a call.
        """
        return self._decode(source, lengths, max_length=max_length, return_weights=return_weights)

    @overload
    def beam(
        self, source: Array, *, lengths: Array | None = None, max_length: int, width: int,
        length_penalty: float = 0.0, return_weights: Literal[False] = False,
    ) -> Decoded: ...  # fmt: skip
    @overload
    def beam(
        self, source: Array, *, lengths: Array | None = None, max_length: int, width: int,
        length_penalty: float = 0.0, return_weights: Literal[True],
    ) -> tuple[Decoded, Array]: ...  # fmt: skip
    @overload
    def beam(
        self, source: Array, *, lengths: Array | None = None, max_length: int, width: int,
        length_penalty: float = 0.0, return_weights: bool,
    ) -> Decoded | tuple[Decoded, Array]: ...  # fmt: skip
    def beam(
        self,
        source: Array,
        *,
        lengths: Array | None = None,
        max_length: int,
        width: int,
        length_penalty: float = 0.0,
        return_weights: bool = False,
    ) -> Decoded | tuple[Decoded, Array]:
        """Translate by beam search (`decoding.beam_search`), compiled, without dropout.

        Args:
          source, lengths, max_length, return_weights: as `greedy`.
          width: W, the number of hypotheses.
          length_penalty: α ≥ 0; larger values favour longer translations.

        Returns:
          A `Decoded` with tokens `[B, W, L]`, best first, or a tuple of it and weights
          `[B, W, L, S]`.

        Raises:
          ValueError, TypeError: as in a call, and as `decoding.beam_search`.
        """
        search = {"width": width, "length_penalty": float(length_penalty)}
        return self._decode(
            source, lengths, max_length=max_length, return_weights=return_weights, **search
        )

    def _read(
        self, source: Array, lengths: Array | None, deterministic: bool | None
    ) -> tuple[Memory, Any]:
        """What the decoder attends to, and its state before the first step: the encoder's."""
        outputs, state = self.encoder(source, lengths=lengths, deterministic=deterministic)
        return self.decoder.remember(outputs, lengths), state

    def _begin(self, state: Any, source: Array, max_length: int) -> Any:
        """The state before the first step of a search, from that of the encoder."""
        return state

    def _check(self, source: Array, lengths: Array | None) -> None:
        checks.assert_shapes(source=(source, "B S"))
        checks.validated_tokens("source", source, self.config.source_vocabulary)
        check_lengths(lengths, source=source)

    def _decode(
        self, source: Array, lengths: Array | None, *, return_weights: bool, **options: Any
    ) -> Any:
        self._check(source, lengths)
        checks.assert_positive(max_length=options["max_length"])
        return _decode(*nnx.split(self), source, lengths, return_weights=return_weights, **options)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("max_length", "return_weights", *_BEAM)
)
def _decode(
    graphdef: Any,
    parameters: Any,
    source: Array,
    lengths: Array | None,
    *,
    return_weights: bool,
    max_length: int,
    **beam: Any,
) -> Any:
    model = nnx.merge(graphdef, parameters)
    decoder, config = model.decoder, model.config
    memory, state = model._read(source, lengths, True)
    state = model._begin(state, source, max_length)
    start = jnp.full_like(source[:, 0], config.start, jnp.int32)
    found = (decoding.beam_search if beam else decoding.greedy)(
        lambda state, tokens: decoder.step(tokens, state, memory),
        state, start=start, end=config.end, pad=config.pad, max_length=max_length, **beam,
    )  # fmt: skip
    if not return_weights:
        return found

    # Reads the tokens once more: simpler than a search that carries weights
    def weights_of(tokens: Array) -> Array:
        target_in = jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1)
        return decoder(target_in, state, memory, return_weights=True, deterministic=True)[1]

    weights = (jax.vmap(weights_of, in_axes=1, out_axes=1) if beam else weights_of)(found.tokens)
    return found, jnp.where(is_real(found.lengths, max_length)[..., None], weights, 0)


def check_lengths(lengths: Array | None, **sources: Array) -> None:
    """Lengths are integers `[B]` from 1 to S; the source is `[B, S]` or `[B, S, width]`."""
    if lengths is None:
        return
    patterns: dict[str, Any] = {
        name: (source, "B S width" if jnp.ndim(source) > 2 else "B S")
        for name, source in sources.items()
    }
    S = checks.assert_shapes(**patterns, lengths=(lengths, "B"))["S"]
    checks.assert_integers(lengths=lengths)
    checks.assert_in_range("lengths", lengths, 1, S, "S, the number of source positions")


def nan_where_lengths_are_wrong(outputs: Array, lengths: Array | None, lowest: int) -> Array:
    """Outputs `[..., S, width]`, NaN where a length lies outside `lowest` … S.

    Where lengths are known `checks.assert_in_range` refuses them; under jit they cannot be seen.
    """
    if lengths is None:
        return outputs
    lengths = jnp.asarray(lengths)[..., None, None]
    return jnp.where((lengths >= lowest) & (lengths <= outputs.shape[-2]), outputs, jnp.nan)


def check_config(config: Any, *sizes: str) -> None:
    """Check the sizes of a model's config, its dropout rate and its special ids.

    Raises:
      ValueError: a size is not positive, the rate is none, or a special id is not in the target
        vocabulary.
    """
    checks.assert_positive(**{name: getattr(config, name) for name in sizes})
    checks.assert_probability(dropout_rate=config.dropout_rate)
    for name in ("pad", "start", "end"):
        checks.assert_integers(**{name: getattr(config, name)})
        checks.assert_in_range(
            name, getattr(config, name), 0, config.target_vocabulary - 1, "the last target id"
        )


def per_step(
    module: nnx.Module, steps: int, deterministic: bool | None, *, like: Any
) -> tuple[Any, Any]:
    """The random streams of all steps, to scan over, and a function from one step's to the module.

    A scan traces its body once: with one stream every step would drop the same weights.

    Inside `jax.shard_map` the parameters differ over the axes over which `like` does, so that
    their gradients are summed over devices once, and not at every step.
    """
    parts = [part for _, part in nnx.iter_modules(module)]
    if not any(is_on(part, deterministic) for part in parts if isinstance(part, nnx.Dropout)):
        graphdef, rest = nnx.split(module)
        rest = compat.vary_alike(rest, like)
        return None, lambda streams: nnx.merge(graphdef, rest)
    with nnx.split_rngs(module, splits=steps):
        graphdef, streams, rest = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
        # A copy: leaving the block restores the streams in place
        streams = jax.tree.map(jnp.asarray, streams)
    rest = compat.vary_alike(rest, like)
    return streams, lambda streams: nnx.merge(graphdef, streams, rest)
