"""Time the vectors of sentences against `transformers`, as ratios with their spread.

Claim: the vectors are those of `transformers` within 1e-5. The goal, 1.5 times as many in a second
on a CPU, in batches of 32 sentences as long as real ones are, is not reached where PyTorch
multiplies with MKL: `docs/speed.md` has the numbers.

Each round gives everyone one turn. Both cut the same sentences into tokens, compute the model and
the mean, and divide by the norm; `transformers` runs eager PyTorch with its fastest attention for
CPUs (sdpa), and pads a batch to its longest sentence. "sorted" are batches of sentences of about
the same length, as both get where all sentences are known; "as they come" are batches one by one.
"""

import pydoc_data.topics
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.benchmarks.timing import Run, check_torch, machine, measure, ratio
from experiments.embed import BATCH, Embedder, installed
from experiments.training.command import check_at_least

Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Time the vectors of sentences."""

    model: Annotated[
        Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: all-MiniLM)")
    ] = None
    """A BERT as `transformers` saves it, and its tokenizer."""
    rounds: int = 5
    """Turns of each contender."""
    sentences: int = 256
    """Sentences of Python's manual to compute."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, sentences=1)


def manual(count: int) -> list[str]:
    """So many sentences of Python's manual, evenly spaced over it.

    Raises:
      BadInput: it has fewer.
    """
    text = "\n\n".join(pydoc_data.topics.topics.values())
    words = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    found = [sentence for sentence in words if re.match(r"[A-Z].* .*[.!?]$", sentence)]
    if count > len(found):
        raise BadInput(f"--sentences must be at most {len(found)}, got {count}")
    return [found[len(found) * i // count] for i in range(count)]


class Reference:
    """The vectors by `transformers`."""

    def __init__(self, folder: Path, longest: int):
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        self.longest = longest

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """Vectors [n, D] of norm 1, computed in one batch."""
        import torch

        given = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=self.longest,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            hidden = self.model(**given).last_hidden_state
            is_real = given["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * is_real).sum(1) / is_real.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def in_turn(embed: Embed, batches: Sequence[Sequence[str]]) -> np.ndarray:
    """The vectors of batches, one after another."""
    return np.concatenate([embed(batch) for batch in batches])


def works(embedder: Embedder, texts: Sequence[str]) -> dict[str, list[list[str]]]:
    """Name → the batches of one work."""
    encoded = embedder.tokenizer.encode_batch(list(texts))
    by_length = sorted(range(len(texts)), key=lambda i: -len(encoded[i].ids))
    orders: dict[str, Sequence[int]] = {"sorted": by_length, "as they come": range(len(texts))}
    starts = range(0, len(texts), BATCH)
    return {
        name: [[texts[i] for i in order[n : n + BATCH]] for n in starts]
        for name, order in orders.items()
    }


def times_table(embedder: Embedder, theirs: Embed, settings: Settings) -> Table:
    """Sentences a second, their ratio, and how far the vectors are apart."""
    table = Table(
        "batches of 32", "jattn", "transformers", "ratio", "difference of vectors",
        title=f"{settings.sentences} sentences: how many a second",
    )  # fmt: skip
    for name, batches in works(embedder, manual(settings.sentences)).items():
        vectors = [in_turn(embed, batches) for embed in (embedder, theirs)]
        runs: dict[str, Run] = {
            "jattn": _run(embedder, batches), "transformers": _run(theirs, batches)
        }  # fmt: skip
        seconds = measure(runs, settings.rounds)
        rates = [f"{settings.sentences / statistics.median(x):.0f}" for x in seconds.values()]
        apart = np.abs(vectors[0] - vectors[1]).max()
        ours, others = seconds["jattn"], seconds["transformers"]
        table.add_row(name, *rates, ratio(others, ours), f"{apart:.1e}")
    return table


def _run(embed: Embed, batches: Sequence[Sequence[str]]) -> Any:
    return lambda: in_turn(embed, batches)


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time everyone and print the table."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.embed",
        description=__doc__,
    )
    check_torch()
    folder = settings.model or installed()
    embedder = Embedder(folder)
    console = Console(width=140)
    console.print(times_table(embedder, Reference(folder, embedder.longest), settings))
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
