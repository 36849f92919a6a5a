"""The training loop: a jit-compiled step, a progress bar, checkpoints, Ctrl-C, resume."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from experiments import BadInput
from experiments.training.checkpoints import Checkpoint, fill
from experiments.training.runs import Run

Loss = Callable[[Any, Any], jax.Array]
Batches = Callable[[int], Iterator[Any]]
Watch = Callable[[int, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides the model, the loss and the data.

    `schedule` maps the step to the learning rate, for display and metrics; `transform` is the
    optimizer that uses it.
    """

    steps: int
    schedule: optax.Schedule
    transform: optax.GradientTransformation
    log_every: int = 20
    checkpoint_every: int = 200

    @classmethod
    def adam(
        cls, steps: int, learning_rate: float, *, clip: float = 1.0, **options: int
    ) -> "Recipe":
        """Adam with clipped gradients; the rate warms up, then decays as a cosine.

        The warm-up takes a tenth of the steps, at most 1000.
        """
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, min(steps // 10, 1000), steps
        )
        transform = optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))
        return cls(steps, schedule, transform, **options)


def train(
    model: nnx.Module,
    loss: Loss,
    batches: Batches,
    recipe: Recipe,
    run: Run,
    *,
    checkpoint: Checkpoint | None = None,
    metadata: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    console: Console | None = None,
) -> bool:
    """Train `model` in place, from `checkpoint` or from the beginning, to the recipe's last step.

    A run that was stopped and resumed ends in the same bits as one that was not: a checkpoint holds
    everything that the next step depends on (weights, optimizer, random streams, step), and the
    batches depend on the step alone.

    Args:
      model: any NNX module, in training mode.
      loss: `(model, batch) -> scalar`; traced once for every batch shape.
      batches: `batches(step)` yields the batches of `step`, `step + 1`, ….
      recipe: optimizer and numbers of steps.
      run: the folder of checkpoints and metrics.
      checkpoint: continue from here; later metrics are dropped, later checkpoints moved away.
      metadata: JSON that is saved with every checkpoint.
      watch: `(step, model) -> JSON` to record with the loss; the model is that after the step, and
        valid only during the call.
      console: shows the progress bar.

    Returns:
      True at the last step; False if Ctrl-C (or SIGTERM) stopped it earlier. It then finishes the
      step and saves a checkpoint; a second Ctrl-C stops at once.
    """
    console = console or Console()
    graph, state = nnx.split((model, nnx.Optimizer(model, recipe.transform, wrt=nnx.Param)))
    step = 0
    if checkpoint:
        step, state = checkpoint.step, fill(state, checkpoint.arrays)
        run.metrics.rewind(step)
        run.checkpoints.set_aside(after=step)
    else:
        run.checkpoints.save(step, state, metadata or {})
    state = jax.tree.map(jnp.copy, state)  # the step donates its buffers: keep those of `model`
    update = _jitted(graph, loss)
    pending: list[jax.Array] = []
    stream, stopped = batches(step), False
    with _stop_signal() as stop, _progress(console, recipe.steps, step) as show:
        while step < recipe.steps and not stopped:
            state, value = update(state, next(stream))
            step, stopped = step + 1, stop.is_set()
            pending.append(value)
            save = stopped or step == recipe.steps or step % recipe.checkpoint_every == 0
            if save or step % recipe.log_every == 0:
                mean, rate = _mean(pending, step), float(recipe.schedule(step - 1))
                seen = watch(step, nnx.merge(graph, state)[0]) if watch else {}
                run.metrics.write(step=step, loss=mean, learning_rate=rate, **seen)
                show(step, mean, rate, save)
                pending.clear()
            if save:
                run.checkpoints.save(step, state, metadata or {})
    nnx.update(model, nnx.state(nnx.merge(graph, state)[0]))
    return not stopped or step == recipe.steps


def _jitted(
    graph: nnx.GraphDef, loss: Loss
) -> Callable[[nnx.State, Any], tuple[nnx.State, jax.Array]]:
    """One optimization step on the state; modules exist only while JAX traces it."""

    @partial(jax.jit, donate_argnums=0)
    def update(state: nnx.State, batch: Any) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss)(model, batch)
        # Optax raises floats to integer powers, which strict promotion refuses
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    return update


def _mean(losses: list[jax.Array], step: int) -> float:
    mean = float(np.mean([float(value) for value in losses]))
    if not np.isfinite(mean):
        raise BadInput(
            f"the loss became {mean} before step {step}: lower the learning rate"
            " (earlier checkpoints are kept)"
        )
    return mean


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C or SIGTERM, so that the step ends; a second acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(
            f"{task.speed:.1f} steps/s" if task.speed else "compiling …",
            style="progress.data.speed",
        )


@contextmanager
def _progress(
    console: Console, steps: int, start: int
) -> Iterator[Callable[[int, float, float, bool], None]]:
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), _Speed(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress("training", *columns, console=console) as bar:
        task = bar.add_task("training", total=steps, completed=start, numbers="")

        def show(step: int, loss: float, rate: float, saved: bool) -> None:
            numbers = f"loss {loss:.4f}  rate {rate:.1e}"
            bar.update(task, completed=step, numbers=numbers)
            if saved and not console.is_terminal:
                console.print(f"step {step}/{steps}  {numbers}")

        yield show
