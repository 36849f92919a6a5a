"""Recurrent steps with PyTorch's equations, and the scan that runs one over a sequence."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jattn.functional import checks, compat
from jattn.functional.captures import Captures

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
    *batch, F = jnp.shape(state)
    expected = jax.ShapeDtypeStruct((*batch, number * F), bool)
    for gate, array in gates.items():
        named: dict[str, Any] = {"expected": (expected, "... gates"), gate: (array, "... gates")}
        checks.assert_shapes(**named)
    checks.assert_floating(**{name: state}, **gates)


def advance(
    step: Step, projected: Array, state: State, weights: Weights, *, separate: bool = False
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
      separate: whether the step takes x and u as a pair rather than as their sum.

    Returns:
      The next state, like `state`.

    Example:
      >>> weights = Weights(jnp.eye(3), jnp.eye(3))
      >>> step = lambda gates, state: (jnp.tanh(gates[0]),)
      >>> (h,) = advance(step, jnp.zeros((2, 3)), (jnp.zeros((2, 3)),), weights)
      >>> h.shape
      (2, 3)
    """
    return _project(step(_gates(projected, state[0], weights, separate), state), weights)


def _gates(projected: Array, h: Array, weights: Weights, separate: bool) -> Gates:
    hidden = added(h @ weights.hidden_kernel, weights.hidden_bias)
    return (projected, hidden) if separate else (projected + hidden,)


def _project(state: State, weights: Weights) -> State:
    return state if weights.proj_kernel is None else (state[0] @ weights.proj_kernel, *state[1:])


def recur(
    step: Step,
    inputs: Array,
    state: State,
    weights: Weights,
    *,
    separate: bool = False,
    valid: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, State]:
    """Every step of a sequence, time first. Differentiable in both modes, to any order.

    Args:
      step, weights, separate: as `advance` takes them. The step may close over arrays.
      inputs: `[T, ..., D]`, floating point.
      state: before the first step, as `advance` takes it.
      valid: booleans `[T, ..., 1]`; where False a step leaves the state as it is. None: True
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
    given = jax.tree.leaves((inputs, valid, state, weights))
    mesh = compat.explicit_mesh(given)
    captures = Captures(frozenset().union(*map(compat.varying, given)), mesh)
    width = weights.hidden_kernel.shape[-1]
    gates = jax.ShapeDtypeStruct((*state[0].shape[:-1], width), inputs.dtype)
    pure = captures.hoist(
        lambda _, gates, state: step(gates, state), None, (gates,) * (1 + separate), state
    )
    operands = compat.vary_alike(_Operands(inputs, valid, state, weights, captures.arrays))
    _, *batch, _ = jax.typeof(inputs).sharding.spec
    specs = PartitionSpec(None, *batch, None), (PartitionSpec(*batch, None),) * len(state)
    run = functools.partial(_states, _Static(pure, separate, reverse))
    return compat.automatically(run, specs)(operands)


class _Static(NamedTuple):
    """All that is static in a recurrence."""

    step: Any  # (captured, gates, state) -> state
    separate: bool
    reverse: bool


class _Operands(NamedTuple):
    """All arrays of a recurrence."""

    inputs: Array
    valid: Array | None
    state: State
    weights: Weights
    captured: list[Array]


class _Trace(NamedTuple):
    """What every step found and made, `[T, ...]` each."""

    h: Array  # after the step
    before: State  # the state that it found
    gates: Gates  # where the gates are separate, x has no bias yet
    unprojected: Array | None  # h before its projection, if there is one


@functools.partial(jax.jit, static_argnums=0)
def _states(static: _Static, operands: _Operands) -> tuple[Array, State]:
    last, trace = _scan(static, operands)
    return trace.h, last


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scan(static: _Static, operands: _Operands) -> tuple[State, _Trace]:
    """The state after the last step, and a trace of all."""
    inputs, valid, state, weights, captured = operands

    def body(state: State, at: tuple[Array, Array | None]) -> tuple[State, Any]:
        projected, valid = at
        biased = added(projected, weights.input_bias)
        gates = _gates(biased, state[0], weights, static.separate)
        after = static.step(captured, gates, state)
        unprojected = None if weights.proj_kernel is None else after[0]
        return _where(valid, _project(after, weights), state), (state, gates[-1], unprojected)

    projected = inputs @ weights.input_kernel  # one product for all steps
    last, (before, gates, unprojected) = jax.lax.scan(
        body, state, (projected, valid), reverse=static.reverse
    )
    found, end = before[0], last[0][None]
    h = jnp.concatenate([end, found[:-1]] if static.reverse else [found[1:], end])
    return last, _Trace(h, before, (projected, gates) if static.separate else (gates,), unprojected)


@functools.partial(_scan.defjvp, symbolic_zeros=True)
def _derivative(static: _Static, primals: Any, tangents: Any) -> Any:
    """Only the tangent of the state goes from step to step.

    Every product with a tangent of inputs or weights is made before the loop, for all steps at
    once. So is, when JAX transposes this rule, the gradient of each weight.
    """
    (operands,), (tangents,) = primals, jax.tree.map(_or_none, tangents)
    last, trace = _scan(static, operands)
    weights, d_weights = operands.weights, tangents.weights
    d_projected = added(
        None if tangents.inputs is None else tangents.inputs @ weights.input_kernel,
        _times(operands.inputs, d_weights.input_kernel),
    )
    d_hidden = added(_times(trace.before[0], d_weights.hidden_kernel), d_weights.hidden_bias)
    d_biased = added(d_projected, d_weights.input_bias)
    parts: Any = (d_biased, d_hidden) if static.separate else (added(d_biased, d_hidden),)
    fixed: Any = tuple(_as_large(part, trace.gates[0]) for part in parts)
    outward = _times(trace.unprojected, d_weights.proj_kernel)
    d_captured = [*map(_filled, operands.captured, tangents.captured)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(d_state: Any, at: Any) -> tuple[Any, Any]:
        valid, gates, before, fixed, outward = at
        *d_outer, d_hidden = fixed
        d_gates: Any = (*d_outer, added(d_state[0] @ weights.hidden_kernel, d_hidden))
        if static.separate:
            gates = added(gates[0], weights.input_bias), gates[1]
            d_gates = _filled(gates[0], d_gates[0]), d_gates[1]
        found, d_found = (operands.captured, gates, before), (d_captured, d_gates, d_state)
        d_unprojected = jax.jvp(static.step, found, d_found)[1]
        d_after = _project(d_unprojected, weights)
        d_output: Any = added(d_after[0], outward)
        d_after = _where(valid, (d_output, *d_after[1:]), d_state)
        return d_after, (d_after[0], d_state, d_gates[-1], d_unprojected[0])

    steps = operands.valid, trace.gates, trace.before, fixed, outward
    d_state = tuple(map(_filled, operands.state, tangents.state))
    d_last, (d_h, d_before, d_gates, d_unprojected) = jax.lax.scan(
        body, d_state, steps, reverse=static.reverse
    )
    d_kept = (_filled(trace.gates[0], d_projected), d_gates) if static.separate else (d_gates,)
    d_unprojected = None if trace.unprojected is None else d_unprojected
    return (last, trace), (d_last, _Trace(d_h, d_before, d_kept, d_unprojected))


def _or_none(tangent: Any) -> Any:
    return None if isinstance(tangent, SymbolicZero) else tangent


def _filled(array: Array, tangent: Array | None) -> Any:
    """A tangent, or the zero that stands for none."""
    if tangent is not None:
        return tangent
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def _times(left: Array | None, d_kernel: Array | None) -> Array | None:
    """`left [..., m] @ d_kernel [m, n]`, written as (d_kernelᵀ leftᵀ)ᵀ.

    The transpose of this product is the gradient of a kernel. Written so, it multiplies leftᵀ by
    the cotangent as both lie in memory. JAX transposes `left @ d_kernel` into a product that first
    copies the cotangent, the larger of the two: 2.7 × slower on CPU.
    """
    if left is None or d_kernel is None:
        return None
    rows = rearrange(left, "... m -> (...) m")
    product = jnp.einsum("nm, rm -> nr", rearrange(d_kernel, "m n -> n m"), rows)
    return rearrange(product, "n r -> r n").reshape(*left.shape[:-1], d_kernel.shape[-1])


def added(*terms: Array | None) -> Any:
    """The sum of the terms that are not None, aligned at their last axes; None: there is none."""
    given = [term for term in terms if term is not None]
    axes = max((term.ndim for term in given), default=0)
    given = [jnp.expand_dims(term, range(axes - term.ndim)) for term in given]
    return functools.reduce(jnp.add, given) if given else None


def _as_large(term: Array | None, like: Array) -> Array | None:
    return None if term is None else jnp.broadcast_to(term, like.shape)


def _where(valid: Array | None, new: State, old: State) -> State:
    if valid is None:
        return new
    return tuple(jnp.where(valid, a, b) for a, b in zip(new, old, strict=True))
