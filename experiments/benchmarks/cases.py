"""The work that the benchmark of attention times: shapes, masks, modifiers, and how many scores."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["full", "causal", "window", "soft cap", "ALiBi", "documents", "padding", "additive"]
Pass = Literal["forward", "forward+backward", "compile"]
CAP = 50.0
LARGEST = 10e9  # bytes; contenders that hold all scores at once run up to this size


@dataclass(frozen=True)
class Case:
    """One piece of work: shapes in the letters of the glossary, with T = S.

    "compile" times the compilation of forward and backward.
    """

    B: int
    T: int
    N: int = 8
    K: int = 8
    H: int = 64
    kind: Kind = "full"
    what: Pass = "forward"
    dtype: str = "float32"
    # Keys before the query's own position; only full, padding and additive are not causal
    window: int = 256

    def __str__(self) -> str:
        heads = f"N {self.N}" if self.N == self.K else f"N {self.N}/{self.K}"
        kind = f"window {self.window}" if self.kind == "window" else self.kind
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"B {self.B}, T {self.T}, {heads}, {kind}{dtype}, {self.what}"

    @property
    def backward(self) -> bool:
        """Whether the case computes gradients."""
        return self.what != "forward"

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and cotangent in float32.

        The output and the three gradients take as many.
        """
        return 4 * self.B * self.T * 2 * (self.N + self.K) * self.H

    @property
    def too_large(self) -> bool:
        """Whether a contender that holds all scores at once needs more than `LARGEST` bytes.

        The number of arrays that it holds was measured.
        """
        # additive: arrays of T × S × H; XLA and PyTorch keep fewer of them
        if self.kind == "additive":
            arrays = 4 * self.H if self.backward else 2 * self.H
        else:
            arrays = 8 if self.backward else 3
        return self.B * self.N * self.T**2 * 4 * arrays > LARGEST

    @property
    def operations(self) -> float | None:
        """Floating-point operations of the matrix products at the scores that the mask allows.

        None if other operations dominate. Forward has two products; backward has five, the scores
        again and four for the gradients.
        """
        if self.kind == "additive" or self.what == "compile":
            return None
        mask = allowed(self)
        scores = int(mask.sum()) * (self.B * self.T**2 // mask.size)
        return 4 * scores * self.N * self.H * (3.5 if self.backward else 1)


@dataclass(frozen=True)
class Group:
    """The cases of one table; `columns` are the contenders that it compares with `ours`."""

    title: str
    columns: tuple[str, ...]
    cases: tuple[Case, ...]
    ours: str = "blockwise"


def allowed(case: Case) -> np.ndarray:
    """The mask of a case, broadcastable to `[B, 1, T, T]`; True = may attend."""
    q_idx, k_idx = np.arange(case.T)[:, None], np.arange(case.T)
    match case.kind:
        case "full" | "additive":
            return np.ones((1, 1, 1, 1), bool)
        case "padding":
            return k_idx < lengths(case)[:, None, None, None]
        case "window":
            return ((q_idx >= k_idx) & (q_idx - k_idx <= case.window))[None, None]
        case "documents":
            ids = documents(case)
            return ((q_idx >= k_idx) & (ids[:, None] == ids))[None, None]
    return (q_idx >= k_idx)[None, None]


def lengths(case: Case) -> np.ndarray:
    """The number of real keys of each example, `[B]`; half of them on average."""
    return np.linspace(case.T / 4, case.T * 3 / 4, case.B).astype(np.int32)


def documents(case: Case) -> np.ndarray:
    """The document id of each position, `[T]`: eight documents with lengths 1 : 2 : … : 8."""
    ends = np.cumsum(np.arange(1, 9)) * case.T / 36
    return np.searchsorted(ends, np.arange(case.T), side="right").astype(np.int32)


BOTH: tuple[Pass, ...] = ("forward", "forward+backward")
MASKED: tuple[tuple[int, int, Kind], ...] = (
    (1, 4096, "window"),
    (1, 16384, "window"),
    (1, 4096, "soft cap"),
    (1, 4096, "ALiBi"),
    (1, 4096, "documents"),
    (4, 2048, "padding"),
)
ALL = ("PyTorch", "FlexAttention", "jax.nn", "tokamax", "dense")
LONG = [(1, 1024, 8), (1, 2048, 8), (1, 4096, 8), (1, 8192, 8), (1, 4096, 2), (1, 1000, 8)]
SHORT = [(8, 128, 8), (8, 512, 8), (32, 128, 8), (32, 512, 8)]


def _full_and_causal(sizes: list[tuple[int, int, int]], dtype: str = "float32") -> tuple[Case, ...]:
    kinds: tuple[Kind, ...] = ("full", "causal")
    return tuple(
        Case(B, T, K=K, kind=kind, what=what, dtype=dtype)
        for B, T, K in sizes
        for kind in kinds
        for what in BOTH
    )


GROUPS = {
    "full": Group("long sequences", ALL, _full_and_causal(LONG)),
    "short": Group("short sequences", ALL, _full_and_causal(SHORT)),
    "masks": Group(
        "masks and modifiers",
        ALL,
        tuple(Case(B, T, kind=kind, what=what) for B, T, kind in MASKED for what in BOTH),
    ),
    "additive": Group(
        "additive attention",
        ("PyTorch", "dense"),
        tuple(Case(1, T, 1, 1, 128, "additive", "forward+backward") for T in (1024, 2048, 4096)),
    ),
    "dtype": Group(
        "bfloat16",
        ("float32", "PyTorch"),
        _full_and_causal([(1, 1024, 8), (1, 4096, 8)], dtype="bfloat16"),
    ),
    "compile": Group(
        "compiling",
        ("jax.nn", "tokamax", "dense"),
        tuple(
            Case(1, 2048, kind=kind, what="compile")
            for kind in ("full", "causal", "window", "documents")
        ),
    ),
    "memory": Group(
        "memory", (), tuple(Case(1, T, what="forward+backward") for T in (16384, 65536))
    ),
}
