"""Token ids: checked, embedded, and predicted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.nnx.nn import initializers

from jattn.functional import checks, compat, dtypes
from jattn.nn._shared import is_real
from jattn.nn.embedding import Embedding

Array = jax.Array

# A `jattn.nn.Embedding` that begins with the numbers of `flax.nnx.Embed`
Embed = functools.partial(
    Embedding, embedding_init=initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
)


def embed(name: str, tokens: Array, embedding: Embedding) -> Array:
    """The rows of token ids; an error of `checks.validated_tokens` names the argument."""
    return embedding(checks.validated_tokens(name, tokens, embedding.num_embeddings))


def cross_entropy(
    logits: Array, targets: Array, *, lengths: Array | None = None, ignored: int | None = None
) -> Array:
    """The mean negative log-likelihood of the real target tokens.

        −(1/n) Σ log softmax(logits)[target]   over the n real tokens

    Args:
      logits: `[..., T, C]`, floating point.
      targets: token ids `[..., T]`: what each step should predict, the end token included.
      lengths: integers `[...]`, how many targets of each sequence are real; None: all.
      ignored: an id that marks targets that are not real, such as −100, wherever they stand.

    Returns:
      A scalar in nats, of float32 for logits of half precision; NaN if no token is real.

    Raises:
      ValueError: a shape does not fit, an id is not in the vocabulary (under jit: NaN), or a length
        lies outside 0 … T.
      TypeError: logits are not floating point, or targets or lengths are not integers.

    Example:
      >>> logits, targets = jnp.zeros((1, 3, 4)), jnp.array([[2, 1, 0]])
      >>> cross_entropy(logits, targets, lengths=jnp.array([2])).round(3)  # log 4
      Array(1.386, dtype=float32)
    """
    sizes = checks.assert_shapes(logits=(logits, "... T C"), targets=(targets, "... T"))
    checks.assert_floating(logits=logits)
    checks.assert_integers(targets=targets)
    real = None
    if ignored is not None:
        real = jnp.asarray(targets) != ignored
        targets = _replaced(targets, ignored)
    targets = checks.validated_tokens("targets", targets, sizes["C"])
    losses = compat.automatically(
        optax.softmax_cross_entropy_with_integer_labels, jax.typeof(targets).sharding.spec
    )(jnp.asarray(logits, dtypes.accumulator(logits.dtype)), targets)
    if lengths is not None:
        checks.assert_shapes(targets=(targets, "... T"), lengths=(lengths, "..."))
        checks.assert_integers(lengths=lengths)
        checks.assert_in_range("lengths", lengths, 0, sizes["T"], "T, the number of targets")
        within = is_real(lengths, sizes["T"])
        real = within if real is None else real & within
    return jnp.mean(losses, where=real)


def _replaced(targets: Any, ignored: int) -> Any:
    """Targets with 0 for `ignored`; known ones stay known, so that they are checked."""
    known = checks.concrete(targets)
    if known is not None:
        return np.where(known == ignored, 0, known)
    return jnp.where(targets == ignored, 0, targets)
