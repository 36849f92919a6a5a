"""The engine of conversions: rules in one direction, run on all arrays at once."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jattn.interop.errors import ConversionError, FileError
from jattn.interop.suggestions import names_that_are_near, shapes_that_would_fit
from jattn.interop.tensors import Stored

Targets = Mapping[str, Any]  # path → a parameter, or its shape and dtype


@dataclasses.dataclass
class _Problems:
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    ambiguous: list[str] = dataclasses.field(default_factory=list)
    unfit: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Inverse:
    """A layout the other way round."""

    layout: Any

    def forward(self, array: np.ndarray) -> np.ndarray:
        """The inverse of the layout."""
        return self.layout.inverse(array)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """The layout itself."""
        return self.layout.forward(array)


@dataclasses.dataclass(frozen=True)
class Step:
    """A rule in one direction; once its placeholders are bound, the names are literal."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layout: Any

    def bound_by(self, name: str) -> Iterator["Step"]:
        """The step of a source, with its numbers in the place of the placeholders."""
        for pattern in self.sources:
            if match := re.fullmatch(expression(pattern), name):
                numbers = match.groupdict()
                yield dataclasses.replace(
                    self,
                    sources=tuple(source.format(**numbers) for source in self.sources),
                    targets=tuple(target.format(**numbers) for target in self.targets),
                )

    def back(self) -> "Step":
        """The step in the other direction."""
        return Step(self.targets, self.sources, Inverse(self.layout))

    def __str__(self) -> str:
        return f"{' + '.join(self.sources)} → {' + '.join(self.targets) or 'nothing'}"

    def run(
        self, arrays: Mapping[str, Any], targets: Targets | None, *, dry: bool
    ) -> dict[str, np.ndarray]:
        """The targets' arrays; in a dry run they have no memory of their own."""
        if not self.targets:
            return {}
        layout = self.layout
        if targets is not None and hasattr(layout, "like"):
            layout = layout.like(self._shape(targets))
        changed = layout.forward(self._joined(arrays, dry=dry))
        if len(self.targets) == 1:
            changed = changed[None]
        elif changed.ndim == 0 or len(changed) != len(self.targets):
            raise ValueError(
                f"{changed.shape} is not {len(self.targets)} parts along the first axis"
            )
        return {
            target: part if dry else np.array(part, order="C")
            for target, part in zip(self.targets, changed, strict=True)
        }

    def _joined(self, arrays: Mapping[str, Any], *, dry: bool) -> np.ndarray:
        parts = [arrays[source] for source in self.sources]
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            raise ValueError("the parts differ in shape or dtype")
        parts = [part.load() if isinstance(part, Stored) else part for part in parts]
        if len(parts) == 1:
            return parts[0]
        return np.broadcast_to(parts[0], (len(parts), *parts[0].shape)) if dry else np.stack(parts)

    def _shape(self, targets: Targets) -> tuple[int, ...]:
        shape = tuple(targets[self.targets[0]].shape)
        return shape if len(self.targets) == 1 else (len(self.targets), *shape)

    def needs(self, targets: Targets) -> tuple[int, ...] | None:
        """The shape of each source; None: it cannot be told."""
        if not self.targets or any(name not in targets for name in self.targets):
            return None
        shape = self._shape(targets)
        if math.prod(shape) > 2**28:  # a layout may copy what it is shown
            return None
        try:
            needed = self.layout.inverse(np.broadcast_to(np.zeros((), bool), shape)).shape
        except (ValueError, einops.EinopsError):
            return None
        return needed if len(self.sources) == 1 else needed[1:]


@functools.cache
def expression(pattern: str) -> str:
    """The regular expression of a name with placeholders; a repeated one is the same number."""
    expression = re.escape(pattern)
    for placeholder in placeholders(pattern):
        written = re.escape(f"{{{placeholder}}}")
        expression = expression.replace(written, f"(?P<{placeholder}>0|[1-9][0-9]*)", 1)
        expression = expression.replace(written, f"(?P={placeholder})")
    return expression


def placeholders(pattern: str) -> frozenset[str]:
    """The names in braces."""
    return frozenset(re.findall(r"{(\w+)}", pattern))


def converted(
    arrays: Mapping[str, Any],
    steps: Sequence[Step],
    targets: Targets | None,
    *,
    dry: bool = False,
) -> dict[str, np.ndarray]:
    """Run every step that the names call for; `targets` are the parameters, where known."""
    problems, misfits = _Problems(), list[Step]()
    found: dict[str, np.ndarray] = {}
    filled: set[str] = set()
    for step in _bind(arrays, steps, problems):
        absent = [source for source in step.sources if source not in arrays]
        problems.missing += [f"{source} (for {step})" for source in absent]
        unknown = [name for name in step.targets if targets is not None and name not in targets]
        if unknown:
            problems.unused += [f"{step} (the module has no {', '.join(unknown)})"]
        twice = [target for target in step.targets if target in filled]
        problems.ambiguous += [
            f"{target} is filled more than once, last by {step}" for target in twice
        ]
        if not (absent or unknown or twice):
            found |= _run(step, arrays, targets, problems, misfits, dry=dry)
        filled.update(step.targets)
    problems.missing += [name for name in targets or () if name not in filled]
    if any(vars(problems).values()):
        if targets is None:
            raise ConversionError(**vars(problems))
        suggestions = _suggestions(arrays, steps, targets, problems, misfits)
        raise ConversionError(**vars(problems), suggestions=suggestions)
    return found


def _bind(arrays: Mapping[str, Any], steps: Sequence[Step], problems: _Problems) -> Iterable[Step]:
    """The steps with their placeholders bound, each once, in the order of the names."""
    chosen: dict[Any, Step] = {}
    for name in arrays:
        matches = [bound for step in steps for bound in step.bound_by(name)]
        if not matches:
            problems.unused.append(name)
        elif len(matches) > 1:
            problems.ambiguous.append(f"{name} matches {'; '.join(map(str, matches))}")
        for match in matches:
            chosen.setdefault((match.sources, match.targets, id(match.layout)), match)
    return chosen.values()


def _run(
    step: Step,
    arrays: Mapping[str, Any],
    targets: Targets | None,
    problems: _Problems,
    misfits: list[Step],
    *,
    dry: bool,
) -> dict[str, np.ndarray]:
    got = ", ".join(str(arrays[source].shape) for source in step.sources)
    try:
        changed = step.run(arrays, targets, dry=dry)
    except FileError:
        raise
    except (ValueError, einops.EinopsError) as error:
        reason = str(error).splitlines()[-1].strip()
        problems.unfit.append(f"{step}: {got} does not fit the layout: {reason}")
        misfits.append(step)
        return {}
    for name, array in changed.items():
        if targets is None:
            break
        fault = _misfit(array.dtype, targets[name].dtype)
        if array.shape != targets[name].shape:
            fault = f"{got} gives {array.shape}; {name} is {targets[name].shape}"
            misfits.append(step)
        if fault:
            problems.unfit.append(f"{step}: {fault}")
    return changed


def _misfit(got: np.dtype, dtype: np.dtype) -> str:
    """Why a parameter of a dtype cannot hold every number of a tensor; empty: it can."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f"JAX has no {dtype} unless jax_enable_x64 is set"
    floating = all(jnp.issubdtype(each, jnp.floating) for each in (got, dtype))
    if got == dtype or (floating and np.can_cast(got, dtype)):
        return ""
    rounded = " without being rounded" if floating else ""
    return f"{got} does not fit a parameter of {dtype}{rounded}"


def _suggestions(
    arrays: Mapping[str, Any],
    steps: Sequence[Step],
    targets: Targets,
    problems: _Problems,
    misfits: Sequence[Step],
) -> list[str]:
    """What the tensors that do not fit may be."""
    unused = {name: tuple(arrays[name].shape) for name in problems.unused if name in arrays}
    wanted: dict[str, tuple[int, ...] | None] = {}
    for item in problems.missing:
        name = item.partition(" ")[0]
        fillers = [back.back() for step in steps for back in step.back().bound_by(name)]
        if name not in targets:  # one of several sources, of which another is there
            fillers = [bound for step in steps for bound in step.bound_by(name)]
        for filler in fillers:
            wanted |= dict.fromkeys(filler.sources, filler.needs(targets))
        if not fillers:
            wanted[name] = tuple(targets[name].shape)
    wanted = {name: shape for name, shape in wanted.items() if name not in arrays}
    shapes = [
        (name, tuple(arrays[name].shape), needed)
        for step in {step.sources: step for step in misfits}.values()
        if (needed := step.needs(targets)) is not None
        for name in step.sources
    ]
    near = names_that_are_near(wanted, unused) if unused else []
    return near + shapes_that_would_fit(shapes)
