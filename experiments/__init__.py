"""Experiments: each script tests one claim, then prints and plots the result.

Run one with `python -m experiments.NAME` from the root of the clone. Python runs this file before
the script imports its packages, which takes seconds. So this file says at once that it loads, or
which packages are missing, and Ctrl-C ends the command at once too.
"""

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

PACKAGES = ("babel", "matplotlib", "orbax", "rich", "sacrebleu", "tokenizers", "tyro")
# The scripts, and the folders of scripts, that need fewer
FEWER: dict[str, tuple[str, ...]] = {
    "experiments.benchmarks": ("orbax", "rich", "tyro"),
    "experiments.benchmarks.embed": ("matplotlib", "orbax", "rich", "tokenizers", "tyro"),
    "experiments.data": ("babel",),
    "experiments.torch_reference": (),
}
LOADING = "loading …"
STOPPED = 130  # the exit code that shells give to a command that Ctrl-C ends


class BadInput(Exception):
    """A mistake in the user's input; a script prints its message without a traceback and exits.

    It is no ValueError: Tyro would print one with the name of the class of the options.
    """


def exits_on_bad_input(main: Callable[..., None]) -> Callable[..., None]:
    """Print the message of a `BadInput` without a traceback, and exit; the same after Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*arguments: Any) -> None:
        if _SCRIPT:
            _loaded()
        try:
            main(*arguments)
        except BadInput as error:
            raise SystemExit(f"error: {error}") from None
        except KeyboardInterrupt:
            _say("stopped\n")
            raise SystemExit(STOPPED) from None

    return wrapped


def _script() -> str | None:
    """The script here that `python -m` is about to run; None: other code imports this package."""
    if sys.argv[:1] != ["-m"]:  # Python writes the path of the script there before it runs it
        return None
    name = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    if name.startswith("-"):  # as in -mexperiments.translate
        name = name.partition("m")[2]
    return name if name.startswith("experiments.") else None


def _check_packages() -> None:
    """Name the packages that are missing."""
    needed: tuple[str, ...] = PACKAGES
    if _SCRIPT:
        needed = FEWER.get(_SCRIPT, FEWER.get(_SCRIPT.rpartition(".")[0], PACKAGES))
    missing = ", ".join(name for name in needed if importlib.util.find_spec(name) is None)
    message = f"the experiments need more packages ({missing}): pip install -e '.[experiments]'"
    if missing and _SCRIPT:
        raise SystemExit(f"error: {message}")
    # A process that a benchmark starts needs no more than the benchmark
    if missing and "--multiprocessing-fork" not in sys.orig_argv:
        raise ModuleNotFoundError(message)


def _load() -> None:
    """Say that the script loads, and end at once at Ctrl-C, until `_loaded`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    # On a terminal, whatever is printed next overwrites the line
    _say(LOADING + ("\r" if _on_terminal() else "\n"))


def _loaded() -> None:
    """Clear the line on a terminal, and let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _say(_blank())


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    try:
        _say(f"{_blank()}stopped\n")
    finally:
        os._exit(STOPPED)


def _say(text: str) -> None:
    if sys.stderr:  # print would take None for the standard output
        print(text, end="", file=sys.stderr, flush=True)


def _blank() -> str:
    return f"\r{' ' * len(LOADING)}\r" if _on_terminal() else ""


def _on_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()


_SCRIPT = _script()
_check_packages()
if _SCRIPT and not _SCRIPT.startswith("experiments.torch_reference"):  # its main is not wrapped
    _load()
