"""Pictures of a run: the training curve, alignments, fits of a curve, and spellings."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from experiments.training import fonts

LONGEST = 60  # characters


class Alignment(NamedTuple):
    """One panel: a source, the output, and the attention weights [T, S]."""

    title: str
    source: str
    output: str
    weights: np.ndarray


class Fit(NamedTuple):
    """One column: a curve [T] predicted from S samples, and the weights [T, S] of the samples."""

    title: str
    prediction: np.ndarray
    weights: np.ndarray


def curve(
    metrics: Sequence[dict[str, Any]], path: Path, *, title: str = "", per: str = "token"
) -> None:
    """Draw the loss `per` unit (logarithmic) and the learning rate against the step.

    Where rows have a validation loss, it is drawn, too.
    """
    rows = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        loss = figure.add_subplot(xlabel="step", title=title, yscale="log")
        seen = [row for row in rows if "validation" in row]
        name = "loss" if seen else "training loss"
        loss.set_ylabel(f"{name} (nats per {per})", color="C0")
        loss.plot(steps, [row["loss"] for row in rows], color="C0", label="training")
        if seen:
            values = [row["validation"]["loss"] for row in seen]
            loss.plot([row["step"] for row in seen], values, "o-", color="C2", label="validation")
            loss.legend()
        loss.grid(alpha=0.3)
        _plain_numbers(loss)
        rate = loss.twinx()
        rate.plot(steps, [row["learning_rate"] for row in rows], color="C1", alpha=0.7)
        rate.set_ylabel("learning rate", color="C1")
        figure.savefig(path, dpi=120)


def _plain_numbers(axis: Axes) -> None:
    """Write 4 rather than 4 · 10⁰ at a logarithmic axis of about one decade."""
    low, high = axis.get_ylim()
    if high < 20 * low:
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))


def alignments(panels: Sequence[Alignment], path: Path, *, columns: int = 3) -> None:
    """Draw one heat map per panel: rows are the characters written, columns those read.

    Columns stand as the source is written, from right to left in Arabic; rows from top to bottom.
    Darker is more weight. Long texts are cut. Panels without output are left out; without panels
    there is no picture.
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
    order = fonts.visual_order(source)
    image = axis.imshow(
        panel.weights[: len(output), order], cmap="Greys", vmin=0, vmax=1, aspect="auto"
    )
    read, written = fonts.cells(source, drawable), fonts.cells(output, drawable)
    width, height = 330, 190  # of a panel, in points
    for axes, labels, room in (
        (axis.xaxis, [read[i] for i in order], width),
        (axis.yaxis, written, height),
    ):
        count = len(labels)
        axes.set_ticks(range(count), labels, parse_math=False, fontsize=min(10, room / count))
        axes.set_ticks(np.arange(count + 1) - 0.5, minor=True)
    axis.tick_params(which="both", length=0)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    title = fonts.readable(textwrap.shorten(panel.title, LONGEST, placeholder=" …"), drawable)
    # The arrow points to the output in every script.
    title = " → ".join(map(fonts.embedded, title.split(" → ")))
    axis.set_title(title, fontsize="medium", parse_math=False)
    return image


def fits(
    panels: Sequence[Fit],
    grid: np.ndarray,
    truth: np.ndarray,
    samples: tuple[np.ndarray, np.ndarray],
    path: Path,
) -> None:
    """Draw predictions on a grid [T] with truth [T] and samples [S]; below, the weights of samples.

    Both share the horizontal axis: the column of weights under a prediction produces it.
    """
    x, y = samples
    colours = PowerNorm(0.5, vmin=0, vmax=max(panel.weights.max() for panel in panels))
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(4.2 * len(panels) + 1, 7), layout="constrained")
        axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
        for above, below, panel in zip(*axes, panels, strict=True):
            above.plot(x, y, "o", color="0.6", markersize=4, label="samples")
            above.plot(grid, truth, "--", color="0.2", label="truth")
            above.plot(grid, panel.prediction, color="C0", linewidth=2, label="prediction")
            above.set_title(panel.title)
            above.grid(alpha=0.3)
            below.set_xlabel("x of the prediction")
            image = below.pcolormesh(
                grid, x, panel.weights.T, cmap="Blues", norm=colours, shading="nearest"
            )
        axes[0, 0].set_ylabel("y")
        axes[1, 0].set_ylabel("x of the sample")
        axes[0, 0].legend()
        figure.colorbar(image, ax=list(axes[1]), label="weight of the sample", pad=0.01)
        figure.savefig(path, dpi=110)


def spellings(
    panels: Mapping[str, Sequence[tuple[int, float, str]]], target: str, path: Path
) -> None:
    """Draw the losses of networks that learn a text, one panel each, and the texts that they write.

    A panel is a list of (step, loss, text). A text appears where it changes; the target is green.
    """
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(4.4 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            axis.plot([step for step, _, _ in rows], [loss for _, loss, _ in rows], color="C0")
            changes = [
                row
                for row, (_, _, before) in zip(rows, [(0, 0, ""), *rows], strict=False)
                if row[2] != before
            ]
            for i, (step, loss, text) in enumerate(changes):
                colour = "C2" if text == target else "0.35"
                height = 0.95 - min(0.9 / len(changes), 0.08) * i
                axis.plot(step, loss, "o", color=colour, markersize=4)
                axis.annotate(
                    f"{text}  (step {step})", (step, loss), (0.35, height),
                    textcoords="axes fraction", color=colour, verticalalignment="center",
                    arrowprops={"arrowstyle": "-", "color": "0.8", "relpos": (0, 0.5)},
                )  # fmt: skip
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("loss (nats per character)")
        figure.savefig(path, dpi=110)


def curves(runs: Mapping[str, Sequence[dict[str, Any]]], path: Path, *, per: str = "token") -> None:
    """Draw the losses of several models against the step; points are losses of validation."""
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axis = figure.add_subplot(xlabel="step", ylabel=f"loss (nats per {per})", yscale="log")
        for i, (name, rows) in enumerate(runs.items()):
            colour = f"C{i}"
            steps = [row["step"] for row in rows]
            axis.plot(steps, [row["loss"] for row in rows], color=colour, alpha=0.35)
            seen = [row for row in rows if "validation" in row]
            values = [row["validation"]["loss"] for row in seen]
            axis.plot([row["step"] for row in seen], values, "o-", color=colour, label=name)
        axis.grid(alpha=0.3, which="both")
        _plain_numbers(axis)
        axis.set_title("training (lines) and validation (points)", fontsize="medium")
        axis.legend()
        figure.savefig(path, dpi=120)


def attention_maps(
    weights: Sequence[np.ndarray], tokens: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Draw where each head of each layer looks: a row of panels is a layer, a column a head.

    Args:
      weights: of each layer `[N, T, T]`, the token that looks, then the one that is looked at.
      tokens: T texts.
      path: file of the picture.
      title: above all panels.
    """
    drawable, T = fonts.glyphs(), len(tokens)
    labels = [
        fonts.readable(token.replace(" ", "␣").replace("\n", "⏎"), drawable) for token in tokens
    ]
    layers, heads = len(weights), len(weights[0])
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(2.3 * heads + 1.4, 2.3 * layers + 1), layout="constrained")
        axes = figure.subplots(layers, heads, squeeze=False)
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        for (layer, head), axis in np.ndenumerate(axes):
            image = axis.imshow(weights[layer][head], cmap="Blues", norm=norm)
            axis.tick_params(length=0)
            columns, rows = (labels if layer == layers - 1 else []), (labels if head == 0 else [])
            options: dict[str, Any] = {"fontsize": min(8, 160 / T), "parse_math": False}
            axis.set_xticks(range(len(columns)), columns, rotation=90, **options)
            axis.set_yticks(range(len(rows)), rows, **options)
            if layer == 0:
                axis.set_title(f"head {head + 1}", fontsize="medium")
            if head == 0:
                axis.set_ylabel(f"layer {layer + 1}")
        looks = "where each token (row) looks (column)"
        figure.suptitle(f"{title}: {looks}" if title else looks)
        figure.colorbar(image, ax=list(axes.ravel()), label="attention weight", shrink=0.5)
        figure.savefig(path, dpi=110)
