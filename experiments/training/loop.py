"""The training loop: a jit-compiled step, a progress bar, checkpoints, Ctrl-C, resume."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from experiments.training.accumulation import Loss, value_and_gradients
from experiments.training.checkpoints import Checkpoint, fill
from experiments.training.runs import Run
from jattn.nn import remat

Batches = Callable[[int], Iterator[Any]]
Watch = Callable[[int, Any], Mapping[str, Any]]
PENDING = "pending"  # losses that no line of the metrics holds yet


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides the model, the loss and the data.

    `schedule` maps the step to the learning rate, for display and metrics; `transform` is the
    optimizer that uses it. `accumulate` is the number of parts of a batch that a step takes one
    after the other; `remat` are the classes of layers that compute again what they would have kept.
    """

    steps: int
    schedule: optax.Schedule
    transform: optax.GradientTransformation
    log_every: int = 20
    checkpoint_every: int = 200
    accumulate: int = 1
    remat: tuple[type[nnx.Module], ...] = ()

    @classmethod
    def adam(
        cls,
        ends: int | Sequence[int],
        learning_rate: float,
        *,
        clip: float = 1.0,
        decay: float = 0.0,
        **options: Any,
    ) -> "Recipe":
        """Adam with clipped gradients; the rate warms up, then decays as a cosine.

        The warm-up takes a tenth of the steps, at most 1000.

        Args:
          ends: the last step; or, of a run that was extended, each step that was the last one, for
            after each the rate begins anew.
          learning_rate: the highest.
          clip: greatest norm of all gradients.
          decay: of the weights that are matrices (AdamW).
          **options: the other fields.
        """
        ends = [ends] if isinstance(ends, int) else list(ends)
        cosines = [
            optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(steps // 10, 1000), steps)
            for steps in np.diff(ends, prepend=0).tolist()
        ]
        schedule = optax.join_schedules(cosines, ends[:-1])
        adam = optax.adam(schedule)
        if decay:
            adam = optax.adamw(schedule, weight_decay=decay, mask=_matrices)
        transform = optax.chain(optax.clip_by_global_norm(clip), adam)
        return cls(ends[-1], schedule, transform, **options)


def _matrices(parameters: Any) -> Any:
    return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)


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

    A run that was stopped and resumed ends in the same bits, and has the same metrics, as one that
    was not: a checkpoint holds everything that the next step depends on (weights, optimizer, random
    streams, step), and the batches depend on the step alone.

    Args:
      model: any NNX module, in training mode.
      loss: `(model, batch) -> scalar`, or a sequence of `Sum`; traced once for every batch shape.
      batches: `batches(step)` yields the batches of `step`, `step + 1`, ….
      recipe: optimizer and numbers of steps.
      run: the folder of checkpoints and metrics.
      checkpoint: continue from here; later metrics are dropped, later checkpoints moved away.
      metadata: JSON that is saved with every checkpoint.
      watch: `(step, model) -> JSON` to record with the loss; the model is that after the step, and
        valid only during the call.
      console: shows the progress bar.

    Returns:
      True at the last step; False after Ctrl-C (or SIGTERM), which lets the step end and saves a
      checkpoint; a second Ctrl-C stops at once.
    """
    console, metadata = console or Console(), metadata or {}
    trained = remat(model, *recipe.remat) if recipe.remat else model
    graph, state = nnx.split((trained, nnx.Optimizer(trained, recipe.transform, wrt=nnx.Param)))
    step, pending = 0, []
    if checkpoint:
        step, state = checkpoint.step, fill(state, checkpoint.arrays)
        pending = [jnp.float32(value) for value in checkpoint.metadata.get(PENDING, [])]
        run.metrics.rewind(step)
        run.checkpoints.set_aside(after=step)
    else:
        run.checkpoints.save(step, state, metadata)
    state = jax.tree.map(jnp.copy, state)  # the step donates its buffers: keep those of `model`
    update = _jitted(graph, loss, recipe)
    stream, stopped = batches(step), False
    with _stop_signal() as stop, _progress(console, recipe.steps, step) as show:
        while step < recipe.steps and not stopped:
            show.step(step, pending)
            state, value = update(state, next(stream))
            step, stopped = step + 1, stop.is_set()
            pending.append(value)
            is_last = step == recipe.steps
            if is_last or step % recipe.log_every == 0:
                mean, rate = _mean(pending, step), float(recipe.schedule(step - 1))
                seen = watch(step, nnx.merge(graph, state)[0]) if watch else {}
                run.metrics.write(step=step, loss=mean, learning_rate=rate, **seen)
                show.numbers(step, f"loss {mean:.4f}  rate {rate:.1e}")
                pending = []
            if stopped or is_last or step % recipe.checkpoint_every == 0:
                losses = [float(value) for value in pending]
                if losses:
                    _mean(losses, step)  # nothing broken is saved
                run.checkpoints.save(step, state, {**metadata, PENDING: losses})
                show.saved(step)
    nnx.update(model, nnx.state(nnx.merge(graph, state)[0]))
    return not stopped


def _jitted(
    graph: nnx.GraphDef, loss: Loss, recipe: Recipe
) -> Callable[[nnx.State, Any], tuple[nnx.State, jax.Array]]:
    """One optimization step on the state; modules exist only while JAX traces it."""

    @partial(jax.jit, donate_argnums=0)
    def update(state: nnx.State, batch: Any) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = value_and_gradients(loss, model, batch, recipe.accumulate)
        # Optax raises floats to integer powers, which strict promotion refuses
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    return update


def _mean(losses: Sequence[Any], step: int) -> float:
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
        # No print: a signal may come in the middle of one
        os.write(2, "\nstopping after this step …\n".encode())

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
        words = "compiling …" if task.fields["compiling"] else ""
        return Text(f"{task.speed:.1f} steps/s" if task.speed else words)


class _Bar:
    """The progress of a run: on a terminal a bar, elsewhere a line for each checkpoint."""

    def __init__(self, console: Console, bar: Progress, steps: int, start: int):
        self.console, self.bar, self.steps, self.start, self.text = console, bar, steps, start, ""
        options: dict[str, Any] = {"numbers": "", "compiling": True}
        self.task = bar.add_task("training", total=steps, completed=start, **options)
        if start < steps and not console.is_terminal:
            console.print("compiling …")

    def step(self, step: int, losses: Sequence[jax.Array]) -> None:
        """Show that a step begins; the one before the last must have ended."""
        if len(losses) > 1:
            jax.block_until_ready(losses[-2])
        if step > self.start + 1:
            self.bar.update(self.task, completed=step, compiling=False)

    def numbers(self, step: int, text: str) -> None:
        """Show the numbers of the last steps, which have ended."""
        self.text = text
        self.bar.update(self.task, completed=step, numbers=text, compiling=False)

    def saved(self, step: int) -> None:
        """Say that there is a checkpoint."""
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {self.text}")


@contextmanager
def _progress(console: Console, steps: int, start: int) -> Iterator[_Bar]:
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), _Speed(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress("training", *columns, console=console, disable=start == steps) as bar:
        yield _Bar(console, bar, steps, start)
