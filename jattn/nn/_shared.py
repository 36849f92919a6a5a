"""What several modules need: the `attend` that they call, dropout, projections, sequences, ids."""

import functools
import math
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jattn.attention import attend
from jattn.functional import checks, compat, masks
from jattn.request import MaskLike, ModifierLike, as_mask

Array = jax.Array
_OF_THE_MODULE = frozenset(
    ("query", "key", "value", "dropout_rate", "dropout_key", "return_lse", "return_weights")
)
_STATE = (nnx.Variable, nnx.Module)


class Given(TypedDict, total=False):
    """What a call of a module hands on to `jattn.attend`."""

    mask: MaskLike
    modifier: ModifierLike
    positions: tuple[Array, Array] | None


class Options(Given, total=False):
    """What a call of most modules that attend takes beside its arrays."""

    deterministic: bool | None


class Function:
    """A function as a module holds it: two are equal if they hold equal things.

    It never changes, so copies of a module share it. A module that is copied, or built anew, has an
    equal graphdef.

    Args:
      name: of the argument, for errors.
      function: a function, or a partial of one.

    Raises:
      TypeError: it is not callable.

    Example:
      >>> first, second = (Function("f", functools.partial(pow, exp=2)) for _ in range(2))
      >>> first == second, first(3)
      (True, 9)
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")
        _refuse_state(function, name)
        self.function, self._content = function, _comparable(function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the function gives."""
        return self.function(*args, **options)

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __deepcopy__(self, memo: Any) -> "Function":
        return self

    def __repr__(self) -> str:
        return f"Function({self.function!r})"


class Attend(Function):
    """`jattn.attend`, or a `functools.partial` of it, as a module holds it.

    A module hands on only what its caller gave. What the partial gives too is joined: masks by `&`,
    modifiers one after another, those of the partial first. Anything else that is given twice is an
    error.

    Args:
      function: `jattn.attend`, a partial of it, or a function with its signature.

    Raises:
      TypeError: the function is not callable; the partial gives what belongs to the module
        (`dropout_rate`, …) or holds a traced array.
      ValueError: the partial holds an `nnx.Variable`, which `nnx.state` would not find.

    Example:
      >>> causal = Attend(functools.partial(attend, mask=masks.causal()))
      >>> x = jnp.ones((5, 1, 3))
      >>> causal(x, x, x, mask=masks.no_self(), return_weights=True)[1][0, 2]
      Array([0.5, 0.5, 0. , 0. , 0. ], dtype=float32)
    """

    def __init__(self, function: Callable[..., Any] = attend):
        if not callable(function):
            got = type(function).__name__
            raise TypeError(f"attend must be callable, such as jattn.attend, got {got}")
        self.function, self.given = function, {}
        if isinstance(function, functools.partial):
            self.function, self.given = function.func, function.keywords
            belongs = sorted(_OF_THE_MODULE & self.given.keys())
            if function.args or belongs:
                got = ", ".join(belongs) or f"{len(function.args)} positional arguments"
                raise TypeError(f"attend: {got} cannot be part of it: the module gives these")
        _refuse_state(function)
        self._content = _comparable(self.function), _comparable(self.given)

    def __call__(self, query: Array, key: Array, value: Array, /, **called: Any) -> Any:
        """Call `attend`; what is None, or False, is not given."""
        called = {n: each for n, each in called.items() if each is not None and each is not False}
        twice = sorted((called.keys() & self.given.keys()) - {"mask", "modifier"})
        if twice:
            raise TypeError(f"{', '.join(twice)}: given twice, by attend= and by the module")
        options = self.given | called
        if "mask" in options:
            options["mask"] = joined_masks(self.given.get("mask"), called.get("mask"))
        if "modifier" in options:
            options["modifier"] = joined_modifiers(
                self.given.get("modifier"), called.get("modifier")
            )
        return self.function(query, key, value, **options)

    def __repr__(self) -> str:
        given = "".join(f", {name}={each!r}" for name, each in self.given.items())
        return f"Attend({getattr(self.function, '__name__', self.function)}{given})"


def held(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What a module holds of a function: a `Function`, or a module that is called, as it is.

    Example:
      >>> held("activation", abs)
      Function(<built-in function abs>)
    """
    return function if isinstance(function, nnx.Module) else Function(name, function)


def attending(attend: Callable[..., Any]) -> Callable[..., Any]:
    """What a module holds of its `attend=`: an `Attend`, or a module that attends, as it is.

    Example:
      >>> attending(attend)
      Attend(attend)
    """
    return attend if isinstance(attend, nnx.Module) else Attend(attend)


def _comparable(value: Any) -> Any:
    """A hashable value that is equal for equal things, arrays and partials among them."""
    if isinstance(value, functools.partial):
        return functools.partial, *map(_comparable, (value.func, value.args, value.keywords))
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(value)
        return array.shape, str(array.dtype), array.tobytes()
    leaves, structure = jax.tree.flatten(value)
    if jax.tree_util.all_leaves([value]):
        return value if isinstance(value, types.FunctionType) else (type(value), _or_id(value))
    return _or_id(structure), tuple(map(_comparable, leaves))


def _or_id(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:  # equal only to itself
        return id(value)
    return repr(value) if isinstance(value, float) else value  # 0.0 == −0.0


def _refuse_state(function: Any, name: str = "attend") -> None:
    for part in _parts(function, set()):
        if isinstance(part, jax.core.Tracer):
            raise TypeError(
                f"{name} holds a traced array: pass it in the call, or make it an attribute of a "
                f"module, got {part.aval}"
            )
        if isinstance(part, _STATE):
            raise ValueError(
                f"{name} holds an nnx.{type(part).__name__}, which nnx.state would not find there: "
                "make it an attribute of a module that passes its value in the call"
            )


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """All that a value holds, if it is a pytree, a partial, a method or a closure."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _STATE):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, types.FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inner += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    else:
        leaves = jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, _STATE))
        inner = [leaf for leaf in leaves if leaf is not value]
        yield value
    for part in inner:
        yield from _parts(part, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def joined_masks(*given: MaskLike) -> masks.Mask | None:
    """The masks joined by `&`; None where none is given.

    Example:
      >>> joined_masks(None, masks.causal(), masks.no_self())
      causal() & no_self()
    """
    parts = [mask for mask in map(as_mask, given) if mask is not None]
    return functools.reduce(operator.and_, parts) if parts else None


def joined_modifiers(*given: ModifierLike) -> tuple[Any, ...]:
    """All modifiers, from first to last; each may be None, one, or several.

    Example:
      >>> len(joined_modifiers(None, abs, [abs, abs]))
      3
    """
    several = (part if isinstance(part, (tuple, list)) else (part,) for part in given)
    return tuple(modifier for parts in several for modifier in parts if modifier is not None)


def dropout(rate: float, rngs: nnx.Rngs | None) -> nnx.Dropout:
    """Flax's dropout, which `train()`, `eval()` and `nnx.view` switch; it has a stream of its own.

    Raises:
      TypeError, ValueError: the rate is not a number from 0 to 1, or it needs rngs and has none.

    Example:
      >>> dropout(0.1, nnx.Rngs(0)).rate
      0.1
    """
    checks.assert_probability(dropout_rate=rate)
    if rate > 0 and rngs is None:
        raise ValueError(f"dropout_rate = {rate} needs rngs, got None")
    return nnx.Dropout(rate, rngs=rngs if rate > 0 else None)


def is_on(dropout: nnx.Dropout, deterministic: bool | None) -> bool:
    """Whether a call drops anything; `deterministic=None` follows the module.

    Example:
      >>> is_on(dropout(0.1, nnx.Rngs(0)), None)
      True
    """
    off = dropout.deterministic if deterministic is None else deterministic
    return dropout.rate > 0 and not off


def dropped_weights(dropout: nnx.Dropout, deterministic: bool | None) -> dict[str, Any]:
    """The arguments by which `attend` drops weights in one call; none where nothing is dropped.

    Example:
      >>> dropped_weights(dropout(0.1, nnx.Rngs(0)), True)
      {}
    """
    if not is_on(dropout, deterministic):
        return {}
    stream: Any = dropout.rngs
    return {"dropout_rate": dropout.rate, "dropout_key": stream()}


def promoted(dtype: Any, *arrays: Any) -> list[Array]:
    """All arrays in the dtype to compute in; None: the one to which all promote.

    Example:
      >>> promoted(jnp.bfloat16, jnp.ones(2))[0].dtype
      dtype(bfloat16)
    """
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    return [jnp.asarray(array, dtype) for array in arrays]


def by_rows(function: Callable[[Array], Array], x: Array) -> Array:
    """What a function of vectors `[..., D]` gives; on one CPU all of them make one matrix.

    There XLA takes up to five times as long for the gradient of a kernel where x has more axes, and
    three times as long for an activation between two products.

    Example:
      >>> by_rows(lambda x: x @ jnp.ones((3, 2)), jnp.ones((7, 5, 3))).shape
      (7, 5, 2)
    """
    shape = x.shape[:-1]
    if len(shape) < 2 or compat.is_explicit(x) or not compat.one_cpu_device():
        return function(x)
    made = function(x.reshape(math.prod(shape), x.shape[-1]))
    return made.reshape(*shape, made.shape[-1])


def dot_general(x: Array, kernel: Array, _: Any, *given: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of a Linear, `by_rows`.

    Example:
      >>> nnx.Linear(3, 2, dot_general=dot_general, rngs=nnx.Rngs(0))(jnp.ones((7, 5, 3))).shape
      (7, 5, 2)
    """

    def product(x: Array) -> Array:
        over = (x.ndim - 1,), (0,)
        return jax.lax.dot_general(x, kernel, (over, ((), ())), *given, **options)

    return product(x) if options.get("out_sharding") is not None else by_rows(product, x)


Linear = functools.partial(nnx.Linear, dot_general=dot_general)


def times(x: Array, matrix: Array, precision: Any = None) -> Array:
    """x `[..., C]` times a matrix `[C, D]`, as a Linear multiplies.

    Example:
      >>> times(jnp.ones((7, 5, 3)), jnp.ones((3, 2))).shape
      (7, 5, 2)
    """
    return dot_general(x, matrix, None, precision)


def apply(linear: Callable[..., Array], x: Array, out_sharding: Any = None) -> Array:
    """Apply a Linear, or a module that wraps one and takes no `out_sharding`.

    Example:
      >>> apply(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3))).shape
      (5, 2)
    """
    return linear(x) if out_sharding is None else linear(x, out_sharding=out_sharding)


def project(name: str, linear: Callable[[Array], Array], x: Array, features: int) -> Array:
    """Apply a Linear to `[..., length, features]`; an error names the argument that does not fit.

    Example:
      >>> project("query", nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3)), 3).shape
      (5, 2)
    """
    return linear(sequence(x, features, name))


def sequence(x: Array, features: int, name: str = "x") -> Array:
    """The sequence as an array, checked to be floating point and `[..., length, features]`.

    Example:
      >>> sequence(jnp.ones((5, 3)), 3).shape
      (5, 3)
    """
    checks.assert_floating(**{name: x})
    if jnp.ndim(x) < 2 or jnp.shape(x)[-1] != features:
        raise ValueError(f"{name} must be [..., length, {features}], got shape {jnp.shape(x)}")
    return jnp.asarray(x)


def normalized(norm: Callable[[Array], Array], x: Array) -> Array:
    """Apply a norm of Flax, which promotes float64 with float32 inside."""
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)


def is_real(lengths: Array, steps: int) -> Array:
    """Which steps of each sequence are real: integers `[...]` to booleans `[..., steps]`.

    Example:
      >>> is_real(jnp.array([1, 2]), 2)
      Array([[ True, False],
             [ True,  True]], dtype=bool)
    """
    lengths = jnp.asarray(lengths).astype(jnp.int32)[..., None]
    return jnp.arange(steps, dtype=jnp.int32).reshape(*(1,) * (lengths.ndim - 1), steps) < lengths


def rows(table: Array, ids: Array) -> Array:
    """`table[ids]`, `[C, D]` and `[...]` to `[..., D]`; an id of C has a row of NaN.

    Example:
      >>> rows(jnp.arange(4.0).reshape(2, 2), jnp.array([1, 2]))
      Array([[ 2.,  3.],
             [nan, nan]], dtype=float32)
    """

    def take(table: Array, ids: Array) -> Array:
        return table.at[ids].get(mode="fill", fill_value=jnp.nan)

    of_ids, of_features = jax.typeof(ids).sharding.spec, jax.typeof(table).sharding.spec[-1]
    if {*jax.tree.leaves(tuple(of_ids))} & {*jax.tree.leaves(of_features)}:
        of_features = None  # an axis of the mesh can shard only one axis of the result
    spec = PartitionSpec(*of_ids, of_features)
    return compat.automatically(take, spec)(table, ids)
