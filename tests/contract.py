"""The contract of attend: every kernel that runs anywhere passes every test; a new one is an entry of `KERNELS`.

Numbers in section comments are those of the contract. Lengths and widths are distinct primes: swapped axes fail.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from jattn.attention import KERNELS
from jattn.kernels import grid
from tests import oracle

B, T, S, H, V = 2, 5, 7, 3, 11
HEADS = [pytest.param(3, 3, id="multi-head"), pytest.param(6, 2, id="grouped"), pytest.param(5, 1, id="multi-query")]

VARIANTS = {
    "dense": {},
    "blockwise": {"ROWS": 3, "COLUMNS": (4, 4), "one_cpu_device": lambda: False},
    "blockwise one by one": {"ROWS": 4, "COLUMNS": (3, 3), "SCORES": 1, "one_cpu_device": lambda: True},
    "blockwise in parts": {"ROWS": 3, "COLUMNS": (4, 4), "one_cpu_device": lambda: True},  # all examples in one
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (len(name.split()) > 1)) for name in VARIANTS])
def kernel(request, monkeypatch):
    """The name of a kernel, with blocks so small that these lengths need several."""
    for name, value in VARIANTS[request.param].items():
        monkeypatch.setattr(grid, name, value)
    return request.param.split()[0]


def test_every_kernel_is_held_to_the_contract():
    """But for one that needs its maker's hardware: see tests/kernels/test_cudnn.py."""
    assert {variant.split()[0] for variant in VARIANTS} | {"cudnn"} == set(KERNELS)


def loose(function):
    """A callable as users write it, mixing integers and floats; jattn itself keeps to strict promotion."""

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
        "bilinear": (partial(scores.bilinear, weight=matrix), lambda q, k, h: float(q @ matrix @ k)),
        "bilinear per head": (partial(scores.bilinear, weight=matrices), lambda q, k, h: float(q @ matrices[h] @ k)),
        "additive": (partial(scores.additive, weight=shared), lambda q, k, h: float(np.tanh(q + k) @ shared)),
        "additive per head": (
            partial(scores.additive, weight=per_head),
            lambda q, k, h: float(np.tanh(q + k) @ per_head[h]),
        ),
        "gaussian": (partial(scores.gaussian, weight=0.7), lambda q, k, h: -0.5 * sum((0.7 * (q - k)) ** 2)),
        "gaussian per head": (
            partial(scores.gaussian, weight=per_head),
            lambda q, k, h: -0.5 * sum((per_head[h] * (q - k)) ** 2),
        ),
        "cosine": (partial(scores.cosine, scale=3.0), lambda q, k, h: 3 * cosine(q, k, h)),
    }


SCORES = list(score_cases(1, np.random.default_rng(0)))

LENGTHS = np.array([3, 6])
PER_QUERY = np.array([[0, 1, 2, 5, 7], [7, 3, 3, 0, 1]])
Q_IDS, K_IDS = np.array([[0, 0, 1, 1, 4], [2, 2, 2, 3, 3]]), np.array([[0, 1, 1, 1, 2, 2, 2], [3, 3, 2, 2, 1, 1, 1]])
ARRAY = np.random.default_rng(1).random((B, 1, T, S)) < 0.5

MASKS = {
    "causal": (masks.causal(), lambda b, h, t, s: s <= t),
    "causal, ends aligned": (masks.causal(S - T), lambda b, h, t, s: s <= t + S - T),
    "window": (masks.sliding_window(2, 1), lambda b, h, t, s: t - 2 <= s <= t + 1),
    "no self": (masks.no_self(), lambda b, h, t, s: s != t),
    "padding": (masks.padding(LENGTHS), lambda b, h, t, s: s < LENGTHS[b]),
    "padding per query": (masks.padding(PER_QUERY), lambda b, h, t, s: s < PER_QUERY[b, t]),
    "prefix": (masks.prefix_lm(LENGTHS), lambda b, h, t, s: s <= t or s < LENGTHS[b]),
    "segments": (masks.segments(Q_IDS, K_IDS), lambda b, h, t, s: Q_IDS[b, t] == K_IDS[b, s]),
    "dense": (masks.dense(ARRAY), lambda b, h, t, s: ARRAY[b, 0, t, s]),
    "array": (ARRAY, lambda b, h, t, s: ARRAY[b, 0, t, s]),
    "callable": (
        lambda b, h, q_idx, k_idx: (q_idx + k_idx + h + b) % 3 > 0,
        lambda b, h, t, s: (t + s + h + b) % 3 > 0,
    ),
    "algebra": (
        (masks.causal(1) & ~masks.no_self()) | masks.padding(LENGTHS) & masks.mask_mod(lambda b, h, i, j: h > j),
        lambda b, h, t, s: (s <= t + 1 and s == t) or (s < LENGTHS[b] and h > s),
    ),
    "nothing": (masks.dense(np.zeros((1, 1), bool)), lambda b, h, t, s: False),
}

SLOPES = np.array([0.5, 0.25, 0.2, 0.1, 0.05, 0.3])
TABLE = np.random.default_rng(2).standard_normal((6, 13))
BIAS = np.random.default_rng(3).standard_normal((B, 6, T, S))

MODIFIERS = {
    "soft_cap": (modifiers.soft_cap(0.7), lambda x, b, h, t, s: 0.7 * math.tanh(x / 0.7)),
    "alibi": (modifiers.alibi(SLOPES), lambda x, b, h, t, s: x - SLOPES[h] * abs(t - s)),
    "relative_bias": (modifiers.relative_bias(TABLE), lambda x, b, h, t, s: x + TABLE[h, t - s + 6]),
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
        return jattn.attend(query, key, value, implementation=kernel, return_lse=True, **weights, **options)

    return results(query, key, value)


# 1. Truth


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("N", "K"), HEADS)
def test_every_score_is_the_loop(kernel, name, N, K, rng, x64):
    query, key, value = operands(rng, N, K)
    score, single = score_cases(N, rng)[name]
    assert_is_truth(run(kernel, query, key, value, score=score), oracle.attend(query, key, value, score=single))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_the_loop(kernel, name, rng, x64):
    query, key, value = operands(rng)
    mask, allowed = MASKS[name]
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, allowed=allowed)
    assert_is_truth(run(kernel, query, key, value, mask=mask), truth)


@pytest.mark.parametrize("name", MODIFIERS)
def test_every_modifier_is_the_loop(kernel, name, rng, x64):
    query, key, value = operands(rng)
    modifier, modify = MODIFIERS[name]
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, modify=modify)
    assert_is_truth(run(kernel, query, key, value, modifier=modifier), truth)


@pytest.mark.parametrize("per_example", [False, True])
def test_positions_move_what_masks_and_modifiers_see(kernel, per_example, rng, x64):
    query, key, value = operands(rng)
    q_pos, k_pos = rng.integers(0, 7, (B, T)), rng.integers(0, 7, (B, S))
    if not per_example:
        q_pos, k_pos = np.broadcast_to(q_pos[0], (B, T)), np.broadcast_to(k_pos[0], (B, S))
    given = (q_pos, k_pos) if per_example else (q_pos[0], k_pos[0])
    mask = (masks.causal() | masks.padding(LENGTHS)) & masks.mask_mod(lambda b, h, i, j: i != j + 1)
    truth = oracle.attend(
        query, key, value, score=oracle.scaled_dot_product,
        allowed=lambda b, h, t, s: (k_pos[b, s] <= q_pos[b, t] or s < LENGTHS[b]) and q_pos[b, t] != k_pos[b, s] + 1,
        modify=lambda x, b, h, t, s: x - SLOPES[h] * abs(q_pos[b, t] - k_pos[b, s]) + BIAS[b, h, t, s],
    )  # fmt: skip
    modifier = (modifiers.alibi(SLOPES), modifiers.bias(BIAS))
    assert_is_truth(run(kernel, query, key, value, mask=mask, modifier=modifier, positions=given), truth)


def test_gradients_are_the_slopes_of_the_loop(kernel, rng, x64):
    query, key, value = operands(rng, N=2, K=1, H=2, V=2)
    weight, table, cotangent = rng.standard_normal(2), rng.standard_normal(13), rng.standard_normal((B, T, 2, 2))

    def loss(query, key, value, weight, table):
        output, lse = jattn.attend(
            query, key, value,
            score=functools.partial(scores.additive, weight=weight), mask=masks.causal(1),
            modifier=modifiers.relative_bias(table), implementation=kernel, return_lse=True,
        )  # fmt: skip
        return (output * cotangent).sum() + jnp.sin(lse).sum()

    def truth(query, key, value, weight, table):
        output, lse, _ = oracle.attend(
            query, key, value,
            score=lambda q, k, h: float(np.tanh(q + k) @ weight), allowed=lambda b, h, t, s: s <= t + 1,
            modify=lambda x, b, h, t, s: x + table[t - s + 6],
        )  # fmt: skip
        return (output * cotangent).sum() + np.sin(lse).sum()

    arguments = [query, key, value, weight, table]
    came = jax.jit(jax.grad(loss, argnums=range(5)))(*(jnp.asarray(argument) for argument in arguments))
    for index, gradient in enumerate(came):
        slopes = oracle.numerical_gradient(
            lambda moved, index=index: truth(*arguments[:index], moved, *arguments[index + 1 :]), arguments[index]
        )
        np.testing.assert_allclose(gradient, slopes, rtol=1e-7, atol=2e-9)  # see the oracle's step


def test_gradients_through_everything_at_once_are_those_of_the_specification(kernel, rng, x64):
    """Scores, modifiers, masks, positions, dropout and lse together; the parts are held to loops above."""
    query, key, value = operands(rng)
    mask = masks.padding(PER_QUERY) | masks.mask_mod(lambda b, h, i, j: i == j)
    positions = rng.integers(0, 7, (B, T)), rng.integers(0, 7, (B, S))
    cotangents = rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, query, key, value, weight, table, slopes, bias):
        def results(*operands):
            query, key, value, weight, table, slopes, bias = operands
            modifier = (modifiers.alibi(slopes), modifiers.bias(bias), modifiers.relative_bias(table))
            output, lse = jattn.attend(
                query, key, value, score=functools.partial(scores.additive, weight=weight), mask=mask,
                modifier=(*modifier, modifiers.soft_cap(2.0)), positions=positions, dropout_rate=0.3,
                dropout_key=jax.random.key(1), implementation=implementation, return_lse=True,
            )  # fmt: skip
            return output, jnp.where(jnp.isneginf(lse), 0, lse)

        return jax.vjp(results, query, key, value, weight, table, slopes, bias)[1](cotangents)

    parameters = rng.standard_normal((6, H)), TABLE, SLOPES, BIAS[:, :1]
    came, expected = (gradients(name, query, key, value, *parameters) for name in (kernel, "dense"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), came, expected)


def test_gradients_of_forbidden_scores_stay_finite_whatever_a_modifier_makes_of_them(kernel, rng, x64):
    query, key, value = operands(rng)
    divide = loose(lambda x, b, h, i, j: x / (i - j))

    def loss(*operands):
        return jattn.attend(*operands, mask=masks.no_self(), modifier=divide, implementation=kernel).sum()

    assert all(jnp.isfinite(g).all() for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value))


# 2. and 3. Empty and hidden rows


def test_a_query_with_no_allowed_key_gives_zero_and_zero_gradients(kernel, rng, x64):
    query, key, value = operands(rng)
    mask = masks.padding(np.array([0, 3]))

    def loss(*operands):
        output, lse = jattn.attend(*operands, mask=mask, implementation=kernel, return_lse=True)
        return output.sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum(), (output, lse)

    gradients, (output, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    assert (output[0] == 0).all() and jnp.isneginf(lse[0]).all() and jnp.isfinite(lse[1]).all()
    for gradient in gradients:
        assert jnp.isfinite(gradient).all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_hidden_rows_reach_neither_output_nor_gradients(kernel, name, rng, x64):
    query, key, value = operands(rng)
    score, _ = score_cases(6, rng)[name]
    hidden_query = np.arange(T) == 1
    mask = masks.padding(LENGTHS) & masks.dense(~hidden_query[:, None])
    cotangents = (rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6)))

    @jax.jit
    def results(*operands):
        options = {"score": score, "mask": mask, "implementation": kernel, "return_lse": True}
        outputs, pull = jax.vjp(functools.partial(jattn.attend, **options), *operands)
        return outputs, pull(cotangents)

    clean = results(query, key, value)
    for poison in (np.nan, np.inf):
        query[:, hidden_query] = poison
        for b, length in enumerate(LENGTHS):
            key[b, length:] = value[b, length:] = poison
        jax.tree.map(np.testing.assert_array_equal, results(query, key, value), clean)


@pytest.mark.parametrize("low", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_rows_of_large_negative_scores_have_their_gradients(kernel, low, rng):
    """A finite bias in the place of a mask: where all scores of a row have it, they share the weight as without it."""
    query, key, value = operands(rng, dtype=np.float32)
    bias = jnp.zeros((1, 1, T, 1)).at[:, :, :2].set(low)

    def total(value, query):
        return jattn.attend(query, key, value, modifier=modifiers.bias(bias), implementation=kernel)[:, :2].sum()

    gradient = jax.jit(jax.grad(total))(value, np.zeros_like(query))
    np.testing.assert_allclose(gradient, np.full_like(value, 2 * 3 / S), rtol=1e-5)  # 2 rows, 3 heads a key, each 1 / S


def test_a_query_that_is_nan_reaches_no_key_that_it_may_not_see(kernel, rng, x64):
    query, key, value = operands(rng)
    query[:, 1] = np.nan
    allowed = np.arange(S) < 3

    def total(key, value):
        return jattn.attend(query, key, value, mask=jnp.asarray(allowed[None, None, None]), implementation=kernel).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(key, value):
        assert (np.asarray(gradient)[:, 3:] == 0).all()


def test_no_traced_array_outlives_its_trace(kernel, rng):
    query, key, value = operands(rng, dtype=np.float32)

    def total(query, lengths, positions, slope):
        options = {"mask": masks.padding(lengths), "positions": (positions[:T], positions), "implementation": kernel}

        def modifier(score, b, h, i, j):
            return score - slope * jnp.abs(i - j).astype(score.dtype)

        return jattn.attend(query, key, value, modifier=modifier, **options).sum()

    with jax.checking_leaks():
        jax.jit(jax.grad(total, argnums=(0, 3)))(query, jnp.asarray(LENGTHS), jnp.arange(S), jnp.float32(0.5))


def test_a_nan_cotangent_of_an_empty_row_reaches_nothing(kernel, rng, x64):
    query, key, value = operands(rng)

    def loss(*operands):
        output = jattn.attend(*operands, mask=masks.padding(np.array([0, 3])), implementation=kernel)
        return jnp.sqrt(jnp.square(output).sum((-2, -1))).sum()  # its slope at zero is NaN

    assert all(jnp.isfinite(g).all() for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value))


# 4. Any lengths


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (5, 1), (0, 7), (5, 0), (13, 17)])
def test_any_lengths(kernel, T, S, rng, x64):
    query, key, value = operands(rng, T=T, S=S)
    truth = oracle.attend(query, key, value, score=oracle.scaled_dot_product, allowed=lambda b, h, t, s: s <= t)
    assert_is_truth(run(kernel, query, key, value, mask=masks.causal()), truth)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_any_leading_axes(kernel, lead, rng, x64):
    query, key, value = operands(rng, B=math.prod(lead))
    truth = oracle.attend(
        query, key, value, score=oracle.scaled_dot_product, modify=lambda x, b, h, t, s: x * (1 + b) + h
    )
    shaped = [array.reshape(*lead, *array.shape[1:]) for array in (query, key, value)]
    came = run(kernel, *shaped, modifier=loose(lambda x, b, h, i, j: x * (1 + b) + h))
    assert_is_truth([a.reshape(t.shape) for a, t in zip(came, truth, strict=False)], truth)


# 5. and 6. Dtypes and errors


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_accumulates_in_float32(kernel, dtype, rng):
    query, key, value = (jnp.asarray(array, dtype) for array in operands(rng, T=13, S=509))
    output, lse = jattn.attend(query, key, value, implementation=kernel, return_lse=True)
    truth, truth_lse, _ = oracle.attend(query, key, value, score=oracle.scaled_dot_product)
    assert output.dtype == dtype and lse.dtype == jnp.float32
    half_ulp = float(jnp.finfo(dtype).eps) / 2  # only the result is rounded to half precision
    np.testing.assert_allclose(output.astype(jnp.float32), truth, rtol=half_ulp, atol=1e-5)
    np.testing.assert_allclose(lse, truth_lse, rtol=1e-6)


def test_float64_stays_float64(kernel, rng, x64):
    assert {array.dtype for array in run(kernel, *operands(rng))} == {jnp.dtype("float64")}


def test_mixed_dtypes_follow_jax_promotion(kernel, rng):
    query, key, value = operands(rng, dtype=np.float32)
    with jax.numpy_dtype_promotion("standard"):
        output = jattn.attend(query, jnp.asarray(key, jnp.bfloat16), value, implementation=kernel)
    assert output.dtype == jnp.float32


# RMS error against float64 of torch.nn.functional.scaled_dot_product_attention (PyTorch 2.13, CPU, float32) on
# `operands(np.random.default_rng(seed), 3, 3, T=509, S=521, H=61, V=61)`, of the output and of the gradients of
# query, key and value for the cotangent that the same generator draws next, for seeds 0, 1, 2.
TORCH_RMS = (
    (2.759e-08, 3.549e-08, 3.203e-08, 2.895e-08),
    (2.743e-08, 3.513e-08, 3.152e-08, 2.838e-08),
    (2.745e-08, 3.529e-08, 3.191e-08, 2.921e-08),
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_errors_are_at_most_twice_those_of_pytorch(kernel, seed, monkeypatch):
    monkeypatch.setattr(grid, "ROWS", 128)
    monkeypatch.setattr(grid, "COLUMNS", (128, 128))
    rng = np.random.default_rng(seed)
    arrays = operands(rng, 3, 3, T=509, S=521, H=61, V=61, dtype=np.float32)
    cotangent = rng.standard_normal((B, 509, 3, 61)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def results(implementation, cotangent, *arrays):
        output, pull = jax.vjp(functools.partial(jattn.attend, implementation=implementation), *arrays)
        return output, *pull(cotangent)

    came = results(kernel, cotangent, *arrays)
    with jax.enable_x64(True):  # the dense kernel in float64 is held to the loops above
        truth = results("dense", cotangent.astype(np.float64), *(array.astype(np.float64) for array in arrays))
    for a, b, torch_rms in zip(came, truth, TORCH_RMS[seed], strict=True):
        error = float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b)) ** 2)))
        ulp = float(np.spacing(np.float32(np.abs(b).max())))
        assert error <= max(2 * torch_rms, 4 * ulp)


# 7. Transformations


def test_jit_vmap_and_a_loop_agree(kernel, rng, x64):
    query, key, value = operands(rng)
    attend = functools.partial(jattn.attend, implementation=kernel)

    def one(query, key, value, length):
        return attend(query, key, value, mask=masks.padding(length) & masks.causal(1))

    batched = jax.jit(attend)(query, key, value, mask=masks.padding(LENGTHS) & masks.causal(1))
    mapped = jax.jit(jax.vmap(one))(query, key, value, LENGTHS)
    single = jax.jit(one)
    looped = jnp.stack([single(*example) for example in zip(query, key, value, LENGTHS, strict=True)])
    np.testing.assert_allclose(mapped, batched, rtol=1e-12)
    np.testing.assert_allclose(looped, batched, rtol=1e-12)


@pytest.mark.parametrize("mapped", ["query", "key", "value", "length", "slopes"])
def test_vmap_over_one_operand_with_gradients(kernel, mapped, rng, x64):
    query, key, value = operands(rng, B=1)
    shared = {"query": query[0], "key": key[0], "value": value[0], "length": np.int32(4), "slopes": SLOPES}
    batch = {**shared, mapped: np.stack([shared[mapped], shared[mapped] + 1, shared[mapped] - 1])}

    def loss(query, key, value, length, slopes):
        mask, modifier = (
            masks.padding(length),
            (modifiers.alibi(slopes), loose(lambda x, b, h, i, j: x + slopes[h] * length)),
        )
        return jnp.sin(jattn.attend(query, key, value, mask=mask, modifier=modifier, implementation=kernel)).sum()

    def gradient(*arguments):
        return jax.grad(loss, argnums=(0, 1, 2, 4))(*arguments)

    in_axes = tuple(0 if name == mapped else None for name in shared)
    together = jax.jit(jax.vmap(gradient, in_axes))(*batch.values())
    one = jax.jit(gradient)
    for index in range(3):
        single = one(*({**shared, mapped: batch[mapped][index]}).values())
        jax.tree.map(
            lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-11, atol=1e-13), together, single
        )


def test_nested_vmap(kernel, rng, x64):
    query, key, value = operands(rng, B=6)
    lengths = rng.integers(1, S + 1, 6)

    def one(query, key, value, length):
        return jattn.attend(query, key, value, mask=masks.padding(length), implementation=kernel)

    shaped = [array.reshape(2, 3, *array.shape[1:]) for array in (query, key, value, lengths)]
    nested = jax.jit(jax.vmap(jax.vmap(one)))(*shaped).reshape(6, T, 6, V)
    flat = jattn.attend(query, key, value, mask=masks.padding(lengths), implementation=kernel)
    np.testing.assert_allclose(nested, flat, rtol=1e-12)


def test_captured_float_and_integer_tracers(kernel, rng, x64):
    """grad of jit, jit of grad, grad of vmap, scan and checkpoint, with callables that close over traced values."""
    query, key, value = operands(rng, B=1)
    query, key, value = query[0], key[0], value[0]

    def loss(slope, length, query):
        return jnp.sin(
            jattn.attend(
                query, key, value,
                mask=loose(lambda b, h, i, j: j < length),
                modifier=loose(lambda x, b, h, i, j: x * slope + slope * (i - j)),
                score=lambda q, k: jnp.einsum("...th,...sh->...ts", q, k) * slope,
                implementation=kernel,
            )
        ).sum()  # fmt: skip

    slopes, lengths = np.array([0.3, 0.7, 1.1]), np.array([1, 4, 7])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 2)))
    expected = [gradient(slope, length, query) for slope, length in zip(slopes, lengths, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    jitted = jax.jit(loss)
    for transformed in (
        jax.vmap(jax.jit(gradient), (0, 0, None)),
        jax.vmap(jax.grad(jitted, argnums=(0, 2)), (0, 0, None)),
        jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 2)), (0, 0, None)),
        lambda s, n, q: jax.lax.scan(lambda c, x: (c, gradient(*x, q)), 0, (s, n))[1],
        lambda s, n, q: jax.lax.map(lambda x: gradient(*x, q), (s, n)),
    ):
        came = jax.jit(transformed)(slopes, lengths, query)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), came, stacked)


def test_a_checkpoint_policy_can_keep_output_and_lse(kernel, rng, capsys):
    query, key, value = operands(rng, dtype=np.float32)

    def loss(query):
        output, lse = jattn.attend(query, key, value, implementation=kernel, return_lse=True)
        return jnp.sin(output).sum() + jnp.sin(lse).sum()

    policy = jax.checkpoint_policies.save_only_these_names("attend_output", "attend_lse")
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), query)
    saved = capsys.readouterr().out
    assert "named 'attend_output'" in saved and "named 'attend_lse'" in saved


def test_a_sharded_batch_agrees(kernel, rng):
    if kernel == "blockwise" and grid.one_cpu_device():
        pytest.skip("one device has nothing to share a batch with")
    query, key, value = operands(rng, dtype=np.float32)
    mask = masks.padding(jnp.asarray(LENGTHS))
    attend = jax.jit(functools.partial(jattn.attend, implementation=kernel))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    sharded = attend(
        *(jax.device_put(array, sharding) for array in (query, key, value)), mask=jax.device_put(mask, sharding)
    )
    assert sharded.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_allclose(sharded, attend(query, key, value, mask=mask), rtol=1e-6)


def test_explicit_meshes_and_shard_map_work_or_are_refused_by_name(kernel, rng):
    query, key, value = operands(rng, dtype=np.float32)
    expected = jattn.attend(query, key, value, implementation=kernel)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("batch")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, jax.sharding.NamedSharding(mesh, spec)) for array in (query, key, value)]
        mapped = jax.shard_map(jattn.attend, in_specs=(spec,) * 3, out_specs=spec)
        for function in (jax.jit(jattn.attend), jax.jit(mapped)):
            np.testing.assert_allclose(function(*placed), expected, rtol=1e-5, atol=1e-6)
        if kernel == "blockwise":
            by_name = functools.partial(jattn.attend, implementation=kernel)
            with pytest.raises(NotImplementedError, match="explicit axes"):
                jax.jit(by_name)(*placed)
            with pytest.raises(NotImplementedError, match="shard_map"):
                jax.jit(jax.shard_map(by_name, in_specs=(spec,) * 3, out_specs=spec))(*placed)


def test_one_trace_serves_many_calls(kernel, rng):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(query, key, value, mask):
        return jattn.attend(query, key, value, mask=mask, implementation=kernel)

    for lengths in (LENGTHS, LENGTHS - 1, LENGTHS - 2):
        attend(*operands(rng, dtype=np.float32), masks.padding(lengths) & masks.causal())


# 8. Dropout


def test_dropout_drops_what_the_shared_pattern_says(kernel, rng, x64):
    """Against the oracle's weights and the one definition of the bits, whatever blocks the kernel works in."""
    from jattn.functional.blocks import Block
    from jattn.kernels.dropout import random_bits

    query, key, value = operands(rng, T=13, S=17)
    random_key = jax.random.key(3)
    _, _, weights = oracle.attend(query, key, value, score=oracle.scaled_dot_product)
    bits = np.asarray(random_bits(random_key, Block((B,), 6, (0, 13), (0, 17))))
    dropped = np.where(bits >= 0.3 * 2**32, weights / 0.7, 0)
    truth = np.einsum("bnts,bsnv->btnv", dropped, np.repeat(value, 3, axis=2))
    output = jattn.attend(query, key, value, dropout_rate=0.3, dropout_key=random_key, implementation=kernel)
    np.testing.assert_allclose(output, truth, rtol=1e-12, atol=1e-13)


# 10. Reductions


def attend_and_gradients(kernel, query, key, value, **options):
    def loss(*operands):
        return jnp.sin(jattn.attend(*operands, implementation=kernel, **options)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)


@pytest.mark.parametrize(
    "mask", [masks.sliding_window(T + S, T + S), masks.dense(np.ones((1, 1), bool)), masks.causal(S)], ids=repr
)
def test_a_mask_that_allows_all_is_no_mask(kernel, mask, rng, x64):
    arrays = operands(rng)
    came, plain = (attend_and_gradients(kernel, *arrays, mask=each) for each in (mask, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), came, plain)


def test_grouped_heads_are_repeated_heads(kernel, rng, x64):
    query, key, value = operands(rng, 6, 2)
    repeated = [jattn.heads.repeat_kv(array, 6) for array in (key, value)]
    grouped = jattn.attend(query, key, value, implementation=kernel)
    np.testing.assert_allclose(grouped, jattn.attend(query, *repeated, implementation=kernel), rtol=1e-12)


def test_merging_the_halves_of_the_keys_is_the_whole(kernel, rng, x64):
    query, key, value = operands(rng)
    mask = masks.dense(ARRAY)

    def halves(query, key, value):
        parts = []
        for start, stop in ((0, 3), (3, 7)):
            part = masks.dense(ARRAY[..., start:stop])
            rows = key[:, start:stop], value[:, start:stop]
            parts.append(jattn.attend(query, *rows, mask=part, implementation=kernel, return_lse=True))
        return jattn.merge(parts)

    def whole(query, key, value):
        return jattn.attend(query, key, value, mask=mask, implementation=kernel, return_lse=True)

    cotangents = (rng.standard_normal((B, T, 6, V)), rng.standard_normal((B, T, 6)))

    def results(function, *operands):
        outputs, pull = jax.vjp(function, *operands)
        return outputs, pull(cotangents)

    merged, plain = (jax.jit(functools.partial(results, function))(query, key, value) for function in (halves, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), merged, plain)


def test_a_constant_score_is_average_pooling(kernel, rng, x64):
    query, key, value = operands(rng, 3, 3)
    output = jattn.attend(query, key, value, score=scores.constant, implementation=kernel)
    np.testing.assert_allclose(output, np.broadcast_to(value.mean(1, keepdims=True), output.shape), rtol=1e-12)
