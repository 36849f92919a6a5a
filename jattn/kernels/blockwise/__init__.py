"""Attention block by block, in linear memory: forward, and derivatives of every kind and order.

    for part of the batch:                        grid.py, sizes.py
      for row i of blocks:                        ┌───┬───┬───┐
        read the queries of the row            i  │   │ j │   │  a block: rows × columns of scores
        for column j that the mask leaves:        └───┴───┴───┘
          EMPTY    nothing
          PARTIAL  scores, mask, softmax          scoring.py
          FULL     scores, softmax
          fold into the row's sums                forward.py: output, lse
                                                  tangent.py: their derivatives

No array of T × S elements exists except those that the caller passes, such as a bias, and their
gradients. (Each block has a class: one byte for some 100,000 scores.)

The forward pass is an online softmax (forward.py). Its tangent is a sum over blocks (tangent.py),
which is one operation with rules for its own tangent, transpose and batch (sums.py): so gradients,
`jax.jvp`, Hessian-vector products and derivatives of any order are such sums as well.

Papers: Rabe & Staats 2021, https://arxiv.org/abs/2112.05682; Dao et al. 2022,
https://arxiv.org/abs/2205.14135
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jattn.functional import dtypes
from jattn.kernels.blockwise import sizes
from jattn.kernels.blockwise.forward import forward
from jattn.kernels.blockwise.tangent import tangent
from jattn.kernels.execute import execute, mesh_refusal
from jattn.kernels.scoring import Operands, Scoring, prepare
from jattn.request import Request, Result

Array = jax.Array


def refuses(request: Request) -> str | None:
    """Why this kernel cannot do what is asked; None if it can."""
    if request.return_weights:
        return 'it never holds all weights, for return_weights: "dense" does'
    if request.is_symbolic:
        return "its loops need lengths that are numbers, not symbols"
    return mesh_refusal(request)


def run(request: Request) -> Result:
    """Attention by this kernel."""
    *batch, T, N, _ = request.query.shape
    if 0 in (*batch, T, request.key.shape[-3]):
        output = jnp.zeros((*batch, T, N, request.value.shape[-1]), request.value.dtype)
        lse = jnp.full((*batch, T, N), -jnp.inf, dtypes.accumulator(request.query.dtype))
        return Result(output, lse, None)
    return execute(_run, *prepare(request, *sizes.choose_grid(request)), request)


def _run(scoring: Scoring, operands: Operands) -> Result:
    grid, dtype = scoring.grid, operands.value.dtype
    rows = operands.query.shape[:-1]
    query, key, value = map(grid.parts, operands[:3])
    operands = operands._replace(query=query, key=key, value=value)
    output, maximum, log_total = _attend(scoring, _classes(scoring, operands), operands)
    lse = jnp.where(log_total < 0, -jnp.inf, maximum + log_total)
    return Result(output.reshape(*rows, -1).astype(dtype), lse.reshape(rows), None)


def _classes(scoring: Scoring, operands: Operands) -> Array | None:
    """EMPTY, PARTIAL or FULL for every block: `[parts, num_rows, num_columns]`; None: all alike."""
    if scoring.classes is None:
        return None
    grid, pure = scoring.grid, functools.partial(scoring.classes, operands.captured)
    rows = jnp.arange(grid.num_rows, dtype=jnp.int32)
    parts = jnp.arange(grid.num_parts, dtype=jnp.int32)
    return jax.lax.map(lambda b: jax.lax.map(lambda i: pure(b, i, operands.first), rows), parts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    scoring: Scoring, classes: Array | None, operands: Operands
) -> tuple[Array, Array, Array]:
    """Output, maximum and log_total: see `forward`."""
    with scoring.at_precision():
        return forward(scoring, classes, operands)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _derivative(scoring: Scoring, primals: Any, tangents: Any) -> Any:
    """The rule for tangents. For higher orders JAX applies it again, through `_attend`."""
    classes, operands = primals
    names = "attend_output", "attend_lse", "attend_lse"
    results = tuple(map(checkpoint_name, _attend(scoring, classes, operands), names))
    d_operands = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        tangents[1],
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    if all(t is None for t in jax.tree.leaves(d_operands, is_leaf=lambda t: t is None)):
        return results, jax.tree.map(jnp.zeros_like, results)
    d_output, d_lse = tangent(scoring, classes, operands, results, d_operands)
    # The log-sum-exp is maximum + log_total: all of its tangent is the tangent of log_total
    return results, (d_output, jnp.zeros_like(results[1]), d_lse)
