"""Time BERT's pre-training against `transformers`, as ratios with their spread.

Claim: a training step takes at most 1.2 times as long as that of `transformers`, and less time
where logits are computed of the hidden words alone.

Each round gives everyone one turn. Both have the same weights, no dropout and full sequences, and
take the words' loss and that of the texts' order; `transformers` runs eager PyTorch with its
fastest attention for CPUs (sdpa). A step is forward, backward and AdamW.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.benchmarks.causal_lm import repeated
from experiments.benchmarks.timing import Run, check_torch, machine, measure, ratio
from experiments.training.command import check_at_least
from jattn.interop import to_torch
from jattn.interop.huggingface.bert_config import write_config
from jattn.models import BertForPreTraining, bert, pretraining

H, RATE = 64, 1e-4
SPECIAL = pretraining.Special(pad=0, cls=1, sep=2, mask=3)


@dataclass(frozen=True)
class Settings:
    """Time a step of pre-training."""

    rounds: int = 5
    """Turns of each contender."""
    layers: int = 6
    """Layers of the model."""
    features: int = 384
    """Width of the model: a multiple of 64, the width of a head."""
    vocabulary: int = 30522
    """Number of token ids."""
    batch: int = 32
    """Examples of a training step."""
    length: int = 128
    """Tokens of each."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, layers=1, features=H, vocabulary=5, batch=1, length=5)
        if self.features % H:
            raise BadInput(f"--features must be a multiple of {H}, got {self.features}")

    def config(self) -> bert.Config:
        """The sizes of the model."""
        D = self.features
        return bert.Config(
            self.vocabulary, D, self.layers, D // H, 4 * D, self.length, dropout_rate=0.0,
            attention_dropout_rate=0.0,
        )  # fmt: skip


class Given(NamedTuple):
    """A batch: tokens, types and labels `[B, T]`, and whether the second text follows `[B]`."""

    tokens: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    follows: np.ndarray


def batch_of(settings: Settings) -> Given:
    """Pairs of random texts, some words hidden."""
    random, (B, T) = np.random.default_rng(0), (settings.batch, settings.length)
    texts = random.integers(4, settings.vocabulary, (B, 2, T))
    packed = pretraining.pack_pairs([(a, b) for a, b in texts], T, SPECIAL)
    tokens, labels = pretraining.mask_words(
        jax.random.key(0), jnp.asarray(packed.tokens), SPECIAL, vocabulary=settings.vocabulary
    )
    follows = random.integers(2, size=B, dtype=np.int32)
    return Given(np.array(tokens), packed.types, np.array(labels), follows)


def loss_of(model: BertForPreTraining, given: Given, *, at_places: bool) -> jax.Array:
    """The loss of pre-training, with logits of all words, or of those at hidden places alone."""
    places, labels = None, jnp.asarray(given.labels)
    if at_places:
        places, labels = pretraining.places_of(
            labels, pretraining.most_places(given.labels.shape[-1])
        )
    words, follows = model(jnp.asarray(given.tokens), types=given.types, places=places)
    return pretraining.pretraining_loss(words, follows, labels, jnp.asarray(given.follows))


def training_step(model: BertForPreTraining, given: Given, *, at_places: bool) -> Run:
    """A function that trains a model by one step."""
    optimizer = nnx.Optimizer(model, optax.adamw(RATE, weight_decay=0.01), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(
            lambda model: loss_of(model, given, at_places=at_places)
        )(model)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    return repeated(jax.jit(step, donate_argnums=0), state)


def torch_model(model: BertForPreTraining) -> Any:
    """The same model in `transformers`."""
    import torch
    import transformers

    config = write_config(model.config, "BertForPreTraining", dtype="float32")
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**config))
    weights = {name: torch.from_numpy(array.copy()) for name, array in to_torch(model).items()}
    absent, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown and all(".decoder." in name for name in absent)  # which are tied
    return theirs


def torch_loss(model: Any, given: Given) -> Any:
    """The loss of pre-training."""
    import torch

    tokens, types, labels, follows = (torch.from_numpy(array).long() for array in given)
    return model(tokens, token_type_ids=types, labels=labels, next_sentence_label=follows).loss


def torch_step(model: Any, given: Given) -> Run:
    """A function that trains a model of PyTorch by one step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)

    def run() -> None:
        optimizer.zero_grad()
        torch_loss(model, given).backward()
        optimizer.step()

    return run


def contenders(settings: Settings) -> dict[str, Run]:
    """Name of each contender → a function that takes one training step."""
    given, config = batch_of(settings), settings.config()
    runs: dict[str, Run] = {
        "transformers": torch_step(
            torch_model(BertForPreTraining(config, rngs=nnx.Rngs(0))).train(), given
        )
    }
    for name, at_places in (("all words", False), ("hidden words", True)):
        model = BertForPreTraining(config, rngs=nnx.Rngs(0))
        runs[name] = training_step(model, given, at_places=at_places)
    return runs


def times_table(settings: Settings) -> Table:
    """Milliseconds of a step, and those of `transformers` over them."""
    s, seconds = settings, measure(contenders(settings), settings.rounds)
    table = Table(
        "logits of", "milliseconds", "transformers", "ratio",
        title=f"pre-training step, {s.layers} layers, D {s.features}, T {s.length}, B {s.batch}",
    )  # fmt: skip
    theirs = seconds.pop("transformers")
    for name, times in seconds.items():
        both = [f"{1e3 * statistics.median(x):.0f}" for x in (times, theirs)]
        table.add_row(name, *both, ratio(theirs, times))
    return table


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time everyone and print the table."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.bert",
        description=__doc__,
    )
    check_torch()
    console = Console(width=140)
    console.print(times_table(settings))
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
