"""Token ids: checked, embedded, and predicted."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jattn.functional import checks

Array = jax.Array


def embed(name: str, tokens: Array, embedding: nnx.Embed) -> Array:
    """The rows of token ids, checked by `checks.validated_tokens`."""
    return embedding(checks.validated_tokens(name, tokens, embedding.num_embeddings))


def cross_entropy(logits: Array, targets: Array, *, lengths: Array | None = None) -> Array:
    """The mean negative log-likelihood of the real target tokens.

        −(1/n) Σ log softmax(logits)[target]   over the n real tokens

    Args:
      logits: `[..., T, C]`, floating point.
      targets: token ids `[..., T]`: what each step should predict, the end token included.
      lengths: integers `[...]`, how many targets of each sequence are real; None: all.

    Returns:
      A scalar in nats; NaN if no token is real.

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
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, checks.validated_tokens("targets", targets, sizes["C"])
    )
    if lengths is None:
        return jnp.mean(losses)
    checks.assert_shapes(targets=(targets, "... T"), lengths=(lengths, "..."))
    checks.assert_integers(lengths=lengths)
    checks.assert_in_range("lengths", lengths, 0, sizes["T"], "T, the number of targets")
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    return jnp.mean(losses, where=jnp.arange(sizes["T"], dtype=jnp.int32) < lengths[..., None])
