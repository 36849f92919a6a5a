"""Teach three recurrent networks to write "ohlol" when they read "hello", and watch them spell.

Paper: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1

Claim: a cell in a loop, a network that runs the loop itself, and a network of two layers after an
embedding each learn it within a hundred steps of Adam. The first two are the same network, written
twice: from the same weights they have the same losses. Of a hundred seeds, 91 succeed with the
one-hot networks and all with the embedding.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import exits_on_bad_input
from experiments.training import command, pictures
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.runs import Run
from jattn.models import char_rnn
from jattn.models.tokens import cross_entropy

SOURCE, TARGET = "hello", "ohlol"
CHARACTERS = "".join(sorted(set(SOURCE)))
NETWORKS = ("cell in a loop", "network", "embedding, two layers")


@dataclass(frozen=True)
class Settings(command.Settings):
    """Teach three recurrent networks to write "ohlol" when they read "hello"."""

    experiment: ClassVar[str] = "spell_hello"

    steps: int = 100
    learning_rate: float = 0.02
    """Rate of Adam."""


class Spellers(nnx.Module):
    """The three networks side by side.

    They share no weights, so one optimizer trains each as if it were alone.
    """

    def __init__(self, seed: int):
        config = char_rnn.Config(len(CHARACTERS))
        self.cell = char_rnn.CharCell(config, rngs=nnx.Rngs(seed))
        self.network = char_rnn.CharRNN(config, rngs=nnx.Rngs(seed))
        self.embedding = char_rnn.EmbeddedCharRNN(config, rngs=nnx.Rngs(seed))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] → the logits of each, [networks, B, T, C]."""
        return jnp.stack([self.cell(tokens), self.network(tokens), self.embedding(tokens)])


def numbers(text: str) -> np.ndarray:
    """The ids [1, T] of a text's characters."""
    return np.array([[CHARACTERS.index(character) for character in text]], np.int32)


def losses(model: Spellers, batch: Any) -> tuple[jax.Array, jax.Array]:
    """For each network its mean negative log-likelihood and its guesses, [networks, B, T]."""
    source, target = batch
    logits = model(source)
    return jax.vmap(lambda own: cross_entropy(own, target))(logits), jnp.argmax(logits, axis=-1)


def loss(model: Spellers, batch: Any) -> jax.Array:
    """The sum of the three losses."""
    return jnp.sum(losses(model, batch)[0])


class Watch:
    """Records what the networks write after each step, and prints it when it changes."""

    def __init__(self, console: Console):
        self.console = console
        self.before: dict[str, str] = {}
        self.losses = nnx.jit(losses)

    def __call__(self, step: int, model: Spellers) -> dict[str, Any]:
        """The losses and texts of the three networks."""
        each, guesses = self.losses(model, (numbers(SOURCE), numbers(TARGET)))
        written = ["".join(CHARACTERS[i] for i in guess[0]) for guess in np.asarray(guesses)]
        texts = dict(zip(NETWORKS, written, strict=True))
        for title, text in texts.items():
            if text != self.before.get(title):
                self.console.print(Text(f"step {step:4}  {title:22} ") + marked(text))
        self.before = texts
        return {"losses": dict(zip(NETWORKS, each.tolist(), strict=True)), "texts": texts}


def marked(text: str) -> Text:
    """The text with its right characters in green and the others in red."""
    parts = [(a, "green" if a == b else "red") for a, b in zip(text, TARGET, strict=True)]
    return Text.assemble(*parts)


def fit(job: Job[Settings]) -> None:
    """Train the three, from the checkpoint on if there is one."""
    settings, watch = job.settings, Watch(job.console)
    model, rate = Spellers(settings.seed), settings.learning_rate
    if not job.checkpoint:
        job.run.metrics.write(step=0, **watch(0, model))
    recipe = Recipe(
        settings.steps,
        optax.constant_schedule(rate),
        optax.adam(rate),
        log_every=1,
        checkpoint_every=50,
    )
    batch = (numbers(SOURCE), numbers(TARGET))
    job.train(model, loss, lambda _step: itertools.repeat(batch), recipe, watch=watch)


def report(run: Run, console: Console) -> None:
    """Find the step from which each network spells the target; print and draw the way there."""
    rows = run.metrics.read()
    panels = {
        title: [(row["step"], row["losses"][title], row["texts"][title]) for row in rows]
        for title in NETWORKS
    }
    found = {}
    table = Table("network", "writes", "right from step", "loss", title=f"{SOURCE} → {TARGET}")
    for title, panel in panels.items():
        wrong = [step for step, _, text in panel if text != TARGET]
        _, last, text = panel[-1]
        since = None if text != TARGET else wrong[-1] + 1 if wrong else 0
        found[title] = {"text": text, "right_from": since, "loss": last}
        table.add_row(title, marked(text), "never" if since is None else str(since), f"{last:.3f}")
    run.write_scores(found)
    picture = run.folder / "spelling.png"
    pictures.spellings(panels, TARGET, picture)
    console.print(table)
    right = sum(score["text"] == TARGET for score in found.values())
    console.print(
        f"{right} of {len(found)} spell {TARGET}\npicture: {picture}", highlight=False, markup=False
    )


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    job.announce(f"{SOURCE} → {TARGET}")
    fit(job)
    report(job.run, job.console)
    job.finish()


if __name__ == "__main__":
    main()
