"""Tables on the terminal, and the same as plain lines where there is none."""

import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 1000  # columns of a file or a pipe, in which no name is broken


def console() -> Console:
    """Where tables go: as wide as the terminal; a file or a pipe has room for every name.

    Example:
      >>> console().print("pass")
      pass
    """
    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def plain(*parts: Any) -> str:
    """Tables and texts as plain lines, without the end of the last one.

    Example:
      >>> plain("two", "lines")
      'two\\nlines'
    """
    out = io.StringIO()
    each = Console(file=out, width=_WIDE, highlight=False, markup=False, emoji=False)
    for part in parts:
        each.print(part)
    return out.getvalue().rstrip("\n")


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], *, names: int) -> Table:
    """A table whose first columns are names, and all others numbers.

    Args:
      titles: of the columns.
      rows: of texts and numbers; None is an empty cell.
      names: how many columns are names.

    Example:
      >>> console().print(table(["", "tensor", "|Δ|"], [[verdict(True), "weight", 1e-12]], names=2))
             tensor       |Δ|
      ───────────────────────
      pass   weight   1.0e-12
    """
    found = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for n, title in enumerate(titles):
        if n < names:
            found.add_column(title, overflow="fold")
        else:
            found.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(*map(_cell, row))
    return found


def verdict(passed: bool) -> Text:
    """`pass` or `FAIL`.

    Example:
      >>> str(verdict(True)), str(verdict(False))
      ('pass', 'FAIL')
    """
    return Text("pass", "green") if passed else Text("FAIL", "bold red")


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    return Text("" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value))
