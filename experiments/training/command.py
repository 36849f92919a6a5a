"""What the commands of all experiments share: options, continued runs, and how a run goes."""

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import tyro
from flax import nnx
from rich.console import Console

from experiments import BadInput
from experiments.training.accumulation import Loss
from experiments.training.checkpoints import Checkpoint
from experiments.training.loop import Batches, Recipe, Watch, train
from experiments.training.runs import Run

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Settings:
    """The options that every experiment has; each adds its own and its defaults.

    `experiment` is the name of its module. `asks` is the option that gives the trained model a text
    instead of training it. `free` are the options that may differ from the checkpoint's. `stages`
    are the folders of the models that a run trains one after the other; `""` is the run's own.
    """

    experiment: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ("",)
    asks: ClassVar[str | None] = None
    free: ClassVar[tuple[str, ...]] = ()

    run_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help_behavior_hint="(default: a new one in runs/, or the newest one to continue)",
        ),
    ] = None
    """Folder of the run."""
    resume: bool = False
    """Continue a run after a kill or Ctrl-C; with more --steps, also one that has finished."""
    steps: int = 1000
    """Optimization steps."""
    learning_rate: float = 4e-3
    """Adam's highest rate; a warm-up precedes it, a cosine decay follows."""
    seed: int = 0
    """Seed of everything that is random."""

    def __post_init__(self) -> None:
        check_at_least(self, steps=1, seed=0)
        if not 0 < self.learning_rate < math.inf:
            raise BadInput(f"--learning-rate must be finite and positive, got {self.learning_rate}")
        if self.resume and self.asked is not None:
            raise BadInput(f"give --resume or --{self.asks}, not both")

    @property
    def asked(self) -> str | None:
        """The text that the trained model is given; None: train."""
        return getattr(self, self.asks) if self.asks else None

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of the settings."""
        return {"experiment": self.experiment, "settings": self._kept()}

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self:
        """The settings that a checkpoint was made with."""
        return cls(**metadata["settings"])

    def check_continues(self, before: Self, folder: Path, *, finished: bool) -> None:
        """Refuse settings that the weights of a checkpoint in `folder` were not trained with.

        A finished run may have more steps.
        """
        if self.resume and finished and self.steps > before.steps:
            before = replace(before, steps=self.steps)
        for name in before._kept():
            given, own = getattr(self, name), getattr(before, name)
            if given != own and name not in self.free:
                hint = "; a finished run may have more steps" if name == "steps" else ""
                said = f"{option(name)} {given} differs from the checkpoint's, {own}, in {folder}"
                raise BadInput(f"{said}{hint}")

    def _kept(self) -> dict[str, Any]:
        names = {each.name for each in fields(self)} - {"run_dir", "resume", self.asks}
        return {name: getattr(self, name) for name in sorted(names)}


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Job(Generic[S]):
    """One command under way: its settings, its run, and the checkpoint that it continues from."""

    settings: S
    continued: Run | None = None
    checkpoint: Checkpoint | None = None
    whole: Run | None = None  # of a stage
    console: Console = field(default_factory=Console)
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def parse(cls, default: S, arguments: Sequence[str] | None) -> "Job[S]":
        """Read the command line; a continued run gives the settings that the line leaves out.

        Raises:
          BadInput: there is no checkpoint to continue from, it is not of this experiment, or a
            given setting is not the checkpoint's.
        """
        began, settings = time.perf_counter(), _parse(default, arguments)
        if not settings.resume and settings.asked is None:
            return cls(settings, began=began)
        run = Run.open(settings.run_dir, settings.experiment)
        stages = [Run(run.folder / name).checkpoints for name in settings.stages]
        first = stages[0] if stages[0].steps() else run.trained()[0].checkpoints
        checkpoint = first.newest(say=warn)
        if checkpoint.metadata.get("experiment") != settings.experiment:
            raise BadInput(f"{run.folder} is not a run of this experiment, {settings.experiment}")
        before = type(default).of(checkpoint.metadata)
        settings = _parse(before, arguments)
        finished = all(stage.steps()[-1:] == [before.steps] for stage in stages)
        settings.check_continues(before, run.folder, finished=finished)
        return cls(settings, run, checkpoint, began=began)

    @property
    def ends(self) -> list[int]:
        """The last step; of a run that was extended, each step that was the last one once."""
        before = self.checkpoint.metadata.get("ends", []) if self.checkpoint else []
        return [*(end for end in before if end < self.settings.steps), self.settings.steps]

    def stage(self, name: str) -> "Job[S]":
        """The job of one model of a run that trains several: it has a folder within the run's."""
        run, checkpoint = Run(self.run.folder / name), None
        if self.checkpoint and run.checkpoints.steps():
            checkpoint = run.checkpoints.newest(say=warn)
        return replace(self, continued=run, checkpoint=checkpoint, whole=self.run)

    @cached_property
    def run(self) -> Run:
        """The run that is continued, or a new one, whose folder is made at the first use."""
        return self.continued or Run.create(self.settings.run_dir, self.settings.experiment)

    def announce(self, data: str) -> None:
        """Print what there is to learn from, and the folder of the run."""
        self.console.print(f"{data}; run folder {self.run.folder}", markup=False)

    def train(
        self,
        model: nnx.Module,
        loss: Loss,
        batches: Batches,
        recipe: Recipe,
        *,
        watch: Watch | None = None,
        **metadata: Any,
    ) -> None:
        """Train the model in place; after Ctrl-C say how to continue, and exit.

        `metadata` is JSON that every checkpoint keeps besides the settings.
        """
        metadata = {**self.settings.metadata(), "ends": self.ends, **metadata}
        if self.checkpoint and self.checkpoint.step == recipe.steps:
            self.console.print(f"trained already: {recipe.steps} steps", highlight=False)
        finished = train(
            model, loss, batches, recipe, self.run, checkpoint=self.checkpoint,
            metadata=metadata, watch=watch, console=self.console,
        )  # fmt: skip
        if not finished:
            folder = (self.whole or self.run).folder
            command = [*_program(self.settings), "--resume", "--run-dir", str(folder)]
            line = f"stopped; continue with\n  {shlex.join(command)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise SystemExit(130)

    def finish(self) -> None:
        """Print how long the command took, and how much memory at most."""
        self.console.print(cost(self.began), highlight=False)


def cost(began: float) -> str:
    """How long it is since a time of `perf_counter`, and how much memory this process took."""
    seconds = time.perf_counter() - began
    took = f"{seconds:.0f} seconds" if seconds < 60 else f"{seconds / 60:.1f} minutes"
    if resource is None:
        return f"took {took}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return f"took {took} and at most {peak * unit / 1e9:.1f} GB of memory"


def check_at_least(settings: Any, **least: float) -> None:
    """Refuse options below their least values."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise BadInput(
                f"{option(name)} must be at least {value}, got {getattr(settings, name)}"
            )


def check_fraction(settings: Any, *names: str) -> None:
    """Refuse options outside 0 ≤ x < 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise BadInput(f"{option(name)} must lie in [0, 1), got {getattr(settings, name)}")


def option(name: str) -> str:
    """A field of the settings as it is written on the command line.

    Example:
      >>> option("run_dir")
      '--run-dir'
    """
    return f"--{name.replace('_', '-')}"


def warn(message: str) -> None:
    """Print a message to standard error, apart from the result."""
    print(message, file=sys.stderr)


def _program(settings: Settings) -> list[str]:
    return ["python", "-m", f"experiments.{settings.experiment}"]


def _parse(default: S, arguments: Sequence[str] | None) -> S:
    options: dict[str, Any] = {
        "prog": " ".join(_program(default)),
        "config": (tyro.conf.FlagCreatePairsOff,),
    }
    return tyro.cli(type(default), args=arguments, default=default, **options)
