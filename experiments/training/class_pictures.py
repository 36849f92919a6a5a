"""Pictures of a classifier: the classes that it confuses, and the characters that it attends to."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from experiments.training import fonts

MOST_CLASSES = 40
LONGEST = 26  # characters of a strip


class Strip(NamedTuple):
    """A text and the weight of each of its characters; one row of the picture."""

    title: str
    text: str
    weights: np.ndarray


def confusion(counts: np.ndarray, labels: Sequence[str], path: Path, *, title: str = "") -> None:
    """Draw how often a class (row) was classified as another (column), in percent of the row.

    Args:
      counts: texts [C, C]; the picture shows at most 40 classes, those with the most texts.
      labels: names of the C classes.
      path: file of the picture.
      title: title of the picture.
    """
    shown = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_CLASSES])
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares, drawable = shares[np.ix_(shown, shown)], fonts.glyphs()
    names = [fonts.readable(labels[index], drawable) for index in shown]
    side = 2.5 + 0.27 * len(shown)
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axis = figure.add_subplot(xlabel="taken for", ylabel="is")
        image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
        for row, column in zip(*np.nonzero(shares >= 1), strict=True):
            share = shares[row, column]
            colour = "white" if share > 45 else "0.2"
            axis.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=6.5, color=colour
            )
        axis.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.set_title(title, fontsize="medium")
        figure.colorbar(image, label="% of the row", shrink=0.6, pad=0.02)
        figure.savefig(path, dpi=120)


def strips(rows: Sequence[Strip], path: Path, *, columns: int = 2) -> None:
    """Draw texts; the darker the ground of a character, the more weight it has.

    Characters stand as they are written, those of Arabic from right to left. Long texts are cut.
    Without rows there is no picture.
    """
    if not rows:
        return
    height = -(-len(rows) // columns)
    drawable = fonts.glyphs()
    blocks = [rows[start : start + height] for start in range(0, len(rows), height)]
    widths = [max(len(row.text[:LONGEST]) for row in block) for block in blocks]
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(
            figsize=(0.27 * sum(widths) + 2.2 * len(widths), 0.36 * height + 0.9),
            layout="constrained",
        )
        axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        colours = PowerNorm(0.7, vmin=0, vmax=1)
        for axis, block in zip(axes, blocks, strict=True):
            _draw_strips(axis, block, drawable, colours)
        image = matplotlib.cm.ScalarMappable(colours, "Oranges")
        figure.suptitle("Where the classifier looks")
        figure.colorbar(image, ax=list(axes), label="attention weight", shrink=0.6, pad=0.01)
        figure.savefig(path, dpi=110)


def _draw_strips(axis: Axes, rows: Sequence[Strip], drawable: set[str], colours: PowerNorm) -> None:
    width = max(len(row.text[:LONGEST]) for row in rows)
    weights = np.full((len(rows), width), np.nan)
    for y, row in enumerate(rows):
        text = row.text[:LONGEST]
        order, shown = fonts.visual_order(text), fonts.cells(text, drawable)
        weights[y, : len(text)] = row.weights[order]
        for x, cell in enumerate(shown[i] for i in order):
            colour = "white" if weights[y, x] > 0.6 else "black"
            size = 4 if cell.startswith("U+") else 10
            axis.text(
                x, y, cell, ha="center", va="center", color=colour, fontsize=size, parse_math=False
            )
    axis.imshow(weights, cmap="Oranges", norm=colours, aspect="auto")
    titles = [fonts.readable(row.title, drawable) for row in rows]
    axis.set_yticks(range(len(rows)), titles, fontsize=9, parse_math=False)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
