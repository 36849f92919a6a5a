"""What translators share: an encoder reads the source, a decoder writes one token at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.functional import checks, masks
from jattn.models import decoding

Array = jax.Array
_BEAM = ("width", "length_penalty")


class Memory(NamedTuple):
    """What a decoder reads of a batch of sources at every step; its `remember` makes it."""

    key: Array  # the encoder's outputs as the attention compares them, [B, S, F]
    value: Array  # the encoder's outputs, [B, S, F]
    mask: masks.Mask | None  # which of the S positions are real; None: all


class EncoderDecoder(nnx.Module):
    """A translator of two parts; each model has its own `config`, `encoder` and `decoder`.

    The encoder turns `(source, lengths=…, deterministic=…)` into outputs and states. The decoder
    has `remember(outputs, lengths)`, `step(tokens, state, memory)`, and in a call
    `(target_in, state, memory)` → logits and weights.
    """

    config: Any
    encoder: Any
    decoder: Any

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
          lengths: of the sources, integers `[B]` from 1 to S. None: the encoder reads the padding,
            and the decoder attends to it, as widely copied code does.
          return_weights: also return the attention weights of every step.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[B, T, C]`, or a tuple of them and weights `[B, T, S]`.

        Raises:
          ValueError: a shape does not fit; an id is unknown, or a length lies outside 1 … S (under
            jit: NaN); or the weights are asked of a model without attention.
          TypeError: ids or lengths are not integers.
        """
        checks.assert_shapes(source=(source, "B S"), target_in=(target_in, "B T"))
        self._check(source, lengths, return_weights)
        checks.validated_tokens("target_in", target_in, self.config.target_vocabulary)
        memory, state = self._read(source, lengths, deterministic)
        logits, weights = self.decoder(target_in, state, memory, deterministic=deterministic)
        return (logits, weights) if return_weights else logits

    def greedy(
        self,
        source: Array,
        *,
        lengths: Array | None = None,
        max_length: int,
        return_weights: bool = False,
    ) -> Any:
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
          A `Decoded` with tokens `[B, W, L]`, best first, or a tuple of it and weights
          `[B, W, L, S]`.

        Raises:
          ValueError, TypeError: as in a call, and as `decoding.beam_search`.
        """
        search = {"width": width, "length_penalty": length_penalty}
        return self._decode(
            source, lengths, max_length=max_length, return_weights=return_weights, **search
        )

    def _read(
        self, source: Array, lengths: Array | None, deterministic: bool | None
    ) -> tuple[Memory, Any]:
        """What the decoder attends to, and its state before the first step: the encoder's."""
        outputs, state = self.encoder(source, lengths=lengths, deterministic=deterministic)
        return self.decoder.remember(outputs, lengths), state

    def _check(self, source: Array, lengths: Array | None, return_weights: bool) -> None:
        S = checks.assert_shapes(source=(source, "B S"))["S"]
        checks.validated_tokens("source", source, self.config.source_vocabulary)
        if lengths is not None:
            checks.assert_shapes(source=(source, "B S"), lengths=(lengths, "B"))
            checks.assert_integers(lengths=lengths)
            checks.assert_in_range("lengths", lengths, 1, S, "S, the number of source positions")

    def _decode(
        self, source: Array, lengths: Array | None, *, return_weights: bool, **options: Any
    ) -> Any:
        self._check(source, lengths, return_weights)
        return _decode(*nnx.split(self), source, lengths, return_weights=return_weights, **options)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("max_length", "return_weights", *_BEAM)
)
def _decode(graphdef, parameters, source, lengths, *, return_weights, max_length, **beam) -> Any:
    model = nnx.merge(graphdef, parameters)
    decoder, config = model.decoder, model.config
    memory, state = model._read(source, lengths, True)
    start = jnp.full(source.shape[:1], config.start, jnp.int32)
    found = (decoding.beam_search if beam else decoding.greedy)(
        lambda state, tokens: decoder.step(tokens, state, memory),
        state, start=start, end=config.end, pad=config.pad, max_length=max_length, **beam,
    )  # fmt: skip
    if not return_weights:
        return found

    # Reads the tokens once more: simpler than a search that carries weights
    def weights_of(tokens: Array) -> Array:
        target_in = jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1)
        return decoder(target_in, state, memory, deterministic=True)[1]

    weights = (jax.vmap(weights_of, in_axes=1, out_axes=1) if beam else weights_of)(found.tokens)
    inside = jnp.arange(max_length, dtype=jnp.int32) < found.lengths[..., None]
    return found, jnp.where(inside[..., None], weights, 0)


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


def per_step(module: nnx.Module, steps: int, *, random: bool) -> tuple[Any, Any]:
    """The random streams of all steps, to scan over, and a function from one step's to the module.

    A scan traces its body once: with one stream every step would drop the same weights.
    """
    if not random:
        return None, lambda streams: module
    with nnx.split_rngs(module, splits=steps):
        graphdef, streams, rest = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
        # A copy: leaving the block restores the streams in place
        streams = jax.tree.map(jnp.asarray, streams)
    return streams, lambda streams: nnx.merge(graphdef, streams, rest)
