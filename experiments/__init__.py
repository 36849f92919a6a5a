"""Experiments: each script tests one claim, then prints and plots the result.

Run one with `python -m experiments.NAME` from the root of the clone.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

if importlib.util.find_spec("tyro") is None:
    raise ModuleNotFoundError("the experiments need more packages: pip install -e '.[experiments]'")


class BadInput(ValueError):
    """A mistake in the user's input; a script prints its message without a traceback and exits."""


def exits_on_bad_input(main: Callable[..., None]) -> Callable[..., None]:
    """Print the message of a `BadInput` without a traceback, and exit."""

    @functools.wraps(main)
    def wrapped(*arguments: Any) -> None:
        try:
            main(*arguments)
        except BadInput as error:
            raise SystemExit(f"error: {error}") from None

    return wrapped
