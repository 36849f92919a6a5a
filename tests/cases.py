"""What the contract is tried on: operands, scores, masks and modifiers, each with its own truth."""

import functools
import math

import jax
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from tests import oracle

B, T, S, H, V = 2, 5, 7, 3, 11
HEADS = [
    pytest.param(3, 3, id="multi-head"),
    pytest.param(6, 2, id="grouped"),
    pytest.param(5, 1, id="multi-query"),
]


def some(names, quick):
    """Parameters of which all but a few are slow."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names]


VARIANTS = {
    "dense": {},
    "decode": {},
    "blockwise": {"ROWS": 3, "COLUMNS": (4, 4), "one_cpu_device": lambda: False},
    "blockwise one by one": {
        "ROWS": 4,
        "COLUMNS": (3, 3),
        "SCORES": 1,
        "one_cpu_device": lambda: True,
    },
    # All examples in one
    "blockwise in parts": {"ROWS": 3, "COLUMNS": (4, 4), "one_cpu_device": lambda: True},
}


def loose(function):
    """A callable as users write it, mixing integers and floats.

    jattn itself keeps to strict promotion.
    """

    def call(*scalars):
        with jax.numpy_dtype_promotion("standard"):
            return function(*scalars)

    return call


def operands(rng, N=6, K=2, B=B, T=T, S=S, H=H, V=V, dtype=np.float64):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def cosine(q, k, h):
    return float(q @ k) / math.sqrt(float(q @ q) * float(k @ k))


def score_cases(N, rng):
    """name -> (score of jattn, the same on single entries)."""
    shared, per_head = rng.standard_normal(H), rng.standard_normal((N, H))
    matrix, matrices = rng.standard_normal((H, H)), rng.standard_normal((N, H, H))
    partial = functools.partial
    return {
        "constant": (scores.constant, lambda q, k, h: 0.0),
        "dot_product": (scores.dot_product, lambda q, k, h: float(q @ k)),
        "scaled_dot_product": (scores.scaled_dot_product, oracle.scaled_dot_product),
        "bilinear": (
            partial(scores.bilinear, weight=matrix),
            lambda q, k, h: float(q @ matrix @ k),
        ),
        "bilinear per head": (
            partial(scores.bilinear, weight=matrices),
            lambda q, k, h: float(q @ matrices[h] @ k),
        ),
        "additive": (
            partial(scores.additive, weight=shared),
            lambda q, k, h: float(np.tanh(q + k) @ shared),
        ),
        "additive per head": (
            partial(scores.additive, weight=per_head),
            lambda q, k, h: float(np.tanh(q + k) @ per_head[h]),
        ),
        "gaussian": (
            partial(scores.gaussian, weight=0.7),
            lambda q, k, h: -0.5 * sum((0.7 * (q - k)) ** 2),
        ),
        "gaussian per head": (
            partial(scores.gaussian, weight=per_head),
            lambda q, k, h: -0.5 * sum((per_head[h] * (q - k)) ** 2),
        ),
        "cosine": (partial(scores.cosine, scale=3.0), lambda q, k, h: 3 * cosine(q, k, h)),
    }


SCORES = list(score_cases(1, np.random.default_rng(0)))

LENGTHS = np.array([3, 6])
PER_QUERY = np.array([[0, 1, 2, 5, 7], [7, 3, 3, 0, 1]])
Q_IDS, K_IDS = (
    np.array([[0, 0, 1, 1, 4], [2, 2, 2, 3, 3]]),
    np.array([[0, 1, 1, 1, 2, 2, 2], [3, 3, 2, 2, 1, 1, 1]]),
)
ARRAY = np.random.default_rng(1).random((B, 1, T, S)) < 0.5
PARENTS, PREFIX = np.array([[-1, 0, 0, 1, 3], [-1, -1, 1, 0, 2]]), np.array([0, 2])
PATHS = [[{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 3, 4}], [{0}, {1}, {1, 2}, {0, 3}, {1, 2, 4}]]

MASKS = {
    "causal": (masks.causal(), lambda b, h, t, s: s <= t),
    "causal, ends aligned": (masks.causal(S - T), lambda b, h, t, s: s <= t + S - T),
    "window": (masks.sliding_window(2, 1), lambda b, h, t, s: t - 2 <= s <= t + 1),
    "chunks": (masks.chunked_local(3), lambda b, h, t, s: int(s / 3) == int(t / 3)),
    "no self": (masks.no_self(), lambda b, h, t, s: s != t),
    "padding": (masks.padding(LENGTHS), lambda b, h, t, s: s < LENGTHS[b]),
    "padding per query": (masks.padding(PER_QUERY), lambda b, h, t, s: s < PER_QUERY[b, t]),
    "prefix": (masks.prefix_lm(LENGTHS), lambda b, h, t, s: s <= t or s < LENGTHS[b]),
    "segments": (masks.segments(Q_IDS, K_IDS), lambda b, h, t, s: Q_IDS[b, t] == K_IDS[b, s]),
    "tree": (
        masks.tree(PARENTS, PREFIX),
        lambda b, h, t, s: s < PREFIX[b] or s - PREFIX[b] in PATHS[b][t],
    ),
    "dense": (masks.from_array(ARRAY), lambda b, h, t, s: ARRAY[b, 0, t, s]),
    "array": (ARRAY, lambda b, h, t, s: ARRAY[b, 0, t, s]),
    "callable": (
        lambda b, h, q_idx, k_idx: (q_idx + k_idx + h + b) % 3 > 0,
        lambda b, h, t, s: (t + s + h + b) % 3 > 0,
    ),
    "algebra": (
        (masks.causal(1) & ~masks.no_self())
        | masks.padding(LENGTHS) & masks.mask_mod(lambda b, h, i, j: h > j),
        lambda b, h, t, s: (s <= t + 1 and s == t) or (s < LENGTHS[b] and h > s),
    ),
    "nothing": (masks.from_array(np.zeros((1, 1), bool)), lambda b, h, t, s: False),
}

SLOTS = 10
DOCUMENTS = np.array([[0, 0, 0, 2, 2, 2, 2, 3, 3, -1], [1] * SLOTS])
# The block of a slot in one half; 9: the slot is in the other half
NOISED, CLEAN = [0, 0, 1, 1, 2, 9, 9, 9, 9, 9], [9, 9, 9, 9, 9, 0, 0, 1, 1, 2]

# Of self-attention, T = S
SELF_MASKS = {
    "documents": (
        masks.documents(np.array([[3, 0, 4, 2], [0, SLOTS, 0, 0]])),
        lambda b, h, t, s: 0 <= DOCUMENTS[b, t] == DOCUMENTS[b, s],
    ),
    "documents, shared": (
        masks.documents(np.array([3, 0, 4, 2])),
        lambda b, h, t, s: 0 <= DOCUMENTS[0, t] == DOCUMENTS[0, s],
    ),
    "diffusion": (
        masks.block_diffusion(SLOTS // 2, 2),
        lambda b, h, t, s: (
            NOISED[s] == NOISED[t] or CLEAN[s] < NOISED[t]
            if t < SLOTS // 2
            else CLEAN[s] <= CLEAN[t]
        ),
    ),
}

SLOPES = np.array([0.5, 0.25, 0.2, 0.1, 0.05, 0.3])
TABLE = np.random.default_rng(2).standard_normal((6, 13))
BIAS = np.random.default_rng(3).standard_normal((B, 6, T, S))

MODIFIERS = {
    "soft_cap": (modifiers.soft_cap(0.7), lambda x, b, h, t, s: 0.7 * math.tanh(x / 0.7)),
    "alibi": (modifiers.alibi(SLOPES), lambda x, b, h, t, s: x - SLOPES[h] * abs(t - s)),
    "relative_bias": (
        modifiers.relative_bias(TABLE),
        lambda x, b, h, t, s: x + TABLE[h, t - s + 6],
    ),
    "bias": (modifiers.bias(BIAS), lambda x, b, h, t, s: x + BIAS[b, h, t, s]),
    "callable": (
        loose(lambda x, b, h, i, j: x * (1 + h) - 0.1 * b * (i - j)),
        lambda x, b, h, t, s: x * (1 + h) - 0.1 * b * (t - s),
    ),
    "tuple": (
        (modifiers.alibi(SLOPES), modifiers.soft_cap(0.5), loose(lambda x, b, h, i, j: x + h)),
        lambda x, b, h, t, s: 0.5 * math.tanh((x - SLOPES[h] * abs(t - s)) / 0.5) + h,
    ),
}


def assert_is_truth(came, truth, rtol=1e-12):
    """Output, lse and weights within a few float64 roundings of the oracle's."""
    for name, a, b in zip(("output", "lse", "weights"), came, truth, strict=False):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=name)


def run(kernel, query, key, value, **options):
    """Output and lse, and the weights where the kernel can make them."""

    @jax.jit
    def results(query, key, value):
        weights = {"return_weights": True} if kernel == "dense" else {}
        return jattn.attend(
            query, key, value, implementation=kernel, return_lse=True, **weights, **options
        )

    return results(query, key, value)
