"""What the benchmarks share: interleaved timing, ratios, peak memory, and the machine's limits."""

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import BadInput

Run = Callable[[], object]

# PyTorch's threads spin for up to about 200 ms after their work and take the cores from the next
# contender
PAUSE = 0.25
# The first runs of a turn are slow, because they get their memory from the system anew; so a turn
# lasts at least ENOUGH seconds or MOST runs
ENOUGH, MOST = 0.4, 20


def check_torch() -> None:
    """Have PyTorch use all CPUs.

    Raises:
      BadInput: it, or `transformers`, is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise BadInput(
            "the comparison needs PyTorch and transformers: pip install -e '.[torch]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)


def measure(runs: Mapping[str, Run], rounds: int, pause: float = PAUSE) -> dict[str, list[float]]:
    """Seconds of every contender, round by round.

    In each round every contender has one turn: a pause, an untimed run, and timed runs, whose
    median counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            run()
            seconds[name].append(_turn(run))
    return seconds


def _turn(run: Run) -> float:
    times: list[float] = []
    while not times or (sum(times) < ENOUGH and len(times) < MOST):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Their time over our time, round by round."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Their time over our time: the median of the rounds, and the range.

    Example:
      >>> ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
      '3.00 (2.00–4.00)'
    """
    rounds = ratios(theirs, ours)
    return f"{statistics.median(rounds):.2f} ({min(rounds):.2f}–{max(rounds):.2f})"


def roofline(pause: float = PAUSE) -> float:
    """Operations per second of a large float32 matrix product: the median of seven turns."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = measure({"product": lambda: jax.block_until_ready(product(matrix))}, 7, pause)
    return 2 * 2048**3 / statistics.median(seconds["product"])


def peak_memory(run: Run) -> int | None:
    """Bytes that one run adds to resident memory at its peak; None where the system is not Linux.

    The outputs count, the inputs do not. Measure the first run of a compiled function: XLA keeps
    its buffers.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before hides the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def machine() -> str:
    """The processor, the number of CPUs and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = named[1] if named else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} CPUs, jax {jax.__version__}"
