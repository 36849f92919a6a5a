"""The one table of the systems: row → function, module, paper, PyTorch reference, weight rules."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from jattn.parity import (
    classification,
    multi_head,
    pooling,
    positions,
    recurrent,
    sequence_to_sequence,
)
from jattn.parity.system import System

_FAMILIES = (pooling, multi_head, positions, recurrent, classification, sequence_to_sequence)

SYSTEMS: Mapping[int, System] = MappingProxyType(
    dict(sorted((system.row, system) for family in _FAMILIES for system in family.SYSTEMS))
)
"""Row number → system, in the order of the rows."""


def markdown(titles: Iterable[str] = ()) -> str:
    """The table for a README: row → functions → module → paper → fixtures.

    Args:
      titles: titles of the fixtures, as `Fixture.title` gives them (`"5/additive"`).

    Returns:
      A Markdown table, one line for each system, in the order of the rows.

    Example:
      >>> print(markdown(["4/masked_softmax"]).splitlines()[5])
      | 4 | masked softmax (a row with nothing to see is zeros; code that fills with −1e6 makes it \
uniform) | `masked_softmax` |  | [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762) \
| `masked_softmax` |
    """
    cases: dict[int, list[str]] = {}
    for title in titles:
        number, case = title.split("/", 1)
        cases.setdefault(int(number), []).append(case)

    def code(names: Iterable[str]) -> str:
        return ", ".join(f"`{name.removeprefix('jattn.')}`" for name in names)

    lines = [
        "| row | system | function | module | paper | proven by |",
        "| ---: | --- | --- | --- | --- | --- |",
    ]
    for row, system in SYSTEMS.items():
        described = f"{system.title} ({system.note})" if system.note else system.title
        paper = f"[{system.paper}]({system.link})"
        cells = (
            str(row),
            described,
            code(system.functions),
            code(system.modules),
            paper,
            code(cases.get(row, ())),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
