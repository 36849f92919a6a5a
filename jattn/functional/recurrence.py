"""Recurrent steps with PyTorch's equations, and the scan that runs one over a sequence."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jattn.functional import checks

Array = jax.Array
State = tuple[Array, ...]
Gates = tuple[Array, ...]
Step = Callable[[Gates, State], State]


class Weights(NamedTuple):
    """The parameters of a recurrent layer; its gates lie side by side in `[G · F]`."""

    input_kernel: Array  # W, [D, G · F]
    hidden_kernel: Array  # U, [P, G · F]
    input_bias: Array | None = None  # b, [G · F]
    hidden_bias: Array | None = None  # d, [G · F]
    proj_kernel: Array | None = None  # R, [F, P]; without one P is F


def lstm_step(gates: Array, cell: Array) -> tuple[Array, Array]:
    """One step of a long short-term memory, from gates that are summed already.

        c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)
        h' = σ(o) ⊙ tanh(c')

    Args:
      gates: i, f, g, o = W x + b + U h + d in this order, `[..., 4F]`, floating point.
      cell: c, `[..., F]`, of the same dtype.

    Returns:
      The next h' and the next c', `[..., F]` each.

    Raises:
      ValueError: a shape does not fit.
      TypeError: an argument is not floating point.

    Papers: Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; with the
      forget gate of Gers et al. 2000, https://doi.org/10.1162/089976600300015015

    Example:
      >>> lstm_step(jnp.zeros(4), jnp.ones(1))[1]  # all gates half open, candidate zero
      Array([0.5], dtype=float32)
    """
    _check("cell", cell, 4, gates=gates)
    # all four in one go, then split: on CPU a function of a slice is slow, and made anew wherever
    # it is read
    i, f, _, o = jnp.split(jax.nn.sigmoid(gates), 4, axis=-1)
    _, _, g, _ = jnp.split(jnp.tanh(gates), 4, axis=-1)
    cell = f * cell + i * g
    return o * jnp.tanh(cell), cell


def gru_step(projected: Array, hidden: Array, state: Array) -> Array:
    """One step of a gated recurrent unit, from products that are made already.

        r = σ(x_r + u_r),   z = σ(x_z + u_z)
        n = tanh(x_n + r ⊙ u_n)
        h' = (1 − z) ⊙ n + z ⊙ h

    The hidden bias in u_n lies inside the reset gate, as in PyTorch.

    Args:
      projected: x = W x_t + b, `[..., 3F]`: the gates r, z, n in this order; floating point.
      hidden: u = U h + d, `[..., 3F]`, of the same dtype.
      state: h, `[..., F]`, of the same dtype.

    Returns:
      The next state h', `[..., F]`.

    Raises:
      ValueError: a shape does not fit.
      TypeError: an argument is not floating point.

    Paper: Cho et al. 2014, https://arxiv.org/abs/1406.1078; reset gate after the product, as in its
      v1

    Example:
      >>> gates = jnp.zeros((2, 3))  # all gates half open, candidate zero
      >>> gru_step(gates, gates, jnp.ones((2, 1)))
      Array([[0.5],
             [0.5]], dtype=float32)
    """
    _check("state", state, 3, projected=projected, hidden=hidden)
    opened = jax.nn.sigmoid(projected + hidden)  # in one go, as in `lstm_step`
    reset, update, _ = jnp.split(opened, 3, axis=-1)
    resets = jnp.concatenate([reset] * 3, axis=-1)
    _, _, candidate = jnp.split(jnp.tanh(projected + resets * hidden), 3, axis=-1)
    return candidate + update * (state - candidate)


def _check(name: str, state: Array, number: int, **gates: Array) -> None:
    """The state is `[..., F]`, and all gates `[..., number · F]`."""
    if not jnp.ndim(state):
        raise ValueError(f"{name} must be [..., F], got shape ()")
    *lead, F = jnp.shape(state)
    expected = jax.ShapeDtypeStruct((*lead, number * F), bool)
    for gate, array in gates.items():
        named: dict[str, Any] = {"expected": (expected, "... gates"), gate: (array, "... gates")}
        checks.assert_shapes(**named)
    checks.assert_floating(**{name: state}, **gates)


def advance(
    step: Step, projected: Array, state: State, weights: Weights, *, apart: bool = False
) -> State:
    """Take one whole step of a layer.

        u = U h + d,   h', … = step((x + u,), (h, …)),   h' ← R h'

    It makes the product with the hidden kernel, the gates, and the projection of h if there is one.

    Args:
      step: (gates, state) -> the next state, element by element; a state is a tuple that begins
        with h.
      projected: x = W x_t + b, `[..., G · F]`, floating point.
      state: h `[..., P]`, then what else the step keeps, `[..., F]` each; of the same dtype.
      weights: U, d and R are used.
      apart: whether the step takes x and u apart, as a pair, rather than their sum.

    Returns:
      The next state, like `state`.

    Example:
      >>> weights = Weights(jnp.eye(3), jnp.eye(3))
      >>> step = lambda gates, state: (jnp.tanh(gates[0]),)
      >>> (h,) = advance(step, jnp.zeros((2, 3)), (jnp.zeros((2, 3)),), weights)
      >>> h.shape
      (2, 3)
    """
    return _project(step(_gates(projected, state[0], weights, apart), state), weights)


def _gates(projected: Array, h: Array, weights: Weights, apart: bool) -> Gates:
    hidden = _plus(h @ weights.hidden_kernel, weights.hidden_bias)
    return (projected, hidden) if apart else (projected + hidden,)


def _project(state: State, weights: Weights) -> State:
    return state if weights.proj_kernel is None else (state[0] @ weights.proj_kernel, *state[1:])


def recur(
    step: Step,
    inputs: Array,
    state: State,
    weights: Weights,
    *,
    apart: bool = False,
    inside: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, State]:
    """Every step of a sequence, time first. Differentiable in reverse mode, to any order.

    Args:
      step, weights, apart: as `advance` takes them.
      inputs: `[T, ..., D]`, floating point.
      state: before the first step, as `advance` takes it.
      inside: booleans `[T, ..., 1]`; where False a step leaves the state as it is. None: True
        everywhere.
      reverse: run from the last step to the first.

    Returns:
      h after every step, `[T, ..., P]`, and the state after the last one that ran.

    Example:
      >>> weights = Weights(jnp.eye(3), jnp.eye(3))
      >>> step = lambda gates, state: (jnp.tanh(gates[0]),)
      >>> states, (last,) = recur(step, jnp.zeros((5, 2, 3)), (jnp.zeros((2, 3)),), weights)
      >>> states.shape, last.shape
      ((5, 2, 3), (2, 3))
    """
    return _recur((step, apart, reverse), inputs, inside, state, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    how: tuple[Step, bool, bool],
    inputs: Array,
    inside: Array | None,
    state: State,
    weights: Weights,
) -> tuple[Array, State]:
    return _forward(how, inputs, inside, state, weights)[0]


def _forward(
    how: tuple[Step, bool, bool],
    inputs: Array,
    inside: Array | None,
    state: State,
    weights: Weights,
) -> tuple[tuple[Array, State], Any]:
    """Keeps of every step what its gates are made of, and the state that it found."""
    step, apart, reverse = how

    def body(state: State, at: tuple[Array, Array | None]) -> tuple[State, Any]:
        projected, inside = at
        projected = _plus(projected, weights.input_bias)
        gates = _gates(projected, state[0], weights, apart)
        after = _where(inside, _project(step(gates, state), weights), state)
        return after, (gates[-1], state)

    flat = _rows(inputs) @ weights.input_kernel  # one product for all steps
    projected = flat.reshape(*inputs.shape[:-1], flat.shape[-1])
    last, (gates, before) = jax.lax.scan(body, state, (projected, inside), reverse=reverse)
    found, end = before[0], last[0][None]
    states = jnp.concatenate([end, found[:-1]] if reverse else [found[1:], end])
    kept = (projected, gates) if apart else (gates,)
    return (states, last), (inputs, inside, weights, kept, before)


def _backward(
    how: tuple[Step, bool, bool], kept: Any, cotangents: tuple[Array, State]
) -> tuple[Any, ...]:
    """Carry only the cotangent of the state from step to step.

    The cotangent of each weight is one product for all steps.
    """
    step, apart, reverse = how
    inputs, inside, weights, gates, before = kept
    hidden_kernel = rearrange(weights.hidden_kernel, "p gates -> gates p")
    proj_kernel = (
        None if weights.proj_kernel is None else rearrange(weights.proj_kernel, "f p -> p f")
    )

    def body(d_state: State, at: Any) -> tuple[State, Any]:
        inside, gates, before, d_output = at
        gates = (_plus(gates[0], weights.input_bias), gates[1]) if apart else gates
        d_state = (d_state[0] + d_output, *d_state[1:])
        zero = jax.tree.map(jnp.zeros_like, d_state)
        d_after, d_kept = _where(inside, d_state, zero), _where(inside, zero, d_state)
        after, pull = jax.vjp(step, gates, before)
        outward = None if proj_kernel is None else (after[0], d_after[0])
        d_step = d_after if proj_kernel is None else (d_after[0] @ proj_kernel, *d_after[1:])
        d_gates, d_before = pull(d_step)
        d_before = (d_before[0] + d_gates[-1] @ hidden_kernel, *d_before[1:])
        if inside is not None:
            d_before = tuple(a + b for a, b in zip(d_before, d_kept, strict=True))
        return d_before, (d_gates, outward)

    at = (inside, gates, before, cotangents[0])
    d_state, (d_gates, outward) = jax.lax.scan(body, cotangents[1], at, reverse=not reverse)
    d_projected, d_hidden = _rows(d_gates[0]), _rows(d_gates[-1])
    d_weights = Weights(
        _product(_rows(inputs), d_projected),
        _product(_rows(before[0]), d_hidden),
        None if weights.input_bias is None else jnp.sum(d_projected, axis=0),
        None if weights.hidden_bias is None else jnp.sum(d_hidden, axis=0),
        None if outward is None else _product(*map(_rows, outward)),
    )
    d_inputs = d_projected @ rearrange(weights.input_kernel, "d gates -> gates d")
    return d_inputs.reshape(inputs.shape), None, d_state, d_weights


_recur.defvjp(_forward, _backward)


def _where(inside: Array | None, new: State, old: State) -> State:
    return (
        new
        if inside is None
        else tuple(jnp.where(inside, a, b) for a, b in zip(new, old, strict=True))
    )


def _plus(product: Array, bias: Array | None) -> Array:
    return product if bias is None else product + bias


def _rows(array: Array) -> Array:
    return rearrange(array, "... width -> (...) width")


def _product(left: Array, right: Array) -> Array:
    return jnp.einsum("rm,rn->mn", left, right)
