"""Random shapes (0 and 1 among them), dtypes, scores, masks and modifiers against the oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jattn
from jattn import masks, modifiers, scores
from jattn.functional.block import EMPTY, FULL, Block
from tests import oracle

few = functools.partial(settings, derandomize=True, deadline=None, database=None)


def make(mask, lengths, ids, array):
    """A drawn tree as a mask of jattn; arrays are arguments: trees of one form compile once."""
    kind, *parts = mask
    build = functools.partial(make, lengths=lengths, ids=ids, array=array)
    match kind:
        case "and":
            return build(parts[0]) & build(parts[1])
        case "or":
            return build(parts[0]) | build(parts[1])
        case "not":
            return ~build(parts[0])
        case "causal":
            return masks.causal(parts[0])
        case "window":
            return masks.sliding_window(*parts)
        case "chunks":
            return masks.chunked_local(parts[0])
        case "no self":
            return masks.no_self()
        case "padding":
            return masks.padding(lengths)
        case "prefix":
            return masks.prefix_lm(lengths)
        case "segments":
            return masks.segments(*ids)
        case "dense":
            return masks.from_array(array)
    return masks.mask_mod(lambda b, h, q_idx, k_idx: (b + h + q_idx + k_idx) % 3 > 0)


def allowed(mask, lengths, ids, array, b, h, t, s):
    """The same tree on one entry, in Python."""
    kind, *parts = mask
    see = functools.partial(allowed, lengths=lengths, ids=ids, array=array, b=b, h=h, t=t, s=s)
    match kind:
        case "and":
            return see(parts[0]) and see(parts[1])
        case "or":
            return see(parts[0]) or see(parts[1])
        case "not":
            return not see(parts[0])
        case "causal":
            return s <= t + parts[0]
        case "window":
            return t - parts[0] <= s <= t + parts[1]
        case "chunks":
            return t - t % parts[0] <= s < t - t % parts[0] + parts[0]
        case "no self":
            return s != t
        case "padding":
            return s < lengths[b]
        case "prefix":
            return s <= t or s < lengths[b]
        case "segments":
            return ids[0][b, t] == ids[1][b, s]
        case "dense":
            return bool(array[b, h, t, s])
    return (b + h + t + s) % 3 > 0


leaves = st.one_of(
    st.tuples(st.just("causal"), st.integers(-2, 3)),
    st.tuples(st.just("window"), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("chunks"), st.integers(1, 4)),
    *(
        st.tuples(st.just(kind))
        for kind in ("no self", "padding", "prefix", "segments", "dense", "callable")
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)
    ),
    max_leaves=4,
)  # fmt: skip


@given(tree=trees, seed=st.integers(0, 1000))
@few(max_examples=40)
def test_any_combination_of_masks_is_the_combination_of_its_entries(tree, seed):
    B, N, T, S = 2, 3, 5, 7
    draw = np.random.default_rng(seed)
    lengths, array = draw.integers(0, S + 1, B), draw.random((B, N, T, S)) < 0.5
    ids = np.sort(draw.integers(0, 3, (B, T))), np.sort(draw.integers(0, 3, (B, S)))
    truth = np.array(
        [allowed(tree, lengths, ids, array, *entry) for entry in np.ndindex(B, N, T, S)]
    )
    truth = truth.reshape(B, N, T, S)
    blocks = [((0, T), (0, S)), ((0, 2), (0, 2)), ((3, 2), (4, 3)), ((1, 1), (5, 1))]

    def evaluate():  # eager: every operation is compiled once for all trees
        mask = make(tree, lengths, ids, array)
        return mask.to_array(T, S, batch=(B,), num_heads=N), [
            mask.classify(Block((B,), N, *block)) for block in blocks
        ]

    came, kinds = evaluate()
    np.testing.assert_array_equal(np.broadcast_to(came, truth.shape), truth)
    for kind, ((row, rows), (column, columns)) in zip(kinds, blocks, strict=True):
        kind = np.broadcast_to(kind, (B, N, 1, 1))[..., 0, 0]
        part = truth[:, :, row : row + rows, column : column + columns]
        assert not part[kind == EMPTY].any() and part[kind == FULL].all()


def score_of(name, parameters):
    """A score of jattn and the same on one pair."""
    vector, matrix = parameters
    return {
        "dot": (scores.dot_product, lambda q, k, h: float(q @ k)),
        "scaled": (scores.scaled_dot_product, oracle.scaled_dot_product),
        "bilinear": (
            functools.partial(scores.bilinear, weight=matrix),
            lambda q, k, h: float(q @ matrix[h] @ k),
        ),
        "additive": (
            functools.partial(scores.additive, weight=vector),
            lambda q, k, h: float(np.tanh(q + k) @ vector[h]),
        ),
        "gaussian": (
            functools.partial(scores.gaussian, weight=vector),
            lambda q, k, h: -float(np.square((q - k) * vector[h]).sum()) / 2,
        ),
        "constant": (scores.constant, lambda q, k, h: 0.0),
    }[name]


def modifier_of(name, arrays, B, T, S):
    slopes, table, bias = arrays
    middle = max(T, S) - 1
    return {
        "none": (None, None),
        "cap": (modifiers.soft_cap(1.5), lambda x, b, h, t, s: 1.5 * math.tanh(x / 1.5)),
        "alibi": (modifiers.alibi(slopes), lambda x, b, h, t, s: x - slopes[h] * abs(t - s)),
        "relative": (
            modifiers.relative_bias(table),
            lambda x, b, h, t, s: x + table[h, t - s + middle],
        ),
        "bias": (modifiers.bias(bias), lambda x, b, h, t, s: x + bias[b, h, t, s]),
        "capped bias": (
            (modifiers.bias(bias), modifiers.soft_cap(1.5)),
            lambda x, b, h, t, s: 1.5 * math.tanh((x + bias[b, h, t, s]) / 1.5),
        ),
    }[name]


SIZES = (0, 1, 2), (0, 1, 5), (0, 1, 7), (1, 2), (1, 3), (1, 3), (0, 2)  # B, T, S, K, G, H, V


@given(
    sizes=st.tuples(*map(st.sampled_from, SIZES)),
    tree=st.one_of(st.none(), trees),
    score=st.sampled_from(["dot", "scaled", "bilinear", "additive", "gaussian", "constant"]),
    modifier=st.sampled_from(["none", "cap", "alibi", "relative", "bias", "capped bias"]),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@few(max_examples=25)
def test_attend_is_the_loop_whatever_the_sizes(sizes, tree, score, modifier, dtype, seed):
    B, T, S, K, G, H, V = sizes
    N, draw = K * G, np.random.default_rng(seed)
    with jax.enable_x64(dtype == "float64"):
        operands = [
            jnp.asarray(draw.standard_normal(shape), dtype)
            for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, V))
        ]
        wide = np.promote_types(dtype, np.float32) if dtype != "bfloat16" else np.dtype(np.float32)
        longest = max(T, S, 1)
        parameters = [draw.standard_normal(shape).astype(wide) for shape in ((N, H), (N, H, H))]
        arrays = [
            draw.standard_normal(shape).astype(wide)
            for shape in ((N,), (N, 2 * longest - 1), (B, N, T, S))
        ]
        drawn = {
            "lengths": draw.integers(0, S + 1, B),
            "ids": (draw.integers(0, 3, (B, T)), draw.integers(0, 3, (B, S))),
            "array": draw.random((B, N, T, S)) < 0.5,
        }
        function, single = score_of(score, parameters)
        modify, modify_single = modifier_of(modifier, arrays, B, longest, longest)
        mask = None if tree is None else make(tree, **drawn)
        output, lse = jax.jit(
            lambda *x: jattn.attend(*x, score=function, mask=mask, modifier=modify, return_lse=True)
        )(*operands)  # fmt: skip
        truth, truth_lse, _ = oracle.attend(
            *operands,
            score=single,
            allowed=None
            if tree is None
            else lambda b, h, t, s: allowed(tree, **drawn, b=b, h=h, t=t, s=s),
            modify=modify_single,
        )
    assert output.dtype == jnp.dtype(dtype) and lse.dtype == wide
    # Scores of a handful of terms near 1: tens of roundings of the accumulator, then one to the
    # dtype of the result.
    rounding, last = 50 * float(jnp.finfo(wide).eps), float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(output, np.float64), truth, rtol=rounding + last, atol=rounding
    )
    np.testing.assert_allclose(lse, truth_lse, rtol=rounding, atol=rounding)
