"""Hold a port against a fixture: outputs and all gradients, tensor by tensor."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.interop import from_flax, to_flax
from jattn.parity.fixtures import Fixture, FixtureError
from jattn.parity.system import System
from jattn.parity.systems import SYSTEMS

Tensors = dict[str, np.ndarray]
DTYPES = tuple(jnp.dtype(name) for name in ("float64", "float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a comparison.

    Args:
      name: `output/NAME`, `grad/param/NAME` or `grad/input/NAME`, in PyTorch's names.
      max_error: largest |Δ|; infinite where the tensor is missing, unfit, not finite, or
        integers that differ.
      relative_error: the same over the largest magnitude of PyTorch's tensor.
      ulps: the same in units in the last place of that magnitude, in the type of the comparison.
      torch_ratio: root mean square error over PyTorch's own, in float32 for a port in float64.
      share: error over the error that the rule of `run` allows.
      reason: why the tensors cannot be compared; empty: they can.

    Example:
      >>> Row("output/output", 1e-12, 1e-12, 4.5e3, 1e-5, 1e-3).passed
      True
    """

    name: str
    max_error: float
    relative_error: float
    ulps: float
    torch_ratio: float
    share: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tensor is equal to PyTorch's."""
        return self.share <= 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All tensors of one fixture.

    Args:
      fixture: its title.
      system: title of its system.
      dtype: type that the port computed in.
      rows: tensor by tensor.

    Example:
      >>> Comparison("pooling/average", "average pooling", "float64", ()).passed
      False
    """

    fixture: str
    system: str
    dtype: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether there are tensors and all of them are equal."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def worst(self, quantity: str, prefix: str = "") -> float:
        """Largest `max_error`, `share` … of the tensors whose name begins with the prefix."""
        return max(
            (getattr(row, quantity) for row in self.rows if row.name.startswith(prefix)),
            default=0.0,
        )


def run(fixture: Fixture, dtype: Any = np.float64, *, system: System | None = None) -> Comparison:
    """Build the port of a fixture, load PyTorch's weights, and compare outputs and gradients.

        float64:  |Δ| ≤ 1e-9 · (max|tensor| + 1e-3 · g),   g the largest gradient of the fixture
        narrower: rms(Δ) ≤ max(2 · PyTorch's own rms error in that type, 4 ulp of max|tensor|,
                               for gradients 4 ulp of g)

    Gradients are of Σ ⟨cotangent, output⟩; those of parameters go back to PyTorch's names by the
    same rules as the weights. Integer and boolean outputs must be the same.

    Args:
      fixture: what PyTorch did.
      dtype: float64, float32 or bfloat16, for parameters, inputs and computation.
      system: the port; by default that of the fixture's slug.

    Returns:
      A row for each output and gradient.

    Raises:
      ValueError: an unknown system or type; arguments, inputs or weights that do not fit the
        module.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in DTYPES:
        expected = ", ".join(each.name for each in DTYPES)
        raise ValueError(f"dtype: expected one of {expected}, got {dtype}")
    if system is None and fixture.system.startswith("yours/"):
        how = "`jattn parity diff` holds a port of it against it"
        raise FixtureError(f"{fixture.title} is no system of jattn's: {how}")
    if system is None and fixture.system not in SYSTEMS:
        raise FixtureError(
            f"{fixture.title}: expected a system of {', '.join(SYSTEMS)}, got {fixture.system!r}"
        )
    system = system or SYSTEMS[fixture.system]
    with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest"):
        try:
            found = _outputs_and_gradients(fixture, dtype, system)
        except (KeyError, TypeError) as error:
            message = (
                f"{fixture.title}: {system.title} cannot be built or called"
                " with what the fixture gives"
            )
            raise FixtureError(f"{message}: {error!r}") from error
    return Comparison(
        fixture.title, system.title, dtype.name, compare_tensors(fixture, found, dtype)
    )


def is_recorded(fixture: Fixture, dtype: Any) -> bool:
    """Whether PyTorch's own error in a dtype is known; it is not where it cannot compute in it.

    Nor where rounded inputs give other integers, as in the choice of words to hide.
    """
    return jnp.dtype(dtype) != jnp.bfloat16 or bool(fixture.bfloat16_errors)


def compare_tensors(fixture: Fixture, found: Tensors, dtype: np.dtype) -> tuple[Row, ...]:
    """A row for each output and gradient of a fixture, by the rule of `run`.

    Args:
      fixture: what PyTorch did.
      found: what the port gives, under the names of the fixture's tensors.
      dtype: that the port computed in.
    """
    expected = _expected(fixture)
    largest = max(
        (_largest(array) for name, array in expected.items() if name.startswith("grad/")),
        default=0.0,
    )
    extra = found.keys() - expected.keys()
    errors = fixture.bfloat16_errors if dtype == jnp.bfloat16 else fixture.float32_errors
    rows = [
        _compare(
            name,
            found.get(name),
            expected[name],
            largest,
            dtype,
            errors.get(name, 0.0),
        )
        for name in expected
    ]
    return (*rows, *(_wrong(name, "PyTorch has none") for name in sorted(extra)))


def _outputs_and_gradients(fixture: Fixture, dtype: np.dtype, system: System) -> Tensors:
    # The weights come from the fixture
    module = nnx.eval_shape(lambda: system.build(fixture.arguments, dtype))
    module.eval()
    structure, shapes, *rest = nnx.split(module, nnx.Param, ...)
    weights = {name: array.astype(dtype) for name, array in fixture.parameters.items()}
    rules = system.rules_for(module)
    parameters = to_flax(weights, shapes, rules)
    inputs: dict[str, Any] = _cast(fixture.inputs, dtype)
    cotangents = _cast(fixture.cotangents, dtype)

    def outputs(parameters: nnx.State, floating: Any) -> tuple[Any, Any]:
        bound = nnx.merge(structure, parameters, *rest)
        found = system.call(bound, inputs | floating, fixture.arguments)
        fitting = {
            name: array for name, array in found.items() if _fits(array, cotangents.get(name))
        }
        return fitting, found

    @jax.jit
    def outputs_and_gradients(parameters: nnx.State, floating: Any) -> tuple[Any, Any, Any]:
        result: Any = jax.vjp(outputs, parameters, floating, has_aux=True)
        differentiable, pull_back, found = result
        gradients, input_gradients = pull_back(
            {name: cotangents[name].astype(each.dtype) for name, each in differentiable.items()}
        )
        return found, gradients, input_gradients

    floating = {name: array for name, array in inputs.items() if array.dtype == dtype}
    found, gradients, input_gradients = outputs_and_gradients(parameters, floating)
    tensors = {f"output/{name}": array for name, array in found.items()}
    if cotangents:
        tensors |= {
            f"grad/param/{name}": array for name, array in from_flax(gradients, rules).items()
        }
        tensors |= {f"grad/input/{name}": array for name, array in input_gradients.items()}
    return {name: np.asarray(array) for name, array in tensors.items()}


def _fits(array: Any, cotangent: np.ndarray | None) -> bool:
    # Weights, which are statistics, are float32 even in half precision
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return cotangent is not None and is_float and array.shape == cotangent.shape


def _cast(arrays: Tensors, dtype: np.dtype) -> Tensors:
    """Floating arrays in the type of the comparison, all others as they are."""
    return {
        name: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for name, array in arrays.items()
    }


def _expected(fixture: Fixture) -> Tensors:
    kinds = ("output/", "grad/param/", "grad/input/")
    return {name: array for name, array in fixture.tensors.items() if name.startswith(kinds)}


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _compare(
    name: str,
    found: np.ndarray | None,
    expected: np.ndarray,
    largest_gradient: float,
    dtype: np.dtype,
    torch_error: float,
) -> Row:
    if found is None:
        return _wrong(name, "missing")
    if found.shape != expected.shape:
        return _wrong(name, f"{found.shape} for {expected.shape}")
    is_float = jnp.issubdtype(found.dtype, jnp.floating)
    if is_float != (expected.dtype.kind == "f"):
        return _wrong(name, f"{found.dtype} for {expected.dtype}")
    if not is_float:
        same = np.array_equal(found, expected)
        return Row(name, 0.0, 0.0, 0.0, 0.0, 0.0) if same else _wrong(name, "not the same integers")
    difference = np.abs(found.astype(np.float64) - expected)
    if not np.isfinite(difference).all():
        return _wrong(name, "not finite")
    error, magnitude = _largest(difference), _largest(expected)
    rms = float(np.sqrt(np.mean(np.square(difference)))) if difference.size else 0.0
    if dtype == np.float64:
        share = _ratio(error, 1e-9 * (magnitude + 1e-3 * largest_gradient))
    else:  # a gradient that cancels to zero is rounded at the size of what cancels
        scale = max(magnitude, largest_gradient) if name.startswith("grad/") else magnitude
        share = _ratio(rms, max(2 * torch_error, 4 * float(jnp.finfo(dtype).eps) * scale))
    ulp = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(magnitude)) if magnitude else 0.0
    return Row(
        name, error, _ratio(error, magnitude), _ratio(error, ulp), _ratio(rms, torch_error), share
    )


def _wrong(name: str, reason: str) -> Row:
    return Row(name, np.inf, np.inf, np.inf, np.inf, np.inf, reason)


def _ratio(error: float, unit: float) -> float:
    """Error over a unit; exact agreement is 0 of any unit."""
    return 0.0 if error == 0 else error / unit if unit > 0 else np.inf
