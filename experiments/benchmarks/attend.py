"""Time jattn's kernels against PyTorch and jax.nn on this machine, interleaved, as ratios with their spread.

Claim: blockwise attention in plain JAX is faster than PyTorch's scaled_dot_product_attention on CPU.

Each round runs every contender once, so that a machine that slows down slows all of them; a ratio is that of one round.
PyTorch gets contiguous arrays in its own layout, two threads, and is left out where it is not installed.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from einops import rearrange
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jattn

Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One piece of work: shapes in the letters of the glossary, with T = S."""

    B: int
    T: int
    N: int = 8
    K: int = 8
    H: int = 64
    causal: bool = False
    backward: bool = False

    def __str__(self) -> str:
        heads = f"N {self.N}" if self.N == self.K else f"N {self.N}/{self.K}"
        kind = "causal" if self.causal else "full"
        return f"B {self.B}, T {self.T}, {heads}, {kind}, {'forward+backward' if self.backward else 'forward'}"

    @property
    def operations(self) -> float:
        """Floating-point operations of the matrix products, each multiplication and addition one."""
        scores = self.B * self.N * self.T * (self.T + 1) / 2 if self.causal else self.B * self.N * self.T * self.T
        return 4 * scores * self.H * (3.5 if self.backward else 1)


CASES = [
    Case(B, T, K=K, causal=causal, backward=backward)
    for B, T, K in [(1, 1024, 8), (1, 4096, 8), (1, 1000, 2), (8, 512, 8), (32, 128, 8)]
    for causal in (False, True)
    for backward in (False, True)
]


@dataclass(frozen=True)
class Settings:
    """Time attention kernels against PyTorch and jax.nn."""

    rounds: int = 7
    """Times that every contender runs, after one run to compile."""
    longest: int = 4096
    """Leave out longer sequences."""


def contenders(case: Case) -> dict[str, Run]:
    """What runs the case: name → one blocking run."""
    rng = np.random.default_rng(0)
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    mask = jattn.masks.causal() if case.causal else None
    functions: dict[str, Callable[..., jax.Array]] = {
        name: lambda q, k, v, name=name: jattn.attend(q, k, v, mask=mask, implementation=name)
        for name in ("blockwise", "dense")
    }
    functions["jax.nn"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.causal)
    runs = {name: _compiled(function, arrays, case.backward) for name, function in functions.items()}
    return runs | _torch(case, arrays)


def _compiled(function: Callable[..., jax.Array], arrays: list[np.ndarray], backward: bool) -> Run:
    def work(query, key, value, cotangent):
        return jax.vjp(function, query, key, value)[1](cotangent) if backward else function(query, key, value)

    compiled = jax.jit(work)
    on_device = [jnp.asarray(array) for array in arrays]
    return lambda: jax.block_until_ready(compiled(*on_device))


def _torch(case: Case, arrays: list[np.ndarray]) -> dict[str, Run]:
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    tensors: list[Any] = [torch.from_numpy(rearrange(array, "b t n h -> b n t h").copy()) for array in arrays]
    *operands, cotangent = tensors
    for operand in operands:
        operand.requires_grad_(case.backward)
    attend: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        output = attend(*operands, is_causal=case.causal, enable_gqa=case.N != case.K)
        if case.backward:
            torch.autograd.grad(output, operands, cotangent)

    return {"PyTorch": run}


def measure(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, round by round."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def roofline() -> float:
    """Operations per second of a large float32 matrix product, the median of seven."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = measure({"product": lambda: jax.block_until_ready(product(matrix))}, 7)["product"]
    return 2 * 2048**3 / statistics.median(seconds)


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times as long they took: median of the rounds, and the range."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def main(settings: Settings) -> None:
    """Run every case and print the table."""
    console, peak = Console(width=140), roofline()
    columns = ["PyTorch", "jax.nn", "dense"]
    table = Table("work", "GFLOP/s", "of a matrix product", *columns, title="time of … over the time of blockwise")
    cases = [case for case in CASES if settings.longest >= case.T]
    for case in track(cases, console=console):
        seconds = measure(contenders(case), settings.rounds)
        rate: float = case.operations / statistics.median(seconds["blockwise"])
        ratios: list[Any] = [ratio(seconds[name], seconds["blockwise"]) if name in seconds else "" for name in columns]
        table.add_row(str(case), f"{rate / 1e9:.0f}", f"{rate / peak:.0%}", *ratios)
    console.print(table)
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, jax {jax.__version__}, float32"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
