"""Run a kernel where its arrays live: eagerly or under `jit`, on one device, a mesh, a shard."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jattn.functional import compat
from jattn.kernels.scoring import Operands, Scoring
from jattn.request import Request, Result

Kernel = Callable[[Scoring, Operands], Result]
Specs: Any = Result  # how each array of a result is sharded


def execute(run: Kernel, scoring: Scoring, operands: Operands, request: Request) -> Result:
    """Call a kernel.

    JAX traces and compiles it once for all equal requests, inside of `jit` and outside. In a
    `jax.shard_map`, all operands vary over the same axes. On a mesh with explicit axes, the kernel
    runs as if they were automatic, because loops need not agree there on the sharding of each
    array. Results have the sharding of the query, or that of the keys' batch if the query has none.
    Where queries are sharded, each device computes its own queries over all keys.
    """
    operands = compat.vary_alike(operands)
    run = _compiled(run)
    if request.mesh is None:
        return run(scoring, operands)
    operands = operands._replace(
        key=_gathered(operands.key, request.mesh), value=_gathered(operands.value, request.mesh)
    )
    is_sharded = scoring.grid.T < request.query.shape[-3]  # the grid is that of one shard
    local = functools.partial(_over_rows, run, request) if is_sharded else run
    run_on_mesh = compat.automatically(functools.partial(local, scoring), _result_specs(request))
    result: Result = run_on_mesh(operands)
    return result


def mesh_refusal(request: Request) -> str | None:
    """Why no kernel of ours can run where the arrays lie; None if it can."""
    if request.mesh is not None and compat.has_manual_axes(request.mesh):
        return (
            "some axes of the mesh are manual, in a shard_map, and others explicit: JAX does not "
            "support both at once; make all of them manual"
        )
    return None


def _gathered(rows: jax.Array, mesh: Any) -> jax.Array:
    """Gather keys or values on each device, once, before any loop."""
    spec = list(jax.typeof(rows).sharding.spec)
    if spec[-3] is None:
        return rows
    spec[-3] = None
    gathered: jax.Array = jax.sharding.reshard(rows, NamedSharding(mesh, PartitionSpec(*spec)))
    return gathered


def _over_rows(run: Kernel, request: Request, scoring: Scoring, operands: Operands) -> Result:
    """Each device computes its own queries, over all keys."""
    axes = request.row_axes
    batch = (None,) * (request.query.ndim - 3)

    def of_bias(bias: Any) -> PartitionSpec:
        rows = axes if bias.shape[-2] > 1 else None
        return PartitionSpec(*(None,) * (bias.ndim - 2), rows, None)

    def local(operands: Operands) -> Result:
        first = jax.lax.axis_index(axes) * scoring.grid.T
        return run(scoring, operands._replace(first=first))

    whole, rows = PartitionSpec(), PartitionSpec(*batch, axes)
    given = jax.tree.map(lambda _: whole, operands)
    given = given._replace(query=rows, biases=[of_bias(bias) for bias in operands.biases])
    sharded = jax.shard_map(
        local,
        in_specs=(given,),
        out_specs=Specs(rows, rows, None),
        axis_names=set(axes),
        check_vma=False,
    )
    result: Result = jax.jit(sharded)(operands)  # JAX refuses a partial shard_map outside of jit
    return result


def _result_specs(request: Request) -> Any:
    *batch, T, N, _ = jax.typeof(request.query).sharding.spec
    if not any((*batch, T, N)):  # queries that all examples share: their batch is that of the keys
        batch = list(jax.typeof(request.key).sharding.spec[:-3])
    weights = PartitionSpec(*batch, N, T, None) if request.return_weights else None
    return Specs(PartitionSpec(*batch, T, N, None), PartitionSpec(*batch, T, N), weights)


@functools.cache
def _compiled(run: Kernel) -> Kernel:
    return jax.jit(run, static_argnums=0)
