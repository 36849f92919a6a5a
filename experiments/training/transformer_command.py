"""What the experiments on documents share: options, the documents, and checks of a checkpoint."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from tokenizers import Tokenizer

from experiments import BadInput
from experiments.data import documents
from experiments.data.documents import Parts
from experiments.training import command, text_command
from experiments.training.checkpoints import Checkpoint
from experiments.training.loop import Watch


@dataclass(frozen=True)
class TransformerSettings(text_command.TextSettings):
    """The options of a transformer that learns from documents."""

    data: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: Python's documentation)"),
    ] = None
    """Train on your own text in UTF-8, with blank lines between its paragraphs.
    Of its sections, each of 1,500 characters or more, a tenth but at least one is held out,
    as many to choose settings with as to report on."""
    length: int = 128
    """Tokens of a sequence."""
    vocabulary: int = 1000
    """Tokens that the tokenizer knows, at most."""
    layers: int = 4
    """Layers."""
    heads: int = 8
    """Query heads of each layer."""
    features: int = 128
    """Width of a layer."""
    bfloat16: bool = False
    """Multiply in bfloat16; parameters, statistics and sums stay float32."""
    accumulate: int = 1
    """Parts of a batch, taken one after the other: less memory, the same step but for dropout."""
    remat: bool = False
    """Compute layers again in the backward pass: less memory (on CPUs not always), more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_at_least(self, length=8, layers=1, heads=1, accumulate=1)
        if self.features % self.heads or (self.features // self.heads) % 2:
            raise BadInput(
                f"--features must be an even multiple of --heads {self.heads}, got {self.features}"
            )
        if self.batch_size % self.accumulate:
            raise BadInput(
                f"--accumulate {self.accumulate} must divide --batch-size {self.batch_size}"
            )

    @property
    def dtype(self) -> Any:
        """To compute in; None: that of the parameters."""
        return jnp.bfloat16 if self.bfloat16 else None

    def recipe(self, *layers: Any) -> dict[str, Any]:
        """Options of a `Recipe`, for a model of these classes of layers."""
        return {"accumulate": self.accumulate, "remat": layers if self.remat else ()}


def before_jax_starts(settings: TransformerSettings) -> None:
    """Let layers that are computed again save memory on CPUs, too."""
    if settings.remat and version("jaxlib").startswith("0.10."):
        flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # as `nn.remat` says
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}"


@dataclass(frozen=True)
class Corpus:
    """What a model learns from: documents, the tokenizer of those to train on, and ids.

    `train`, `validation` and `test` are the ids of the documents of each part, as the experiment
    has them.
    """

    parts: Parts
    tokenizer: Tokenizer
    train: list[Any]
    validation: list[Any]
    test: list[Any]

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        digest = text_command.digest(self.parts)
        return {"digest": digest, "tokenizer": self.tokenizer.to_str()}

    def describe(self) -> str:
        """The sizes of its parts."""
        sizes = [sum(len(text) for document in part for text in document) for part in self.parts]
        train, validation, test = (f"{size:,}" for size in sizes)
        return f"{train} characters to train on, {validation} to validate, {test} to test"


def load(settings: TransformerSettings) -> Parts:
    """The documents of `--data`, or the Python documentation, in three parts.

    Raises:
      BadInput: the file cannot be read, or is too short.
    """
    if settings.data is None:
        return documents.split(documents.python_documentation(), seed=settings.seed)
    found = documents.read_documents(settings.data)
    try:
        return documents.split(found, seed=settings.seed)
    except BadInput as error:
        raise BadInput(f"{settings.data}: {error}") from None


def tokenizer_of(checkpoint: Checkpoint | None, train: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that the checkpoint was trained with, or a new one."""
    return Tokenizer.from_str(checkpoint.metadata["tokenizer"]) if checkpoint else train()


def validating(every: int, last: int, evaluate: Callable[[Any], Mapping[str, float]]) -> Watch:
    """What the loop records beside the loss: `evaluate(model)`, now and then and at the end."""

    def watch(step: int, model: Any) -> dict[str, Any]:
        return {} if step % every and step != last else {"validation": evaluate(model)}

    return watch
