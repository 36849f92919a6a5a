"""Gradients of a batch that is taken in parts, one after the other, to need less memory.

The step is that of the whole batch: where the parts have different numbers of tokens, the mean
over all tokens is not the mean of the parts' means.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from experiments import BadInput


class Sum(NamedTuple):
    """A sum over a batch, or over a part of it, and how many numbers it is of."""

    total: jax.Array
    number: jax.Array | float


def cross_entropies(logits: jax.Array, targets: jax.Array, *, ignored: int) -> Sum:
    """The negative log-likelihoods of targets [..., T] by logits [..., T, C], in float32.

    Where a target is `ignored` there is none; there may be none at all.
    """
    real = targets != ignored
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(real, targets, 0)
    )
    return Sum(jnp.sum(losses, where=real), real.sum().astype(jnp.float32))


Loss = Callable[[Any, Any], jax.Array | Sequence[Sum]]


def value_and_gradients(
    loss: Loss, model: nnx.Module, batch: Any, parts: int = 1
) -> tuple[jax.Array, nnx.State]:
    """The loss of a batch, and its gradients with respect to all parameters.

        loss = Σ_terms (Σ_parts total / Σ_parts number)

    Args:
      loss: `(model, batch) -> terms`, each a `Sum`; or a scalar, and then all parts weigh the same.
      model: any NNX module; its random streams move on.
      batch: a pytree of arrays `[B, …]`.
      parts: how many times B / parts examples are taken. Dropout differs from part to part.

    Raises:
      BadInput: the number of parts does not divide B.
    """
    if parts == 1:
        return nnx.value_and_grad(lambda model: _mean(_terms(loss(model, batch))))(model)
    graph, parameters, rest = _split(model)
    batch = jax.tree.map(lambda array: _in_parts(array, parts), batch)

    def numbers(part: Any) -> list[Any]:
        # Only what the numbers depend on is compiled: the labels, not the model
        return [term.number for term in _terms(loss(_merged(graph, parameters, rest), part))]

    of_all: list[jax.Array] = [number.sum() for number in jax.lax.map(numbers, batch)]

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        rest, total, gradients = carry

        def of_part(model: nnx.Module) -> jax.Array:
            terms = _terms(loss(model, part))
            return _mean([Sum(term.total, n) for term, n in zip(terms, of_all, strict=True)])

        model = _merged(graph, parameters, rest)
        value, new = nnx.value_and_grad(of_part)(model)
        _, _, rest = _split(model)
        return (rest, total + value, jax.tree.map(jnp.add, gradients, new)), None

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    begin = rest, jnp.zeros((), of_all[0].dtype), zeros
    (rest, total, gradients), _ = jax.lax.scan(add, begin, batch)
    nnx.update(model, rest)
    return total, gradients


def _split(model: nnx.Module) -> Any:
    return nnx.split(model, nnx.Param, ...)


def _merged(graph: nnx.GraphDef, *states: nnx.State) -> Any:
    # New variables, for those of an outer trace may not change in an inner one
    return nnx.merge(graph, *jax.tree.map(lambda array: array, states))


def _terms(value: Any) -> list[Sum]:
    terms = [Sum(value, 1.0)] if isinstance(value, jax.Array) else value
    return [Sum(total, jnp.asarray(number, total.dtype)) for total, number in terms]


def _mean(terms: Sequence[Sum]) -> jax.Array:
    means = [term.total / term.number for term in terms]
    return sum(means[1:], start=means[0])


def _in_parts(array: jax.Array, parts: int) -> jax.Array:
    if array.shape[0] % parts:
        raise BadInput(f"--accumulate {parts} must divide the batch of {array.shape[0]}")
    return rearrange(array, "(n b) ... -> n b ...", n=parts)
