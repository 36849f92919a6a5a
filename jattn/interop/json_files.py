"""JSON of strangers: what is no plain JSON gives one clear error."""

import collections
import json
import reprlib
from typing import Any

from jattn.interop.errors import FileError


def parse(raw: bytes, where: object) -> Any:
    """The contents of JSON in UTF-8, in which no object has a name twice.

    Args:
      raw: the JSON.
      where: the file, for errors.

    Raises:
      FileError: (a ValueError) it is no UTF-8 or no JSON, is nested too deeply, has a name twice,
        or holds NaN or infinity, which JSON does not know.

    Example:
      >>> parse(b'{"hidden_size": 64}', "config.json")
      {'hidden_size': 64}
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is no UTF-8: {error}") from None
    except RecursionError:
        raise FileError(f"{where} is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # also integers of thousands of digits
        raise FileError(f"{where} is no JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise FileError(f"the name {reprlib.repr(twice)} stands in one object twice")
    return found


def _constant(name: str) -> Any:
    raise FileError(f"{name} is no number of JSON")
