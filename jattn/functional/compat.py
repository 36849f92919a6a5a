"""What differs between versions of JAX, and the parts of it that are not in its main namespace.

No other file of jattn imports `jax.extend`, `jax.interpreters` or `jax.experimental`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
ClosedJaxpr = core.ClosedJaxpr
Literal = core.Literal
jaxpr_as_fun = core.jaxpr_as_fun


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all jaxprs inside them.

    Example:
      >>> [e.primitive.name for e in equations(jax.make_jaxpr(lambda x: x + 1)(1).jaxpr)]
      ['add']
    """
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def fingerprint(closed: Any) -> Any:
    """A hashable value that is equal for two jaxprs with the same equations.

    A function in a jaxpr, such as a rule of a `jax.custom_jvp`, is equal only to itself.

    Raises:
      TypeError: the jaxpr holds something that is not comparable, such as an array.

    Example:
      >>> two = [fingerprint(jax.make_jaxpr(lambda x: x + 1)(1)) for _ in range(2)]
      >>> two[0] == two[1]
      True
    """
    jaxpr = closed.jaxpr
    numbers = {variable: n for n, variable in enumerate((*jaxpr.constvars, *jaxpr.invars))}

    def operand(variable: Any) -> Any:
        if not isinstance(variable, Literal):
            return numbers[variable]
        if jnp.ndim(variable.val) > 0:
            raise TypeError("an array")
        return str(variable.aval), np.asarray(variable.val).tobytes()

    steps = []
    for equation in jaxpr.eqns:
        inputs = tuple(map(operand, equation.invars))
        params = tuple((key, _comparable(value)) for key, value in sorted(equation.params.items()))
        made = tuple(str(variable.aval) for variable in equation.outvars)
        numbers |= {variable: len(numbers) + n for n, variable in enumerate(equation.outvars)}
        steps.append((equation.primitive, inputs, params, made))
    avals = tuple(str(variable.aval) for variable in (*jaxpr.constvars, *jaxpr.invars))
    return avals, tuple(steps), tuple(map(operand, jaxpr.outvars))


def _comparable(value: Any) -> Any:
    if hasattr(value, "eqns") or isinstance(value, ClosedJaxpr):
        if getattr(value, "consts", ()):
            raise TypeError("a jaxpr that holds arrays")
        return fingerprint(value if hasattr(value, "jaxpr") else ClosedJaxpr(value, ()))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((key, _comparable(each)) for key, each in sorted(value.items()))
    if isinstance(value, (bool, int, float, complex)):  # 0 == False, and 0.0 == −0.0
        return type(value), repr(value)
    hash(value)
    return value


def varying(array: Any) -> frozenset[str]:
    """The axes of an enclosing `jax.shard_map` over which a value differs between devices.

    Example:
      >>> varying(jnp.ones(3))
      frozenset()
    """
    return varying_of(jax.typeof(array))


def varying_of(aval: Any) -> frozenset[str]:
    """The same for the type of a value, its aval, or for a `jax.ShapeDtypeStruct`."""
    manual = getattr(aval, "mat", getattr(aval, "manual_axis_type", aval))
    return frozenset(getattr(manual, "varying", None) or ())


def vary_alike(arrays: Any, like: Any = ()) -> Any:
    """Let all arrays differ over every axis over which one of them, or of `like`, does.

    Loops and derivative rules need this. The transpose of this step sums the cotangents of a
    replicated array over devices. It is outside of every loop, and so runs once.
    """
    return vary_over(frozenset().union(*map(varying, jax.tree.leaves((arrays, like)))), arrays)


def vary_over(names: Iterable[str], arrays: Any) -> Any:
    """Let all arrays differ over these axes of an enclosing `jax.shard_map`."""

    def lift(array: Any) -> Any:
        missing = tuple(sorted(frozenset(names) - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(lift, arrays)


def shape_of(array: Any, names: frozenset[str]) -> Any:
    """A value of this shape and dtype that differs over these axes; its sharding is left out."""
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return vary_over(names, jnp.zeros(shape.shape, shape.dtype)) if names else shape


def evaluate(closed: ClosedJaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on arrays whose varying axes or sharding differ from those in its trace.

    Raises:
      NotImplementedError: such an array enters a loop, a branch or a custom rule, whose own trace
        is fixed.
    """
    return _evaluate(closed.jaxpr, consts, arguments)


def _fits(array: Any, aval: Any) -> bool:
    own = jax.typeof(array)
    return varying_of(own) == varying_of(aval) and own.sharding.mesh == aval.sharding.mesh


def explicit_mesh(arrays: Any) -> Any:
    """The mesh with explicit axes that the arrays or the context have; None: there is none.

    Explicit axes are those whose sharding is part of an array's type.
    """
    own = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays)]
    for mesh in (*own, jax.sharding.get_abstract_mesh()):
        if jax.sharding.AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def has_manual_axes(mesh: Any) -> bool:
    """Whether the code runs inside a `jax.shard_map` over some axes of the mesh."""
    return jax.sharding.AxisType.Manual in mesh.axis_types


def on_automatic_axes(
    function: Callable[..., Any], mesh: Any, manual: Sequence[str] = ()
) -> Callable[..., Any]:
    """The function, traced with all axes of the mesh automatic, except for these manual ones."""
    if mesh is None:
        return function
    types = dict.fromkeys(mesh.axis_names, jax.sharding.AxisType.Auto)
    types |= dict.fromkeys(manual, jax.sharding.AxisType.Manual)
    automatic = mesh.update_axis_types(types)

    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(automatic):
            return function(*arguments)

    return on_mesh


CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr")  # fmt: skip


def step_by_step(
    closed: ClosedJaxpr, arguments: Sequence[Any], apply: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Evaluate a jaxpr, calls within it included, by a function of equation and inputs.

    Example:
      >>> closed = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)
      >>> step_by_step(closed, [2.0], lambda equation, inputs: [equation.primitive.name])
      ['add']
    """
    jaxpr = closed.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else env[variable]

    for equation in jaxpr.eqns:
        inputs = [value(variable) for variable in equation.invars]
        inner = list(core.jaxprs_in_params(equation.params))
        if equation.primitive.name in CALLS and len(inner) == 1:
            consts = next(
                (each.consts for each in equation.params.values() if isinstance(each, ClosedJaxpr)),
                (),
            )
            results: Sequence[Any] = step_by_step(ClosedJaxpr(inner[0], consts), inputs, apply)
        else:
            results = apply(equation, inputs)
        env.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def apply_equation(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """The results of one equation of a jaxpr.

    Example:
      >>> (equation,) = jax.make_jaxpr(lambda x: x + 1)(1.0).eqns
      >>> [float(result) for result in apply_equation(equation, [2.0, 1.0])]
      [3.0]
    """
    bound = equation.primitive.get_bind_params(equation.params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # JAX 0.10.0
    results = equation.primitive.bind(*functions, *inputs, **bound)
    return list(results) if equation.primitive.multiple_results else [results]


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    names = (*jaxpr.constvars, *jaxpr.invars)
    env = dict(zip(names, (*consts, *arguments), strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else env[variable]

    for equation in jaxpr.eqns:
        results = _apply(equation, [value(variable) for variable in equation.invars])
        env.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        inner = params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, inputs)
    if name in ("pvary", "pcast"):
        return [vary_over(varying_of(equation.outvars[0].aval), inputs[0])]
    if not any(True for _ in core.jaxprs_in_params(params)):
        inputs = vary_alike(inputs)
    elif any(not _fits(x, v.aval) for x, v in zip(inputs, equation.invars, strict=True)):
        raise NotImplementedError(
            f"on a mesh, an array that a score, mask or modifier closes over goes into {name}: "
            "hold it in a functools.partial or a value of jattn.masks or jattn.modifiers instead"
        )
    # The compiler chooses the sharding of results
    placed = [key for key, value in params.items() if isinstance(value, jax.sharding.Sharding)]
    bound = equation.primitive.get_bind_params(params | dict.fromkeys(placed))
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # JAX 0.10.0
    results = equation.primitive.bind(*functions, *inputs, **bound)
    return results if equation.primitive.multiple_results else [results]


def is_explicit(arrays: Any) -> bool:
    """Whether the type of one of the arrays holds its sharding.

    Example:
      >>> is_explicit(jnp.ones(3))
      False
    """
    specs = [jax.typeof(array).sharding.spec for array in jax.tree.leaves(arrays)]
    return any(axis is not None for spec in specs for axis in spec)


def primitive(
    name: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
    run_on_cpu: Callable[..., Any] | None = None,
) -> Callable[..., list[Array]]:
    """A new operation of JAX: how it runs, and its rules for derivatives and for batches.

    Args:
      name: what a jaxpr calls it.
      run: `(*arrays, **params) -> results`, written in JAX.
      shapes: `(*avals, **params)`: the aval, `jax.typeof`, of each result.
      jvp: `(primals, tangents, **params) -> (results, tangents)`; None for a tangent of zero.
      transpose: `(cotangents, *arrays, **params)`: a cotangent for each array in which the
        operation is linear. Those arrays are None, and so are cotangents of zero.
      batch: `(arrays, axes, **params) -> (results, axes)`; None for an array without the axis.
      run_on_cpu: compiled on CPU instead of `run`.

    Returns:
      `(*arrays, **params) -> results`.
    """
    made = core.Primitive(name)
    made.multiple_results = True
    made.def_impl(lambda *arrays, **params: run(*arrays, **params))
    made.def_abstract_eval(shapes)
    mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=True))
    if run_on_cpu is not None:
        on_cpu = mlir.lower_fun(run_on_cpu, multiple_results=True)
        mlir.register_lowering(made, on_cpu, platform="cpu")
    batching.primitive_batchers[made] = lambda arrays, axes, **params: batch(
        arrays, [axis for axis in axes], **params
    )

    def differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
        results, result_tangents = jvp(primals, [_or_none(t) for t in tangents], **params)
        zeros = [
            ad.Zero(jax.typeof(r).to_tangent_aval()) if t is None else t
            for r, t in zip(results, result_tangents, strict=True)
        ]
        return results, zeros

    def pull_back(cotangents: Any, *arrays: Any, **params: Any) -> list[Any]:
        linear = [ad.is_undefined_primal(array) for array in arrays]
        residuals = [None if one else array for one, array in zip(linear, arrays, strict=True)]
        avals = [array.aval for one, array in zip(linear, arrays, strict=True) if one]
        cotangents = [_or_none(c) for c in cotangents]
        found = iter(transpose(cotangents, *residuals, avals=avals, **params))
        return [next(found) if one else None for one in linear]

    ad.primitive_jvps[made] = differentiate
    ad.primitive_transposes[made] = pull_back
    return made.bind


def _or_none(tangent: Any) -> Any:
    zero = isinstance(tangent, ad.Zero) or jax.typeof(tangent).dtype == jax.dtypes.float0
    return None if zero else tangent


def ambient_precision() -> str | None:
    """The precision of matrix products that `jax.default_matmul_precision` sets now.

    Example:
      >>> ambient_precision() is None
      True
    """
    precision: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return precision


def aval_like(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """The aval of an array of this shape and dtype that varies as `like` does."""
    return like.update(shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False)


def automatically(function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
    """The function, which sees explicit axes of a mesh as automatic.

    Its loops and gathers need not give the sharding of each array. `specs`, a pytree of
    `PartitionSpec`s, gives that of its results. Without explicit axes the function runs as it is.

    Example:
      >>> take = automatically(lambda table, ids: table[ids], PartitionSpec(None))
      >>> take(jnp.arange(3) + 4, jnp.array([2]))
      Array([6], dtype=int32)
    """

    def run(*arrays: Any) -> Any:
        mesh = explicit_mesh(arrays)
        if mesh is None or has_manual_axes(mesh):
            return function(*arrays)
        leaves, structure = jax.tree.flatten(arrays)
        placed = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda spec: isinstance(spec, PartitionSpec),
        )

        def of_leaves(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves))

        return jax.sharding.auto_axes(of_leaves, out_sharding=placed)(*leaves)

    return run


def one_cpu_device() -> bool:
    """Whether JAX sees one CPU and no other device: there XLA is fast for other forms of a program.

    Example:
      >>> one_cpu_device() == (jax.default_backend() == "cpu" and jax.device_count() == 1)
      True
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1
