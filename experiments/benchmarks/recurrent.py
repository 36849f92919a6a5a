"""Time jattn's LSTM and GRU against PyTorch and Flax, as ratios with their spread.

Claim: forward and backward together, jattn is at least as fast as Flax. Compared with PyTorch its
LSTM takes about one and a half times as long, and its GRU is faster.

Each round gives every contender one turn, as in `experiments.benchmarks.attend`. The gradients are
those of the inputs and of every parameter. PyTorch uses one thread per CPU, and is left out if it
is not installed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import exits_on_bad_input
from experiments.benchmarks.timing import Run, machine, measure, ratio
from experiments.training.command import check_at_least
from jattn.nn import GRU, LSTM


@dataclass(frozen=True)
class Case:
    """One piece of work: shapes in the letters of the glossary."""

    kind: str
    B: int
    T: int
    D: int
    F: int

    def __str__(self) -> str:
        return f"{self.kind}, B {self.B}, T {self.T}, {self.D} → {self.F}, forward+backward"


CASES = [
    Case(kind, *sizes)
    for kind in ("LSTM", "GRU")
    for sizes in [(32, 64, 128, 256), (64, 32, 64, 128)]
]
COLUMNS = ["PyTorch", "Flax", "Flax, optimized"]


@dataclass(frozen=True)
class Settings:
    """Time recurrent networks against PyTorch and Flax."""

    rounds: int = 7
    """Turns of every contender."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1)


def contenders(case: Case) -> dict[str, Run]:
    """Name of each contender → a function that runs the case to its end."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((case.B, case.T, case.D)).astype(np.float32)
    cotangent = rng.standard_normal((case.B, case.T, case.F)).astype(np.float32)
    rngs, widths = nnx.Rngs(0), (case.D, case.F)
    if case.kind == "LSTM":
        networks = {
            "jattn": LSTM(*widths, rngs=rngs),
            "Flax": nnx.RNN(nnx.LSTMCell(*widths, rngs=rngs)),
            "Flax, optimized": nnx.RNN(nnx.OptimizedLSTMCell(*widths, rngs=rngs)),
        }
    else:
        networks = {
            "jattn": GRU(*widths, rngs=rngs),
            "Flax": nnx.RNN(nnx.GRUCell(*widths, rngs=rngs)),
        }
    runs = {name: _compiled(network, inputs, cotangent) for name, network in networks.items()}
    return runs | _torch(case, inputs, cotangent)


def _compiled(network: nnx.Module, inputs: np.ndarray, cotangent: np.ndarray) -> Run:
    # The rest holds the random stream that Flax draws its first state from
    structure, parameters, rest = nnx.split(network, nnx.Param, ...)  # type: ignore[misc]

    @jax.jit
    def work(parameters: nnx.State, inputs: jax.Array, cotangent: jax.Array) -> Any:
        def outputs(parameters: nnx.State, inputs: jax.Array) -> jax.Array:
            found = nnx.merge(structure, parameters, rest, copy=True)(inputs)
            return found[0] if isinstance(found, tuple) else found

        found, pull_back = jax.vjp(outputs, parameters, inputs)
        return found, pull_back(cotangent)

    on_device = [jnp.asarray(array) for array in (inputs, cotangent)]
    return lambda: jax.block_until_ready(work(parameters, *on_device))


def _torch(case: Case, inputs: np.ndarray, cotangent: np.ndarray) -> dict[str, Run]:
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    network = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}[case.kind](
        case.D, case.F, batch_first=True
    )
    leaf, back = torch.from_numpy(inputs).requires_grad_(), torch.from_numpy(cotangent)
    leaves = [leaf, *network.parameters()]

    def run() -> None:
        torch.autograd.grad(network(leaf)[0], leaves, back)

    return {"PyTorch": run}


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time every case and print the table."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.recurrent",
        description=__doc__,
    )
    console = Console(width=140)
    table = Table("work", "milliseconds", *COLUMNS, title="time of each over the time of jattn")
    for case in track(CASES, console=console):
        seconds = measure(contenders(case), settings.rounds)
        ratios = [
            ratio(seconds[name], seconds["jattn"]) if name in seconds else "" for name in COLUMNS
        ]
        table.add_row(str(case), f"{1e3 * float(np.median(seconds['jattn'])):.1f}", *ratios)
    console.print(table)
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
