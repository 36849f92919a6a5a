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

    It is traced and compiled once for all calls that ask for the same, inside of `jit` and outside.
    In a `jax.shard_map`, all operands are made to vary over the same axes. On a mesh with explicit
    axes it runs as on one with automatic axes, where loops need not agree on where each array lies;
    what comes out lies as the query does. Where queries are sharded, each device takes its own, and
    all keys.
    """
    operands = compat.vary_alike(operands)
    run = _compiled(run)
    if request.mesh is None:
        return run(scoring, operands)
    leaves, structure = jax.tree.flatten(
        operands._replace(
            key=_gathered(operands.key, request.mesh), value=_gathered(operands.value, request.mesh)
        )
    )

    def unflattened(*leaves: Any) -> Result:
        given = jax.tree.unflatten(structure, leaves)
        if scoring.grid.T < request.query.shape[-3]:  # the kernel wants a shard of the queries
            return _over_rows(run, scoring, given, request)
        return run(scoring, given)

    return jax.sharding.auto_axes(unflattened, out_sharding=_out_sharding(request))(*leaves)


def mesh_refusal(request: Request) -> str | None:
    """Why no kernel of ours can run where the arrays lie; None if it can."""
    if request.mesh is not None and compat.has_manual_axes(request.mesh):
        return (
            "some axes of the mesh are manual, in a shard_map, and others explicit, from where JAX "
            "has no way on: make all of them manual"
        )
    return None


def _gathered(rows: jax.Array, mesh: Any) -> jax.Array:
    """Keys or values, each device with all of them: once, and not in a loop."""
    spec = list(jax.typeof(rows).sharding.spec)
    if spec[-3] is None:
        return rows
    spec[-3] = None
    return jax.sharding.reshard(rows, NamedSharding(mesh, PartitionSpec(*spec)))


def _over_rows(run: Kernel, scoring: Scoring, operands: Operands, request: Request) -> Result:
    """Each device computes its own queries, over all keys."""
    axes = request.row_axes
    lead = (None,) * (request.query.ndim - 3)

    def of_bias(bias: Any) -> PartitionSpec:
        rows = axes if bias.shape[-2] > 1 else None
        return PartitionSpec(*(None,) * (bias.ndim - 2), rows, None)

    def local(operands: Operands) -> Result:
        first = jax.lax.axis_index(axes) * scoring.grid.T
        return run(scoring, operands._replace(first=first))

    whole, rows = PartitionSpec(), PartitionSpec(*lead, axes)
    given = jax.tree.map(lambda _: whole, operands)
    given = given._replace(query=rows, biases=[of_bias(bias) for bias in operands.biases])
    sharded = jax.shard_map(
        local,
        in_specs=(given,),
        out_specs=Specs(rows, rows, None),
        axis_names=set(axes),
        check_vma=False,
    )
    return jax.jit(sharded)(operands)  # eagerly, a shard_map over some axes alone is refused


def _out_sharding(request: Request) -> Any:
    *lead, T, N, _ = jax.typeof(request.query).sharding.spec

    def placed(*spec: Any) -> NamedSharding:
        return NamedSharding(request.mesh, PartitionSpec(*spec))

    weights = placed(*lead, N, T, None) if request.return_weights else None
    return Specs(placed(*lead, T, N, None), placed(*lead, T, N), weights)


@functools.cache
def _compiled(run: Kernel) -> Kernel:
    return jax.jit(run, static_argnums=0)
