"""The truth that kernels are held to: attention as loops in float64 NumPy, without jattn."""

import itertools
import math

import numpy as np


def attend(query, key, value, *, score, allowed=None, modify=None):
    """Output [B, T, N, V], log-sum-exp [B, T, N] and weights [B, N, T, S], with one batch axis.

    `score(q, k, h)`, `allowed(b, h, t, s)` and `modify(score, b, h, t, s)` are functions on single
    entries.
    """
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    (B, T, N, _), (_, S, K, _), V = query.shape, key.shape, value.shape[-1]
    output = np.zeros((B, T, N, V))
    lse = np.full((B, T, N), -np.inf)
    weights = np.zeros((B, N, T, S))
    for b, h, t in itertools.product(range(B), range(N), range(T)):
        shared = h // (N // K)
        entries = {}
        for s in range(S):
            if allowed is None or allowed(b, h, t, s):
                entry = score(query[b, t, h], key[b, s, shared], h)
                entries[s] = entry if modify is None else modify(entry, b, h, t, s)
        if not entries:
            continue
        highest = max(entries.values())
        total = math.fsum(math.exp(entry - highest) for entry in entries.values())
        lse[b, t, h] = highest + math.log(total)
        for s, entry in entries.items():
            weights[b, h, t, s] = math.exp(entry - highest) / total
            output[b, t, h] += weights[b, h, t, s] * value[b, s, shared]
    return output, lse, weights


def scaled_dot_product(q, k, h):
    """qᵀk / √H."""
    return float(q @ k) / math.sqrt(len(q))


def numerical_gradient(function, array, step=1e-3):
    """Central differences of a scalar float64 function of one array, extrapolated from two steps.

    (4 D(step / 2) − D(step)) / 3. For values of order ten rounding is
    2e-16 · 10 · 3 / step = 6e-12; for fifth derivatives of order a thousand truncation is
    step⁴ · 1000 / 480 = 2e-12.
    """
    array = np.array(array, np.float64)
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        middle = array[index]

        def slope(step, index=index, middle=middle):
            ends = []
            for moved in (middle + step, middle - step):
                array[index] = moved
                ends.append(function(array))
            array[index] = middle
            return (ends[0] - ends[1]) / (2 * step)

        gradient[index] = (4 * slope(step / 2) - slope(step)) / 3
    return gradient
