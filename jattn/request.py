"""What `attend` is asked for, checked once, as one frozen value; and what a kernel gives back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, compat, dtypes, masks, modifiers

Array = jax.Array
Score = Callable[[Array, Array], Array]
MaskLike = masks.Mask | Array | np.ndarray | Callable[..., Array] | None
ModifierLike = modifiers.Modifier | Callable[..., Array] | Sequence[Any] | None
Precision = str | jax.lax.Precision | None


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A request for attention; `jattn.attend` documents the parts. Make one with `Request.of`.

    Attributes:
      query: `[..., T, N, H]`; the three arrays have one dtype.
      key: `[..., S, K, H']`.
      value: `[..., S, K, V]`.
      score: `(query [..., T, H], key [..., S, H']) -> [..., T, S]`.
      mask: a value of `jattn.masks`, or None.
      modifiers: values of `jattn.modifiers`, from first to last.
      positions: of queries and keys, or None for 0, 1, ….
      dropout_rate: from 0 to 1.
      dropout_key: a JAX random key, or None.
      precision: of float32 products, as `jax.default_matmul_precision` takes it.
      return_lse, return_weights: what is wanted besides the output.
    """

    query: Array
    key: Array
    value: Array
    score: Score
    mask: masks.Mask | None
    modifiers: tuple[modifiers.Modifier, ...]
    positions: tuple[Array, Array] | None
    dropout_rate: float
    dropout_key: Array | None
    precision: str | None
    return_lse: bool
    return_weights: bool

    @classmethod
    def of(
        cls,
        query: Any,
        key: Any,
        value: Any,
        *,
        score: Score,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Any, Any] | None = None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        precision: Precision = None,
        return_lse: bool = False,
        return_weights: bool = False,
    ) -> "Request":
        """Check all that shapes, dtypes and concrete values tell.

        Raises:
          ValueError, TypeError: name the argument, what was expected and what was given.
        """
        query, key, value = (jnp.asarray(array) for array in (query, key, value))
        sizes = check_operands(query=query, key=key, value=value)
        if not callable(score):
            got = type(score).__name__
            raise TypeError(f"score must be callable, (query, key) -> scores, got {got}")
        mask, parts = as_mask(mask), _as_modifiers(modifier)
        positions = _check_fit(sizes, mask, parts, positions)
        _check_dropout(dropout_rate, dropout_key)
        dtype = jnp.result_type(query, key, value)
        return cls(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            score,
            mask,
            parts,
            positions,
            float(dropout_rate),
            dropout_key,
            _as_precision(precision),
            return_lse,
            return_weights,
        )

    @property
    def is_symbolic(self) -> bool:
        """Whether a size is a symbol of `jax.export`."""
        return any(not isinstance(n, int) for n in (*self.query.shape, *self.key.shape))

    @property
    def local_T(self) -> int:
        """Queries on one device: all, or those of a shard on a mesh with explicit axes."""
        return self._local_shape[-3]

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The explicit axes of a mesh over which queries are sharded along T."""
        if self.local_T == self.query.shape[-3]:
            return ()
        axes = jax.typeof(self.query).sharding.spec[-3]
        return axes if isinstance(axes, tuple) else () if axes is None else (axes,)

    @property
    def num_scores(self) -> int:
        """Scores on one device; a symbol of `jax.export` counts as 1."""
        sizes = [*self._local_shape[:-1], self.key.shape[-3]]
        return math.prod(size if isinstance(size, int) else 1 for size in sizes)

    @property
    def _local_shape(self) -> tuple[int, ...]:
        shape = self.query.shape
        if compat.is_explicit(self.query):
            return jax.typeof(self.query).sharding.shard_shape(shape)
        return shape

    @property
    def mesh(self) -> Any:
        """The mesh of explicit axes on which the arrays lie; None: there is none."""
        return compat.explicit_mesh(self._arrays)

    @property
    def names(self) -> frozenset[str]:
        """The axes of an enclosing `jax.shard_map` over which one of the arrays differs."""
        return frozenset().union(*map(compat.varying, self._arrays))

    @property
    def _arrays(self) -> list[Array]:
        key = None if self.dropout_key is None else jax.random.key_data(self.dropout_key)
        rows = self.query, self.key, self.value
        return jax.tree.leaves((rows, self.mask, self.modifiers, self.positions, key))


class Result(NamedTuple):
    """What a kernel gives back.

    Attributes:
      output: `[..., T, N, V]`, in the dtype of the value.
      lse: log-sum-exp of the scores `[..., T, N]`, float32 at least; None if not asked for.
      weights: `[..., N, T, S]`, before dropout; None if not asked for.
    """

    output: Array
    lse: Array | None
    weights: Array | None


def check_operands(**operands: Array) -> checks.Sizes:
    """Check dtypes and shapes of query, key and value and return the size of every letter."""
    checks.assert_floating(**operands)
    patterns = {"query": "... T N H", "key": "... S K H'", "value": "... S K V"}
    given = {name: (array, patterns[name]) for name, array in operands.items()}
    try:
        sizes = checks.assert_shapes(swap_axes=(-3, -2), **given)
    except ValueError as error:
        if all(jnp.ndim(array) > 2 for array in operands.values()):
            raise
        raise ValueError(f"{error}; one head is an axis too: x[..., None, :]") from None
    N, K, T, S = (sizes[letter] for letter in "NKTS")
    if min(N, K, sizes["H"], sizes["H'"]) < 1:
        got = [x.shape for x in operands.values()]
        raise ValueError(f"heads and head width must be at least 1, got shapes {got}")
    if N % K:
        swaps = {"query": (T, K), "key and value": (N, S), "all of them": (T, S)}
        fitting = [name for name, (many, few) in swaps.items() if many and few and many % few == 0]
        hint = ""
        if fitting:
            swapped = f"axes -3 and -2 of {' or '.join(fitting)} swapped"
            hint = f"; it would fit with {swapped}: [..., length, heads, width]"
        must = f"the heads of query (N = {N}) must be a multiple of the heads of key (K = {K})"
        raise ValueError(f"{must}{hint}")
    return sizes


def _check_fit(sizes: checks.Sizes, mask: Any, parts: Any, positions: Any) -> Any:
    """Check that mask, modifiers and positions fit the scores; return the positions."""
    batch, N, T, S = sizes["..."], sizes["N"], sizes["T"], sizes["S"]

    def check(N: int, T: int, S: int) -> tuple[Array, Array] | None:
        if mask is not None:
            mask.check(batch, N, T, S)
        for part in parts:
            part.check(batch, N, T, S, positions is not None)
        return _as_positions(positions, batch, T, S)

    try:
        return check(N, T, S)
    except ValueError as error:
        try:
            check(T, N, sizes["K"])
        except ValueError:
            raise error from None
        hint = "it would fit with axes -3 and -2 of the operands swapped"
        raise ValueError(f"{error}; {hint}: the layout is [..., length, heads, width]") from None


def as_mask(mask: MaskLike) -> masks.Mask | None:
    """Whatever `attend` takes for a mask, as a value of `jattn.masks`; None stays None.

    Example:
      >>> as_mask(lambda b, h, q_idx, k_idx: q_idx >= k_idx)
      mask_mod(<lambda>)
    """
    if mask is None or isinstance(mask, masks.Mask):
        return mask
    if isinstance(mask, modifiers.Modifier):
        raise TypeError("mask is a modifier of scores: pass it as modifier=")
    if isinstance(mask, (list, tuple)) and any(isinstance(each, masks.Mask) for each in mask):
        raise TypeError("mask must be one mask, got several: combine them with & or |")
    if hasattr(mask, "dtype") or isinstance(mask, (list, tuple)):
        return masks.from_array(mask)
    if not callable(mask):
        must = "mask must be a value of jattn.masks, a callable or a boolean array"
        raise TypeError(f"{must}, got {type(mask).__name__}")
    _check_called("mask", mask, masks)
    return masks.mask_mod(mask)


def _as_modifiers(modifier: ModifierLike) -> tuple[modifiers.Modifier, ...]:
    if isinstance(modifier, (tuple, list)):
        return tuple(part for each in modifier for part in _as_modifiers(each))
    if modifier is None:
        return ()
    if isinstance(modifier, modifiers.Modifier):
        return (modifier,)
    if isinstance(modifier, masks.Mask):
        raise TypeError("modifier is a mask: pass it as mask=")
    if not callable(modifier):
        use = "jattn.modifiers.bias" if hasattr(modifier, "dtype") else "a callable"
        got = type(modifier).__name__
        raise TypeError(f"modifier must be callable or a tuple of callables, got {got}: use {use}")
    _check_called("modifier", modifier, modifiers)
    return (modifiers.ScoreMod(modifier),)


def _check_called(argument: str, function: Any, module: Any) -> None:
    """Parentheses are easily forgotten: `mask=masks.causal`."""
    name = getattr(function, "__name__", None)
    if name is not None and getattr(module, name, None) is function:
        raise TypeError(f"{argument} is the function {name} itself: call it, {name}(…)")


def _as_positions(
    positions: Any, batch: tuple[int, ...], T: int, S: int
) -> tuple[Array, Array] | None:
    if positions is None:
        return None
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise ValueError("positions must be a pair (q_positions, k_positions)")
    for name, array, length in zip(("query", "key"), positions, (T, S), strict=True):
        checks.assert_index(**{f"{name} positions": array})
        if np.shape(array) not in {(length,), (*batch, length)}:
            expected, got = f"{(length,)} or {(*batch, length)}", np.shape(array)
            raise ValueError(f"{name} positions must have shape {expected}, got {got}")
    q_positions, k_positions = dtypes.together(*positions)
    return q_positions, k_positions


def _check_dropout(rate: Any, key: Any) -> None:
    checks.assert_probability(dropout_rate=rate)
    if rate > 0 and key is None:
        raise ValueError(f"dropout_rate = {rate} needs a dropout_key, got None")
    if key is not None:
        must = "dropout_key must be a JAX random key (jax.random.key)"
        try:
            words = jax.random.key_data(key)
        except TypeError:
            raise TypeError(f"{must}, got {key!r}") from None
        if words.ndim != 1:
            raise ValueError(f"{must}, got several of shape {words.shape[:-1]}")


def _as_precision(precision: Any) -> str | None:
    """What `jax.default_matmul_precision` takes; without one, what it holds now."""
    if precision is None:
        return compat.ambient_precision()
    if isinstance(precision, (jax.lax.Precision, jax.lax.DotAlgorithmPreset)):
        is_level = isinstance(precision, jax.lax.Precision)
        return precision.name.lower() if is_level else precision.name
    try:
        with jax.default_matmul_precision(precision):
            return precision
    except (ValueError, TypeError):
        must = "precision must be one that jax.default_matmul_precision takes"
        raise ValueError(f"{must}, got {precision!r}") from None
