"""Chex's asserts under the names of arguments: shapes, ranks, dtypes and known values.

Each raises an ordinary `ValueError` or `TypeError` that names the argument, what was expected and
what was given. They run at trace time: inside jit they cost nothing.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Sizes = dict[str, Any]


def assert_shapes(swap_axes: tuple[int, int] | None = None, **arguments: tuple[Any, str]) -> Sizes:
    """Check shapes against patterns and return the size of every letter.

    In a pattern `"..."` is one shape that all arguments share.

    Args:
      swap_axes: two axes that callers are known to confuse; where swapping them would pass, the
        error says so.
      **arguments: argument name -> (array, pattern such as `"... T N H"`).

    Returns:
      The size of each letter, and under `"..."` the leading shape.

    Raises:
      ValueError: naming the argument whose rank or sizes do not fit those before it.

    Example:
      >>> query, key = np.zeros((2, 5, 3)), np.zeros((2, 7, 3))
      >>> assert_shapes(query=(query, "... T H"), key=(key, "... S H"))
      {'...': (2,), 'T': 5, 'H': 3, 'S': 7}
    """
    try:
        return _bind(
            {name: (np.shape(array), pattern) for name, (array, pattern) in arguments.items()}
        )
    except ValueError as error:
        if swap_axes and (names := _fits_when_swapped(arguments, swap_axes)):
            hint = f"it would fit with axes {swap_axes[0]} and {swap_axes[1]} of {names} swapped"
            raise ValueError(f"{error}; {hint}") from None
        raise


def _bind(arguments: Mapping[str, tuple[tuple[int, ...], str]]) -> Sizes:
    sizes: Sizes = {}
    for name, (shape, pattern) in arguments.items():
        letters = pattern.split()
        named = letters[1:] if letters[0] == "..." else letters
        leading = shape[: max(len(shape) - len(named), 0)] if letters[0] == "..." else ()
        bound = {letter: sizes[letter] for letter in letters if letter in sizes}
        expected = (*bound.get("...", leading), *(bound.get(letter) for letter in named))
        detail = ", ".join(f"{letter} = {size}" for letter, size in bound.items())
        wanted = f"[{', '.join(letters)}]{' with ' + detail if detail else ''}"
        message = f"{name} must be {wanted}, got shape {shape}"
        try:
            chex.assert_shape(
                jax.ShapeDtypeStruct(shape, bool), expected, exception_type=ValueError
            )
        except ValueError:
            # the caller's own words; Chex would put "input 0" before them
            raise ValueError(message) from None
        sizes |= {"...": leading} if letters[0] == "..." else {}
        sizes |= dict(zip(named, shape[len(leading) :], strict=True))
    return sizes


def _fits_when_swapped(arguments: Mapping[str, tuple[Any, str]], axes: tuple[int, int]) -> str:
    def swapped(names: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        bound = {}
        for name, (array, pattern) in arguments.items():
            shape = list(np.shape(array))
            if name in names and len(shape) >= -min(axes):
                shape[axes[0]], shape[axes[1]] = shape[axes[1]], shape[axes[0]]
            bound[name] = (tuple(shape), pattern)
        return bound

    for names in [list(arguments)[1:], *([name] for name in arguments), list(arguments)]:
        try:
            _bind(swapped(names))
        except ValueError:
            continue
        return " and ".join(names)
    return ""


def assert_broadcastable(name: str, array: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Raise a `ValueError` unless `array` broadcasts to exactly `shape`.

    `meaning` spells the shape in letters.

    Example:
      >>> assert_broadcastable("mask", np.ones((1, 5, 7), bool), (2, 3, 5, 7), "[..., N, T, S]")
    """
    got = np.shape(array)
    try:
        chex.assert_is_broadcastable(got, shape, exception_type=ValueError)
    except ValueError:
        hint = ""
        if len(got) == len(shape) - 1 and got[0] == shape[0]:
            hint = f"; one {name} per example needs a head axis: {name}[:, None]"
        if name == "mask" and got == (shape[0], shape[-1]):
            hint = (
                "; for one row of keys per example, masks.padding(lengths) or mask[:, None, None]"
            )
        raise ValueError(
            f"{name} must broadcast to {meaning} = {tuple(shape)}, got shape {got}{hint}"
        ) from None


def assert_floating(**arguments: Any) -> None:
    """Raise a `TypeError` that names the first argument which is not floating point.

    Every argument must be an array of real floating-point numbers.

    Example:
      >>> assert_floating(query=np.zeros(3))
    """
    _assert_type(float, "floating point", arguments)


def assert_integers(**arguments: Any) -> None:
    """Raise a `TypeError` that names the first argument which is not an array of integers.

    Example:
      >>> assert_integers(lengths=np.array([3, 5]))
    """
    _assert_type(int, "integers", arguments)


def assert_index(**arrays: Any) -> None:
    """Raise an error that names the first argument which is no integers, or beyond 32 bits.

    The lowest number, −2³¹, is left out, so that every index may be negated.

    Example:
      >>> assert_index(positions=np.array([3, 5]))
    """
    for name, array in arrays.items():
        assert_integers(**{name: array})
        why = "the range of int32, in which indices are compared"
        assert_in_range(name, array, -(2**31) + 1, 2**31 - 1, why)


def entrywise(name: str, takes: str, function: Any, *entries: Any) -> Any:
    """A user's function on scalars, evaluated on every entry, with errors that name the argument.

    Args:
      name: of the argument, `"mask"` or `"modifier"`.
      takes: what the function must take, such as `"(b, h, q_idx, k_idx)"`.
      function: on scalars.
      *entries: arrays that broadcast.

    Example:
      >>> entrywise("mask", "(q_idx, k_idx)", lambda i, j: j <= i, jnp.arange(2), jnp.arange(2))
      Array([ True,  True], dtype=bool)
    """
    try:
        signature = inspect.signature(function)
        signature.bind(*entries)
    except TypeError:
        raise TypeError(f"{name} must be a function of {takes}, got one of {signature}") from None
    except ValueError:  # one that does not tell
        pass

    def checked(*scalars: Any) -> Any:
        result = function(*scalars)
        if not isinstance(result, (bool, int, float)) and not hasattr(result, "dtype"):
            raise TypeError(f"{name} must return a number, got {type(result).__name__}")
        if np.ndim(result):
            one = f"{name} must return one number for each entry, shape ()"
            raise ValueError(f"{one}, got shape {np.shape(result)}")
        return result

    try:
        return jnp.vectorize(checked)(*entries)
    except jax.errors.TracerBoolConversionError as error:
        branch = f"{name} branches on a traced value with if, and, or, not: use jnp.where, & and |"
        raise TypeError(branch) from error


def _assert_type(expected: type, meaning: str, arguments: Mapping[str, Any]) -> None:
    for name, given in arguments.items():
        array = given if hasattr(given, "dtype") else np.asarray(given)
        try:
            chex.assert_type(array, expected, exception_type=TypeError)
        except TypeError:
            raise TypeError(f"{name} must be {meaning}, got {array.dtype}") from None


def concrete(array: Any) -> np.ndarray | None:
    """The values of `array` where looking costs nothing: Python, NumPy and CPU arrays; else None.

    Traced values are unknown, and reading from an accelerator would wait for it.

    Example:
      >>> concrete([3, 5])
      array([3, 5])
    """
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array):
        on_cpu = array.is_fully_addressable and all(
            device.platform == "cpu" for device in array.devices()
        )
        return np.asarray(array) if on_cpu else None
    return np.asarray(array)


def assert_in_range(name: str, array: Any, low: int, high: int, why: str) -> None:
    """Raise a `ValueError` if a known value of `array` lies outside `low … high`.

    Both ends are allowed; `why` names the bound.

    Example:
      >>> assert_in_range("lengths", [3, 5], 0, 7, "S")
    """
    values = concrete(array)
    if values is None or values.size == 0 or (values.min() >= low and values.max() <= high):
        return
    worst = values.min() if values.min() < low else values.max()
    raise ValueError(f"{name} must lie in {low} … {high} ({why}), got {worst}")


def assert_probability(**rates: Any) -> None:
    """Raise an error that names the first argument which is not a number from 0 to 1.

    It is a `TypeError` if the argument is not a Python number, else a `ValueError`.

    Example:
      >>> assert_probability(dropout_rate=0.1)
    """
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name} must be a Python number from 0 to 1, got {rate!r}")
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must lie in 0 … 1, got {rate}")


def assert_positive(**numbers: Any) -> None:
    """Raise a `ValueError` that names the first argument which is not an integer of at least 1.

    Example:
      >>> assert_positive(num_heads=8)
    """
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")


def assert_bool(**flags: Any) -> None:
    """Raise a `TypeError` that names the first argument which is not True or False.

    A number or a word in the place of a flag is more likely a mistake in the order of arguments.

    Example:
      >>> assert_bool(use_bias=True)
    """
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def assert_divisible(**pairs: tuple[int, str, int]) -> None:
    """Raise a `ValueError` that names the first argument that is not a multiple of its divisor.

    A divisor must be an integer of at least 1.

    Args:
      **pairs: argument name -> (its value, name of the divisor, the divisor).

    Example:
      >>> assert_divisible(qkv_features=(12, "num_heads", 3))
    """
    for name, (number, divisor_name, divisor) in pairs.items():
        assert_positive(**{divisor_name: divisor})
        if number % divisor:
            raise ValueError(f"{name} ({number}) must be a multiple of {divisor_name} ({divisor})")


def validated_tokens(
    name: str, tokens: Any, vocabulary: int, why: str = "the last id of the vocabulary"
) -> Array:
    """Token ids as int32, checked to lie in 0 … vocabulary − 1.

    Under jit their values are unknown. There an id outside the range becomes `vocabulary`, so that
    a lookup gives NaN and never the row of another token.

    Args:
      name: of the argument, for errors.
      tokens: integers of any shape.
      vocabulary: the number of ids.
      why: what the last one is, for errors.

    Raises:
      ValueError: an id lies outside the vocabulary.
      TypeError: tokens are not integers.

    Example:
      >>> validated_tokens("tokens", np.array([0, 4]), 5)
      Array([0, 4], dtype=int32)
    """
    assert_integers(**{name: tokens})
    assert_in_range(name, tokens, 0, vocabulary - 1, why)
    tokens = jnp.asarray(tokens)
    if tokens.dtype.itemsize < 4:  # the vocabulary need not fit in a narrower type
        tokens = tokens.astype(jnp.int32)
    inside = (tokens >= 0) & (tokens < vocabulary)
    return jnp.where(inside, tokens, vocabulary).astype(jnp.int32)
