"""The fields of a config.json: which kind of value each must have."""

import math
import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

MOST = 2**31 - 1


def _integer(value: Any, low: int = 1, high: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _layers(value: Any) -> bool:
    return _integer(value, high=10_000)


def _index(value: Any) -> bool:
    return _integer(value, low=0)


def _token(value: Any) -> bool:
    return _integer(value, low=-1)


def _tokens(value: Any) -> bool:
    return _token(value) or (isinstance(value, list) and all(_token(each) for each in value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _word(value: Any) -> bool:
    return isinstance(value, str)


def _words(value: Any) -> bool:
    return _word(value) or (isinstance(value, list) and all(_word(each) for each in value))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_number(each) for each in value)


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


SIZE = f"an integer from 1 to {MOST}"
LAYERS = "an integer from 1 to 10000"
INDEX = f"an integer from 0 to {MOST}"
NUMBER, NUMBERS = "a number", "a list of numbers"
FLAG = "true or false"
WORD, WORDS = "a string", "a string or a list of strings"
TOKEN, TOKENS = "a token id", "a token id or a list of them"
OBJECT = "an object"
_KINDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        SIZE: _integer, LAYERS: _layers, INDEX: _index, NUMBER: _number, NUMBERS: _numbers,
        FLAG: _flag, WORD: _word, WORDS: _words, TOKEN: _token, TOKENS: _tokens, OBJECT: _object,
    }
)  # fmt: skip
NULL = " or null"


def check(given: Any, kinds: Mapping[str, str]) -> None:
    """Raise a `ValueError` that names every field whose value is of another kind.

    Args:
      given: the contents of a file.
      kinds: field → its kind, one of the names above, with `NULL` behind it where it may be null.

    Example:
      >>> check({"head_dim": None}, {"head_dim": SIZE + NULL})
      >>> check({"hidden_size": "64"}, {"hidden_size": SIZE})
      Traceback (most recent call last):
      ValueError: hidden_size must be an integer from 1 to 2147483647, got '64'
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"it must hold an object, got {type(given).__name__}")
    wrong = []
    for name, kind in kinds.items():
        value, plain = given.get(name), kind.removesuffix(NULL)
        absent = name not in given or (value is None and plain != kind)
        if not (absent or _KINDS[plain](value)):
            wrong.append(f"{name} must be {kind}, got {reprlib.repr(value)}")
    if wrong:
        raise ValueError("; ".join(wrong))
