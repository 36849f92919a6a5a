"""Pictures of a run: the training curve, and alignments that a person can read."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.training import fonts

LONGEST = 60  # characters


class Alignment(NamedTuple):
    """A source and what was read off it, with the weights [T, S] of every written character; one panel."""

    title: str
    source: str
    output: str
    weights: np.ndarray


def curve(metrics: Sequence[dict[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw loss (logarithmic) and learning rate against the step."""
    rows = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        loss = figure.add_subplot(xlabel="step", title=title, yscale="log")
        loss.set_ylabel("training loss (nats per token)", color="C0")
        loss.plot(steps, [row["loss"] for row in rows], color="C0")
        loss.grid(alpha=0.3)
        rate = loss.twinx()
        rate.plot(steps, [row["learning_rate"] for row in rows], color="C1", alpha=0.7)
        rate.set_ylabel("learning rate", color="C1")
        figure.savefig(path, dpi=120)


def alignments(panels: Sequence[Alignment], path: Path, *, columns: int = 3) -> None:
    """Draw one heat map a panel: rows are the characters written, columns those read; darker is more weight.

    Long texts are cut, and a panel in which nothing was written is left out; without any panel there is no picture.
    """
    panels = [panel for panel in panels if panel.source and panel.output]
    if not panels:
        return
    rows = -(-len(panels) // columns)
    drawable = fonts.glyphs()
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(5.6 * columns, 3.1 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes, panels, strict=False):
            image = _heat_map(axis, panel, drawable)
        figure.suptitle("Where the decoder looks (columns: read) while it writes (rows)")
        figure.colorbar(image, ax=list(axes), label="attention weight", shrink=0.6, pad=0.01)
        figure.savefig(path, dpi=110)


def _heat_map(axis: Axes, panel: Alignment, drawable: set[str]) -> Any:
    source, output = panel.source[:LONGEST], panel.output[:LONGEST]
    image = axis.imshow(panel.weights[: len(output), : len(source)], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for axes, text in ((axis.xaxis, source), (axis.yaxis, output)):
        labels = [fonts.readable("␣" if character == " " else character, drawable) for character in text]
        axes.set_ticks(range(len(text)), labels, parse_math=False)
        axes.set_ticks(np.arange(len(text) + 1) - 0.5, minor=True)
    axis.tick_params(which="both", length=0)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    title = textwrap.shorten(panel.title, LONGEST, placeholder=" …")
    axis.set_title(fonts.readable(title, drawable), fontsize="medium", parse_math=False)
    return image
