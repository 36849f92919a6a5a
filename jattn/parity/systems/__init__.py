"""The one table of the systems: slug → functions, module, paper, PyTorch reference."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from jattn.parity.fixtures import Fixture
from jattn.parity.system import System
from jattn.parity.systems import (
    attention,
    bert,
    causal_lm,
    char_rnn,
    classification,
    embedding,
    masks,
    modifiers,
    multi_head,
    pooling,
    positions,
    recurrent,
    self_attention,
    sequence_pooling,
    transformer,
    translation,
)

FAMILIES: tuple[Any, ...] = (
    pooling,
    masks,
    multi_head,
    self_attention,
    positions,
    modifiers,
    attention,
    recurrent,
    embedding,
    char_rnn,
    classification,
    sequence_pooling,
    transformer,
    translation,
    bert,
    causal_lm,
)

SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        system.slug: system
        for system in sorted(
            (system for family in FAMILIES for system in family.SYSTEMS),
            key=lambda system: system.row,
        )
    }
)
"""Slug → system, in the order of the rows."""


def markdown(fixtures: Iterable[Fixture] = ()) -> str:
    """The table for a README: slug → functions → module → paper → fixtures.

    Args:
      fixtures: what proves the systems.

    Returns:
      A Markdown table, one line for each system, in the order of the rows.

    Example:
      >>> print(markdown([Fixture("pooling/average", "mean")]).splitlines()[2])
      | `pooling/average` | average pooling | `attend`, `scores.constant` |  \
| [Nadaraya 1964](https://doi.org/10.1137/1109020) | `mean` |
    """
    cases: dict[str, list[str]] = {}
    for fixture in fixtures:
        cases.setdefault(fixture.system, []).append(fixture.case)

    def code(names: Iterable[str]) -> str:
        return ", ".join(f"`{name.removeprefix('jattn.')}`" for name in names)

    lines = [
        "| name | system | function | module | paper | proven by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for slug, system in SYSTEMS.items():
        described = f"{system.title} ({system.note})" if system.note else system.title
        paper = f"[{system.paper}]({system.link})"
        cells = (
            f"`{slug}`",
            described,
            code(system.functions),
            code(system.modules),
            paper,
            code(sorted(cases.get(slug, ()))),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
