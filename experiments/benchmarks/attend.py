"""Time blockwise attention against PyTorch, FlexAttention, jax.nn, tokamax and dense, as ratios.

Claim: on long sequences plain JAX takes a fraction of the time and memory of jax.nn; under a window
its time and memory are proportional to the window; it comes close to PyTorch's hand-written kernel.
docs/speed.md has the numbers and names the machine.

Each round gives every contender one turn, so a machine that slows down slows all of them, and a
ratio compares times of one round. Peak memory is that of a contender's first run, beyond its
inputs. PyTorch gets contiguous arrays in its own layout and one thread per CPU. FlexAttention needs
a C++ compiler, for torch.compile. A contender that is not installed or cannot do the work is left
out, and the output says why. For a quick look: `--groups additive --rounds 1 --longest 1024`.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.benchmarks import cases, contenders
from experiments.benchmarks.cases import Case, Group
from experiments.benchmarks.contenders import LeftOut
from experiments.benchmarks.contenders_torch import run_flex, run_torch
from experiments.benchmarks.timing import (
    PAUSE,
    Run,
    machine,
    measure,
    peak_memory,
    ratio,
    ratios,
    roofline,
)
from experiments.training.command import check_at_least

Name = Literal["full", "short", "masks", "additive", "dtype", "compile", "memory"]


@dataclass(frozen=True)
class Settings:
    """Time attention kernels against others on this machine."""

    groups: tuple[Name, ...] = ("full", "short", "masks", "additive", "dtype", "compile")
    """Tables to make; "memory", a run over 65,536 positions in its own process, takes minutes."""
    rounds: int = 7
    """Turns of every contender."""
    longest: int = 65536
    """Leave out longer sequences."""
    without: tuple[str, ...] = ()
    """Contenders to leave out, such as FlexAttention, which compiles for 15 seconds per row."""
    pause: float = PAUSE
    """Seconds of rest before each turn."""
    markdown: bool = False
    """Print the tables as Markdown."""
    json: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
    ] = None
    """Write all measurements to this file, too."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, longest=1, pause=0)
        for name in self.groups:
            shortest = min(case.T for case in cases.GROUPS[name].cases)
            if self.longest < shortest:
                raise BadInput(
                    f"--longest must be at least {shortest}, the shortest sequence of the group"
                    f" {name}, got {self.longest}"
                )
        known = sorted({name for group in cases.GROUPS.values() for name in group.columns})
        if unknown := sorted(set(self.without) - set(known)):
            raise BadInput(f"--without must be among {', '.join(known)}, got {', '.join(unknown)}")
        if self.json is not None and not self.json.parent.is_dir():
            raise BadInput(f"--json needs a folder that exists, got {self.json}")


@dataclass
class Row:
    """The measurements of one case by contender, and why others are left out."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Printed:
    """A table to print: its title, its header and its rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown, with numbers to the right."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])

    def rich(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title)
        for name in self.header:
            table.add_column(name, justify="left" if name == "work" else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def build(name: str, case: Case) -> Run:
    """A function that runs the case.

    Raises:
      LeftOut: the contender cannot.
    """
    if name == "PyTorch":
        return run_torch(case)
    return run_flex(case) if name == "FlexAttention" else contenders.run_in_jax(name, case)


def time_case(case: Case, names: Iterable[str], settings: Settings) -> Row:
    """The measurements of a case: every contender gets its turns."""
    row, runs = Row(case), {}
    for name in names:
        try:
            runs[name] = build(name, case)
        except LeftOut as reason:
            row.left_out[name] = str(reason)
    if case.what != "compile":
        row.memory = {name: peak_memory(run) for name, run in runs.items()}
    row.seconds = measure(runs, settings.rounds, settings.pause)
    return row


def time_alone(case: Case) -> Row:
    """The time and the peak memory of the first run of blockwise."""
    run, seconds = build("blockwise", case), []

    def timed() -> None:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)

    return Row(case, {"blockwise": seconds}, {"blockwise": peak_memory(timed)})


def times(group: Group, rows: Sequence[Row], columns: Sequence[str], peak: float) -> Printed:
    """The table of ratios, and below it the geometric mean of their medians."""
    header = ["work", "ms", "GFLOP/s", "of roofline", *columns]
    body = []
    for row in rows:
        ours, operations = row.seconds[group.ours], row.case.operations
        rate = operations / statistics.median(ours) if operations else None
        rates = [f"{rate / 1e9:.0f}", f"{rate / peak:.0%}"] if rate else ["", ""]
        shown = [ratio(row.seconds[name], ours) if name in row.seconds else "" for name in columns]
        body.append([str(row.case), f"{1e3 * statistics.median(ours):.1f}", *rates, *shown])
    return Printed(
        f"{group.title}: time of each over the time of {group.ours}",
        header,
        [*body, _means(group, rows, columns)],
    )


def _means(group: Group, rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    cells = []
    for name in columns:
        medians = [
            statistics.median(ratios(row.seconds[name], row.seconds[group.ours]))
            for row in rows
            if name in row.seconds
        ]
        cells.append(
            f"{statistics.geometric_mean(medians):.2f} of {len(medians)}" if medians else ""
        )
    return ["geometric mean", "", "", "", *cells]


def memories(group: Group, rows: Sequence[Row], columns: Sequence[str]) -> Printed:
    """The table of peak memory, in megabytes."""
    names = [group.ours, *columns]

    def cell(size: int | None) -> str:
        return "" if size is None else f"{size / 1e6:.0f}"

    body = [[str(row.case), *(cell(row.memory.get(name)) for name in names)] for row in rows]
    return Printed(f"{group.title}: peak memory beyond the inputs, MB", ["work", *names], body)


def linear(rows: Sequence[Row], peak: float) -> Printed:
    """The table of the group `memory`, in which blockwise runs alone."""
    body = []
    for row in rows:
        grown = row.memory["blockwise"]
        seconds, operations = statistics.median(row.seconds["blockwise"]), row.case.operations or 0
        share = "" if grown is None else f"{(row.case.bytes + grown) / (2 * row.case.bytes):.2f}"
        rate = operations / seconds
        body.append(
            [str(row.case), f"{seconds:.1f}", f"{rate / 1e9:.0f}", f"{rate / peak:.0%}", share]
        )
    header = [
        "work",
        "seconds",
        "GFLOP/s",
        "of roofline",
        "peak over inputs, outputs and gradients",
    ]
    return Printed("memory of blockwise, in a process of its own", header, body)


def time_group(
    name: str, settings: Settings, peak: float, console: Console
) -> tuple[list[Row], list[Printed]]:
    """The measurements of all cases of a group, and the tables that show them."""
    group = cases.GROUPS[name]
    chosen = [case for case in group.cases if case.T <= settings.longest]
    columns = [column for column in group.columns if column not in settings.without]
    progress = track(chosen, description=group.title, console=console, transient=True)
    if name == "memory":
        # a new process: memory that earlier runs freed would hide the peak
        rows = []
        for case in progress:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                rows.append(alone.submit(time_alone, case).result())
        return rows, [linear(rows, peak)]
    rows = [time_case(case, [group.ours, *columns], settings) for case in progress]
    columns = [column for column in columns if any(column in row.seconds for row in rows)]
    tables = [times(group, rows, columns, peak)]
    if any(row.memory for row in rows):
        tables.append(memories(group, rows, columns))
    return rows, tables


def reasons(rows: Sequence[Row]) -> list[str]:
    """One line for each contender that was left out and each reason."""
    found: dict[tuple[str, str], list[Case]] = {}
    for row in rows:
        for name, reason in row.left_out.items():
            found.setdefault((name, reason), []).append(row.case)
    return [
        f"{name} is left out of {len(among)} of {len(rows)} rows: {why}"
        for (name, why), among in found.items()
    ]


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options: dict[str, Any] = {
        "description": __doc__,
        "prog": "python -m experiments.benchmarks.attend",
    }
    settings = tyro.cli(Settings, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), **options)
    console, progress = Console(width=160), Console(stderr=True)
    peak = roofline(settings.pause)
    heading = (
        f"{machine()}; float32 matrix product {peak / 1e9:.0f} GFLOP/s; {settings.rounds} rounds"
    )
    measured: dict[str, Any] = {"machine": heading, "roofline": peak, "groups": {}}
    print(heading)
    for name in settings.groups:
        rows, tables = time_group(name, settings, peak, progress)
        for table in tables:
            if settings.markdown:
                print(table.markdown())
            else:
                console.print(table.rich())
        print(*reasons(rows), sep="\n")
        measured["groups"][name] = [asdict(row) | {"work": str(row.case)} for row in rows]
        # After each group, so that a run that is stopped keeps its measurements
        if settings.json is not None:
            settings.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
