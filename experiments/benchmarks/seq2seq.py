"""Time Bahdanau's translator against the same model in eager PyTorch, as ratios with their spread.

Claim: a training step and a beam search with four hypotheses are faster compiled by JAX than in
PyTorch's eager mode.

Each round gives both one turn. Both have the same weights; a step is forward, backward and Adam.
PyTorch's beam search is the usual Python loop over tokens, with all hypotheses of all sentences in
one batch. In neither can a sentence end before the last step.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from jattn.models.bahdanau import BahdanauTranslator, Config
from jattn.models.tokens import cross_entropy

WIDTH, LONGEST = 4, 24


@dataclass(frozen=True)
class Settings:
    """Time training steps and beam search against eager PyTorch."""

    rounds: int = 7
    """Turns of each contender."""
    batch: int = 32
    """Sentences in a batch."""
    config: tyro.conf.Suppress[Config] = field(default_factory=lambda: Config(100, 120))

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, batch=1)


def batch_of(settings: Settings) -> dict[str, np.ndarray]:
    """Random tokens, lengths of the sources, and targets."""
    rng, config = np.random.default_rng(0), settings.config
    source = rng.integers(3, config.source_vocabulary, (settings.batch, LONGEST))
    target = rng.integers(3, config.target_vocabulary, (settings.batch, LONGEST))
    lengths = rng.integers(LONGEST // 2, LONGEST + 1, settings.batch)
    return {"source": source, "target": target, "lengths": lengths}


def of_jattn(
    weights: dict[str, np.ndarray], batch: dict[str, np.ndarray], config: Config
) -> dict[str, Run]:
    """Functions that run one training step and one beam search."""
    model = BahdanauTranslator(config, rngs=nnx.Rngs(0))
    load_torch(model, weights)
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))
    arrays = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}

    def loss_of(model: Any) -> jax.Array:
        logits = model(arrays["source"], arrays["target"], lengths=arrays["lengths"])
        return cross_entropy(logits, arrays["target"])

    @jax.jit
    def step(state: nnx.State) -> Any:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss_of)(model)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    def search() -> Any:
        options: dict[str, Any] = {"max_length": LONGEST, "width": WIDTH}
        return jax.block_until_ready(
            model.beam(arrays["source"], lengths=arrays["lengths"], **options)
        )

    return {"training step": lambda: jax.block_until_ready(step(state)), "beam search": search}


def of_torch(model: Any, batch: dict[str, np.ndarray], config: Config) -> dict[str, Run]:
    """The same functions in eager PyTorch."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    source, target, lengths = tensors["source"], tensors["target"], tensors["lengths"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(source, target, lengths)["logits"]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()

    @torch.no_grad()
    def search() -> Any:
        B, C = len(source), config.target_vocabulary
        memory, state = model.encoder(source, lengths)
        memory, state = memory.repeat_interleave(WIDTH, 0), state.repeat_interleave(WIDTH, 1)
        seen, first = lengths.repeat_interleave(WIDTH, 0), torch.arange(B)[:, None] * WIDTH
        scores = torch.full((B, WIDTH), -torch.inf)
        scores[:, 0] = 0
        tokens = torch.full((B * WIDTH, 1), config.start)
        for _ in range(LONGEST):
            attended = model.decoder.attention(state[-1][:, None], memory, memory, seen)["output"]
            embedded = model.decoder.embedding(tokens[:, -1:])
            output, state = model.decoder.rnn(torch.cat([attended, embedded], -1), state)
            logs = model.decoder.dense(output[:, 0]).log_softmax(-1).view(B, WIDTH, C)
            scores, best = (scores[..., None] + logs).view(B, -1).topk(WIDTH)
            rows = (first + best // C).flatten()
            tokens = torch.cat([tokens[rows], (best % C).view(-1, 1)], 1)
            state = state[:, rows]
        return tokens

    return {"training step": step, "beam search": search}


def contenders(settings: Settings) -> dict[str, dict[str, Run]]:
    """Work → name of each contender → a function that runs the work to its end."""
    try:
        import torch

        from experiments.torch_reference.bahdanau import BahdanauTranslator as Reference
    except ImportError:
        raise BadInput(
            "the comparison needs PyTorch, which is not installed: pip install -e '.[torch]'"
        ) from None
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config, batch = settings.config, batch_of(settings)
    sizes = config.embedding_features, config.hidden_features, config.num_layers
    reference = Reference(config.source_vocabulary, config.target_vocabulary, *sizes)
    with torch.no_grad():
        reference.decoder.dense.bias[config.end] = -1e9  # nothing ends early
    weights = {name: tensor.numpy().copy() for name, tensor in reference.state_dict().items()}
    ours, theirs = of_jattn(weights, batch, config), of_torch(reference, batch, config)
    return {work: {"jattn": ours[work], "PyTorch": theirs[work]} for work in ours}


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time both and print the table."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.seq2seq",
        description=__doc__,
    )
    console = Console(width=140)
    table = Table("work", "milliseconds", "PyTorch", title="time of PyTorch over the time of jattn")
    for work, runs in contenders(settings).items():
        seconds = measure(runs, settings.rounds)
        times = f"{1e3 * float(np.median(seconds['jattn'])):.1f}"
        table.add_row(
            f"{work}, B {settings.batch}", times, ratio(seconds["PyTorch"], seconds["jattn"])
        )
    console.print(table)
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
