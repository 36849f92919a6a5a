"""Time Transformers against Flax's own modules and eager PyTorch, as ratios with their spread.

Claim: a training step of an encoder is no slower than of the same one of Flax's modules, and takes
at most 1.2 times PyTorch's time; a translator's beam search is faster than PyTorch's.

Each round gives everyone one turn. All have the same sizes, and no dropout; a step is forward,
backward and Adam. PyTorch's beam search is the usual Python loop, which decodes all tokens so far
again at every step, for `torch.nn.Transformer` keeps no keys and values.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.benchmarks.timing import Run, machine, measure, ratio
from experiments.training.command import check_at_least
from jattn.interop import load_torch
from jattn.models import FeatureClassifier, TransformerTranslator, feature_encoder, transformer

CLASSES, WIDTH, LONGEST = 10, 4, 24


@dataclass(frozen=True)
class Settings:
    """Time an encoder's training step, and a translator's beam search."""

    rounds: int = 5
    """Turns of each contender."""
    batch: int = 32
    """Examples in a batch."""
    length: int = 128
    """Steps of the sequences that the encoder reads."""
    layers: int = 6
    """Layers of the encoder."""
    features: int = 384
    """Width of the encoder's layers: a multiple of 64, the width of a head."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, batch=1, length=1, layers=1, features=64)
        if self.features % 64:
            raise BadInput(f"--features must be a multiple of 64, got {self.features}")

    def encoder(self) -> feature_encoder.Config:
        """The encoder's sizes and form."""
        D = self.features
        return feature_encoder.Config(
            D, D, D // 64, self.layers, 4 * D, 0.0, activation="gelu", positions=False
        )


class FlaxEncoderLayer(nnx.Module):
    """The same layer of Flax's own modules."""

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(num_heads, features, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(features, 4 * features, rngs=rngs)
        self.linear2 = nnx.Linear(4 * features, features, rngs=rngs)
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Post-norm, as PyTorch's."""
        x = self.norm1(x + self.attention(x))
        inner = jax.nn.gelu(self.linear1(x), approximate=False)
        return self.norm2(x + self.linear2(inner))


class FlaxClassifier(nnx.Module):
    """Layers of Flax's modules between two Linears, with a mean over time."""

    def __init__(self, config: feature_encoder.Config, classes: int, *, rngs: nnx.Rngs):
        D = config.features
        self.embedding = nnx.Linear(config.in_features, D, rngs=rngs)
        self.layers = nnx.List(
            [FlaxEncoderLayer(D, config.num_heads, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.out = nnx.Linear(D, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, C]."""
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(axis=1))


def jax_step(model: nnx.Module, x: np.ndarray, target: np.ndarray) -> Run:
    """A function that trains a model of JAX by one step, whose memory it gives back."""
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))
    inputs, labels = jnp.asarray(x), jnp.asarray(target, jnp.int32)

    def loss_of(model: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels)
        return losses.mean()

    def step(state: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss_of)(model)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    compiled, held = jax.jit(step, donate_argnums=0), [state]

    def run() -> None:
        held[0], _ = jax.block_until_ready(compiled(held[0]))

    return run


def torch_step(model: Any, x: np.ndarray, target: np.ndarray) -> Run:
    """The same of a model in eager PyTorch."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(target)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs)["logits"], labels).backward()
        optimizer.step()

    return run


def training(settings: Settings, reference: Any) -> dict[str, Run]:
    """Name of each contender → a function that takes one step of an encoder's training."""
    rng, config = np.random.default_rng(0), settings.encoder()
    shape = settings.batch, settings.length, settings.features
    data = rng.normal(size=shape).astype(np.float32), rng.integers(0, CLASSES, settings.batch)
    models: dict[str, Callable[..., nnx.Module]] = {
        "jattn": FeatureClassifier,
        "Flax": FlaxClassifier,
    }
    runs = {
        name: jax_step(model(config, CLASSES, rngs=nnx.Rngs(0)), *data)
        for name, model in models.items()
    }
    theirs = reference.FeatureClassifier(
        CLASSES, settings.features, in_features=settings.features, num_heads=config.num_heads,
        num_layers=settings.layers, mlp_features=config.mlp_features, dropout_rate=0.0,
        positions=False, activation="gelu",
    )  # fmt: skip
    return runs | {"PyTorch": torch_step(theirs.train(), *data)}


def searching(settings: Settings, reference: Any) -> dict[str, Run]:
    """Name of each contender → a function that translates a batch with four hypotheses."""
    import torch

    config = transformer.Config(100, 120, 128, 4, 2, 2, 256, norm_first=True)
    theirs = reference.Translator(100, 120, 128, 4, 2, 2, 256, norm_first=True).eval()
    with torch.no_grad():
        theirs.generator.bias[config.end] = -1e9  # nothing ends early
    ours = TransformerTranslator(config, rngs=nnx.Rngs(0))
    load_torch(ours, theirs.state_dict())
    rng = np.random.default_rng(0)
    source = rng.integers(3, 100, (settings.batch, LONGEST))
    tokens, inputs = jnp.asarray(source, jnp.int32), torch.from_numpy(source)
    options: dict[str, Any] = {"max_length": LONGEST, "width": WIDTH}
    return {
        "jattn": lambda: jax.block_until_ready(ours.beam(tokens, **options)),
        "PyTorch": lambda: torch_beam(theirs, inputs, config),
    }


def torch_beam(model: Any, source: Any, config: transformer.Config) -> Any:
    """The W best translations `[B · W, L + 1]`, all of which have the greatest length."""
    import torch

    with torch.no_grad():
        B, C = len(source), config.target_vocabulary
        memory = model.encode(source).repeat_interleave(WIDTH, 0)
        first = torch.arange(B)[:, None] * WIDTH
        scores = torch.full((B, WIDTH), -torch.inf)
        scores[:, 0] = 0
        tokens = torch.full((B * WIDTH, 1), config.start)
        for _ in range(LONGEST):
            logs = model.decode(tokens, memory)[:, -1].log_softmax(-1).view(B, WIDTH, C)
            scores, best = (scores[..., None] + logs).view(B, -1).topk(WIDTH)
            rows = (first + best // C).flatten()
            tokens = torch.cat([tokens[rows], (best % C).view(-1, 1)], 1)
        return tokens


def contenders(settings: Settings) -> dict[str, dict[str, Run]]:
    """Work → name of each contender → a function that runs the work to its end."""
    try:
        import torch

        from experiments.torch_reference import transformer as reference
    except ImportError:
        raise BadInput(
            "the comparison needs PyTorch, which is not installed: pip install -e '.[torch]'"
        ) from None
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    sizes = f"{settings.layers} layers, D {settings.features}, T {settings.length}"
    return {
        f"training step, {sizes}, B {settings.batch}": training(settings, reference),
        f"beam search, B {settings.batch}": searching(settings, reference),
    }


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time everyone and print the table."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.transformer",
        description=__doc__,
    )
    console = Console(width=140)
    title = "time of each over the time of jattn"
    table = Table("work", "milliseconds", "Flax", "PyTorch", title=title)
    for work, runs in contenders(settings).items():
        seconds = measure(runs, settings.rounds)
        times = f"{1e3 * float(np.median(seconds['jattn'])):.1f}"
        others = [
            ratio(seconds[name], seconds["jattn"]) if name in seconds else ""
            for name in ("Flax", "PyTorch")
        ]
        table.add_row(work, times, *others)
    console.print(table)
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
