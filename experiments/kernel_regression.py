"""Fit a noisy curve by attention: kernel regression (Nadaraya 1964, https://doi.org/10.1137/1109020).

Claim: fifty noisy samples of y = 2 sin x + x^0.8 suffice to learn the width of a Gaussian kernel,
by the prediction of each sample from the others. The learned kernel is narrower than width 1, and
its fit is less smooth, but its mean squared error against the noise-free curve is lower: 0.03,
against 0.28 for width 1 and 0.86 for the mean of all samples. It is lower for each of a hundred
seeds, and less than half for 99 of them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.training import command, pictures
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.runs import Run
from jattn import attend, masks, nn, scores

GRID = np.linspace(0, 5, 101, dtype=np.float32)  # where the fits are compared with the curve


@dataclass(frozen=True)
class Settings(command.Settings):
    """Fit a noisy curve by attention, with a kernel whose width is learned."""

    experiment: ClassVar[str] = "kernel_regression"

    steps: int = 500
    """Optimization steps, each on all samples."""
    samples: int = 50
    """Noisy points of the curve to learn from."""
    noise: float = 0.5
    """Standard deviation of the noise."""
    learning_rate: float = 0.5
    """Rate of gradient descent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_at_least(self, samples=2)
        if not 0 <= self.noise < math.inf:
            raise BadInput(f"--noise must be finite and not negative, got {self.noise}")


class Samples(NamedTuple):
    """Noisy points of the curve, from left to right."""

    x: np.ndarray  # [S, 1]
    y: np.ndarray  # [S, 1]


Pool = Callable[..., tuple[jax.Array, jax.Array]]
"""`(query [T, 1], key [S, 1], value [S, 1], *, mask)` → output [T, 1] and weights [T, S]."""


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of a fit: leave-one-out on the samples, and against the true curve."""

    leave_one_out: float
    held_out: float


def curve(x: np.ndarray) -> np.ndarray:
    """The truth, 2 sin x + x^0.8."""
    return 2 * np.sin(x) + x**0.8


def draw(settings: Settings) -> Samples:
    """Points of the curve at random x in 0 … 5, with normal noise."""
    generator = np.random.default_rng(settings.seed)
    x = np.sort(generator.uniform(GRID[0], GRID[-1], settings.samples))
    y = curve(x) + generator.normal(scale=settings.noise, size=x.shape)
    return Samples(*(rearrange(array.astype(np.float32), "s -> s 1") for array in (x, y)))


def pool_with(score: Callable[..., jax.Array]) -> Pool:
    """Attention pooling by a score without parameters."""

    def pool(
        query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        query, key, value = (
            rearrange(array, "length width -> length 1 width") for array in (query, key, value)
        )
        output, weights = attend(query, key, value, score=score, mask=mask, return_weights=True)
        return output[:, 0], weights[0]

    return pool


def loss(model: nn.NadarayaWatson, batch: Any) -> jax.Array:
    """The leave-one-out error of the model; the batch is the traced `Samples`."""
    return leave_one_out(learned(model), batch)


def learned(model: nn.NadarayaWatson) -> Pool:
    """The learned kernel, as what pools."""
    return lambda *arrays, mask=None: model(*arrays, mask=mask, return_weights=True)


def leave_one_out(pool: Pool, samples: Samples) -> jax.Array:
    """Mean squared error of predicting each sample from the others."""
    output, _ = pool(samples.x, samples.x, samples.y, mask=masks.no_self())
    return jnp.mean(jnp.square(output - samples.y))


def fit(job: Job[Settings], samples: Samples) -> nn.NadarayaWatson:
    """Learn the kernel's width, from the checkpoint on if there is one.

    It starts at 1: an infinite width, w = 0, is a local minimum of the loss, and a small first
    weight falls into it.
    """
    model = nn.NadarayaWatson(rngs=nnx.Rngs(0))
    model.weight[...] = jnp.ones(())
    rate = job.settings.learning_rate
    recipe = Recipe(job.settings.steps, optax.constant_schedule(rate), optax.sgd(rate))
    job.train(model, loss, lambda _step: itertools.repeat(samples), recipe)
    return model


def compare(
    pools: dict[str, Pool], samples: Samples
) -> tuple[dict[str, Errors], list[pictures.Fit]]:
    """The errors of every fit, and its predictions and weights on the grid."""
    errors, panels = {}, []
    grid = rearrange(GRID, "t -> t 1")
    for title, pool in pools.items():
        output, weights = pool(grid, *samples)
        held_out = np.mean((np.asarray(output) - curve(grid)) ** 2)
        errors[title] = Errors(float(leave_one_out(pool, samples)), float(held_out))
        panels.append(
            pictures.Fit(
                f"{title}: mean squared error {held_out:.3f}",
                np.asarray(output)[:, 0],
                np.asarray(weights),
            )
        )
    return errors, panels


def report(model: nn.NadarayaWatson, samples: Samples, run: Run, console: Console) -> None:
    """Compare three fits with the curve; print and draw the results."""
    weight = float(model.weight[...])
    errors, panels = compare(
        {
            "mean of all": pool_with(scores.constant),
            "kernel of width 1": pool_with(scores.gaussian),
            "learned kernel": learned(model),
        },
        samples,
    )
    found = {"weight": weight, "errors": {title: asdict(error) for title, error in errors.items()}}
    run.write_scores(found)
    picture = run.folder / "fits.png"
    pictures.fits(panels, GRID, curve(GRID), (samples.x[:, 0], samples.y[:, 0]), picture)
    table = Table(
        "fit", "leave-one-out", "against the noise-free curve", title="mean squared error"
    )
    for title, error in errors.items():
        table.add_row(title, f"{error.leave_one_out:.3f}", f"{error.held_out:.3f}")
    console.print(table)
    best = min(errors, key=lambda title: errors[title].held_out)
    console.print(
        f"lowest against the curve: {best}\n"
        f"learned weight, the inverse of the width: {weight:.2f}\npicture: {picture}",
        highlight=False,
        markup=False,
    )


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    samples = draw(job.settings)
    job.announce(f"{job.settings.samples} samples to learn from")
    report(fit(job, samples), samples, job.run, job.console)
    job.finish()


if __name__ == "__main__":
    main()
