"""Rotary positions: complex numbers, the papers' formulas, and transformers far out."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import positions, ropes

FLOAT32_ROUNDING = 2.0**-24  # half an ulp of numbers below 1
H = 16
FACTORS = tuple(1 + n / 10 for n in range(H // 2))
ROPES = {
    "default": ropes.Rope(),
    "base": ropes.Rope(500000.0),
    "linear": ropes.Linear(factor=4.0),
    "dynamic": ropes.Dynamic(factor=4.0, max_length=64),
    "llama3": ropes.Llama3(500000.0, factor=8.0, original_length=512),
    "yarn": ropes.Yarn(factor=4.0, original_length=64),
    "yarn not rounded": ropes.Yarn(150000.0, factor=8.0, original_length=64, truncate=False),
    "longrope": ropes.LongRope(
        short_factors=FACTORS, long_factors=FACTORS[::-1], original_length=64, factor=8.0
    ),
}
# What transformers calls them
PARAMETERS = {
    "default": {"rope_type": "default"},
    "base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn not rounded": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1],
        "factor": 8.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def plain(base=10000.0):
    return np.array([base ** (-2 * j / H) for j in range(H // 2)])


def of_llama3(w):
    wavelength, low, high = 2 * math.pi / w, 512 / 1.0, 512 / 4.0
    if wavelength < high:
        return w
    if wavelength > low:
        return w / 8
    smooth = (512 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * w / 8 + smooth * w


def of_yarn(base, factor, truncate):
    def pair(turns):
        return H * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(32), pair(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    ramp = [min(max((j - low) / (high - low), 0), 1) for j in range(H // 2)]
    return [r * w / factor + (1 - r) * w for r, w in zip(ramp, plain(base), strict=True)]


LONG = 1000
FORMULAS = {  # the papers' formulas in float64, for a short sequence and one of LONG
    "default": (plain(), plain()),
    "base": (plain(500000.0), plain(500000.0)),
    "linear": (plain() / 4, plain() / 4),
    "dynamic": (plain(), plain(10000.0 * (4 * LONG / 64 - 3) ** (H / (H - 2)))),
    "llama3": (list(map(of_llama3, plain(500000.0))),) * 2,
    "yarn": (of_yarn(10000.0, 4, True),) * 2,
    "yarn not rounded": (of_yarn(150000.0, 8, False),) * 2,
    "longrope": (plain() / FACTORS, plain() / FACTORS[::-1]),
}
SCALES = {
    "yarn": 0.1 * math.log(4) + 1,
    "yarn not rounded": 0.1 * math.log(8) + 1,
    "longrope": math.sqrt(1 + math.log(8) / math.log(64)),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_the_paper(name):
    rope = ROPES[name]
    for length, expected in zip((None, LONG), FORMULAS[name], strict=True):
        found = rope.frequencies(H, length)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        traced = jax.jit(lambda n: jnp.asarray(rope.frequencies(H, n)))(length or 1)
        np.testing.assert_allclose(traced, expected, rtol=2e-6)
    assert rope.scale == pytest.approx(SCALES.get(name, 1.0), rel=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_length_of_each_example_chooses_its_own_frequencies(name):
    """M itself is still short; one beyond is long."""
    rope = ROPES[name]
    found = rope.frequencies(H, np.array([1, 64, 65, LONG]))
    for row, length in zip(found, (1, 64, 65, LONG), strict=True):
        np.testing.assert_array_equal(row, rope.frequencies(H, length))
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_without_a_length_it_is_that_of_the_positions(name, rng):
    x = rng.standard_normal((2, 5, 1, H)).astype(np.float32)
    own = np.array([[0, 1, 2, 3, 4], [96, 97, 98, 99, 100]])
    found = positions.rotary(x, own, rope=ROPES[name])
    for b, length in enumerate((5, 101)):
        alone = positions.rotary(x[b], own[b], rope=ROPES[name], length=length)
        np.testing.assert_array_equal(found[b], alone)
    given = positions.rotary(x, own, rope=ROPES[name], length=np.array([101, 5]))
    assert not np.allclose(given, found)


@pytest.mark.parametrize("name", ROPES)
def test_ropes_are_values(name):
    rope = ROPES[name]
    same = pickle.loads(pickle.dumps(rope))
    assert same == rope and hash(same) == hash(rope) and repr(rope).startswith(type(rope).__name__)


@pytest.mark.torch
@pytest.mark.parametrize("first", [0, 50, 99_990])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_is_that_of_transformers(name, first, rng):
    """Its frequencies to their last bit; turned by the same ones, queries to float32's rounding."""
    torch, llama = pytest.importorskip("torch"), pytest.importorskip("transformers.models.llama")
    parameters = {"rope_theta": 10000.0} | PARAMETERS[name]
    config = llama.LlamaConfig(
        hidden_size=2 * H, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters=parameters,
    )  # fmt: skip
    theirs = llama.modeling_llama.LlamaRotaryEmbedding(config)
    x = rng.standard_normal((1, 11, 2, H)).astype(np.float32)
    own = np.arange(first, first + 11)
    heads = torch.tensor(x).transpose(1, 2)
    cos, sin = theirs(heads, torch.tensor(own)[None])
    expected, _ = llama.modeling_llama.apply_rotary_pos_emb(heads, heads, cos, sin)
    expected, frequencies = expected.transpose(1, 2).numpy(), theirs.inv_freq.numpy()
    np.testing.assert_allclose(ROPES[name].frequencies(H, own[-1] + 1), frequencies, rtol=3e-7)
    scaled = x * np.float32(ROPES[name].scale)
    same = positions.rotary(scaled, own, rope=frequencies)
    np.testing.assert_allclose(same, expected, rtol=0, atol=2e-6)
    # A bit of a frequency is an angle of 2^−23 · position
    found = positions.rotary(x, own, rope=ROPES[name])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 + 2e-6 * own[-1])


@pytest.mark.parametrize("interleaved", [True, False])
def test_features_beyond_the_rotated_ones_stay(interleaved, rng):
    x = rng.standard_normal((5, 2, H)).astype(np.float32)
    found = positions.rotary(x, features=6, interleaved=interleaved)
    np.testing.assert_array_equal(found[..., 6:], x[..., 6:])
    alone = positions.rotary(x[..., :6], interleaved=interleaved)
    np.testing.assert_array_equal(found[..., :6], alone)
    by_array = positions.rotary(x, rope=ropes.Rope().frequencies(6), interleaved=interleaved)
    np.testing.assert_array_equal(by_array, found)


def test_each_axis_of_an_image_turns_its_own_pairs(rng):
    """Neighbouring pairs: the two axes are two halves of a head."""
    x = rng.standard_normal((2, 6, 1, 8)).astype(np.float32)
    rows, columns = np.divmod(np.arange(6), 3)
    found = positions.rotary(x, (rows, columns), interleaved=True)
    first = positions.rotary(x[..., :4], rows, interleaved=True)
    second = positions.rotary(x[..., 4:], columns, interleaved=True)
    np.testing.assert_array_equal(found, np.concatenate([first, second], -1))
    own = ropes.Rope().frequencies(8)[::2], ropes.Rope().frequencies(8)[1::2]
    assert not np.allclose(positions.rotary(x, (rows, columns), rope=own, interleaved=True), found)


@pytest.mark.torch
def test_two_axes_are_those_of_qwen2_vision(rng):
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    x = rng.standard_normal((6, 2, H)).astype(np.float32)
    rows, columns = np.divmod(np.arange(6), 3)
    frequencies = ropes.Rope().frequencies(H // 2)
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], -1)
    angles = torch.tensor(np.concatenate([angles, angles], -1).astype(np.float32))
    expected, _ = qwen.apply_rotary_pos_emb_vision(
        torch.tensor(x), torch.tensor(x), angles.cos(), angles.sin()
    )
    found = positions.rotary(x, (rows, columns))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)


def test_gradients_reach_frequencies(x64, rng):
    x, own = rng.standard_normal((5, 1, 4)), np.arange(5)

    def loss(frequencies):
        return (positions.rotary(x, own, rope=frequencies) ** 3).sum()

    frequencies, step = jnp.array([1.0, 0.25]), 1e-3  # angles are float32
    gradient = jax.grad(loss)(frequencies)
    for j in range(2):
        shift = np.eye(2)[j] * step
        found = (loss(frequencies + shift) - loss(frequencies - shift)) / (2 * step)
        np.testing.assert_allclose(gradient[j], found, rtol=2e-3)


def rotated(x, position, interleaved, base=10000.0):
    """One head vector as complex numbers: pair j turns by position · base^(−2j/H) in float32."""
    width = len(x)
    first, second = (x[0::2], x[1::2]) if interleaved else (x[: width // 2], x[width // 2 :])
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = 1 / (base ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.float64(np.float32(position) * frequencies)
    turned = (first + 1j * second) * np.exp(1j * angles)
    out = np.empty(width)
    if interleaved:
        out[0::2], out[1::2] = turned.real, turned.imag
    else:
        out[: width // 2], out[width // 2 :] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
def test_rotary_turns_pairs_as_complex_numbers(interleaved, per_example, rng):
    B, T, N, H = 2, 5, 3, 6
    x = rng.standard_normal((B, T, N, H)).astype(np.float32)
    own = rng.integers(0, 100_000, (B, T) if per_example else T)
    came = positions.rotary(x, own, interleaved=interleaved)
    for b, t, n in np.ndindex(B, T, N):
        truth = rotated(
            x[b, t, n].astype(np.float64), own[b, t] if per_example else own[t], interleaved
        )
        np.testing.assert_allclose(
            came[b, t, n], truth, rtol=0, atol=6 * FLOAT32_ROUNDING * np.abs(x).max()
        )
    default = positions.rotary(x, interleaved=interleaved)
    np.testing.assert_array_equal(
        default, positions.rotary(x, np.arange(T), interleaved=interleaved)
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_scores_depend_on_the_offset_alone(interleaved, rng, x64):
    query, key = rng.standard_normal((2, 1, 1, 8))
    turn = functools.partial(positions.rotary, interleaved=interleaved)

    def score(i, j):
        return float(jnp.vdot(turn(query, np.array([i])), turn(key, np.array([j]))))

    for offset in (-3, 0, 11):
        expected = score(100 + offset, 100)
        for j in (7, 5003):  # the angles of a score are two float32 products
            bound = 2 * 2 * FLOAT32_ROUNDING * (j + 11) * abs(query).max() * abs(key).max() * 8
            assert score(j + offset, j) == pytest.approx(expected, abs=bound)
    assert score(3, 0) != pytest.approx(score(0, 3), abs=1e-3)
    assert score(5, 5) == pytest.approx(float(jnp.vdot(query, key)), abs=1e-12)


def test_half_rotation_is_interleaved_rotation_of_permuted_features(rng, x64):
    x = rng.standard_normal((5, 3, 8))
    order = np.arange(8).reshape(2, 4).T.ravel()
    pairs = positions.rotary(x[..., order], interleaved=True)
    np.testing.assert_array_equal(pairs[..., np.argsort(order)], positions.rotary(x))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rotary_of_half_precision_rounds_once(dtype, rng):
    x = jnp.asarray(rng.standard_normal((5, 3, 8)), dtype)
    came = positions.rotary(x)
    exact = positions.rotary(x.astype(jnp.float32))
    assert came.dtype == dtype
    np.testing.assert_array_equal(came.astype(jnp.float32), exact.astype(dtype).astype(jnp.float32))


def test_rotary_under_jit_vmap_and_grad(rng, x64):
    x, own = rng.standard_normal((2, 5, 3, 4)), np.array([[0, 1, 2, 3, 4], [4, 0, 11, 2, 3]])
    whole = positions.rotary(x, own)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(positions.rotary))(x, own), whole, rtol=1e-12, atol=1e-14
    )
    _, pull = jax.vjp(lambda x: positions.rotary(x, own), x)
    # A rotation's transpose undoes it
    np.testing.assert_allclose(pull(whole)[0], x, rtol=1e-12, atol=1e-14)


X = np.zeros((5, 1, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"multiple of 2 .*H = 3; got 3", lambda: positions.rotary(X[..., :3])),
        (ValueError, r"up to .*H = 4; got 6", lambda: positions.rotary(X, features=6)),
        (ValueError, r"x must be \[..., T, N, H\]", lambda: positions.rotary(X[0])),
        (TypeError, "x must be floating point", lambda: positions.rotary(X.astype(int))),
        (ValueError, r"positions must be .*got \(7,\)", lambda: positions.rotary(X, np.arange(7))),
        (ValueError, r"positions must be .*got \(\)", lambda: positions.rotary(X, 5)),
        (
            ValueError,
            r"positions must be .*got \(1, 5\)",
            lambda: positions.rotary(np.stack([X, X]), np.zeros((1, 5), int)),
        ),
        (
            ValueError,
            "multiple of 6 .*3 axes.*got 4",
            lambda: positions.rotary(X, (np.arange(5),) * 3),
        ),
        (
            ValueError,
            "one entry for each axis, 1, got 2",
            lambda: positions.rotary(X, rope=(ropes.Rope(), ropes.Rope())),
        ),
        (
            ValueError,
            "features = 2, but the frequencies are of 4",
            lambda: positions.rotary(X, rope=np.ones(2, np.float32), features=2),
        ),
        (ValueError, "base must be a number above 1, got 0", lambda: ropes.Rope(0)),
        (ValueError, "factor must be a number above 0, got -1", lambda: ropes.Linear(factor=-1)),
        (
            ValueError,
            "high_frequency_factor must be a number above 2, got 1",
            lambda: ropes.Llama3(low_frequency_factor=2, high_frequency_factor=1),
        ),
        (ValueError, "of one length, got 1 and 2", lambda: ropes.LongRope(1e4, (1.0,), (1.0, 2.0))),
        (
            ValueError,
            "factors of 1 pairs, got 4 features",
            lambda: positions.rotary(X, rope=ropes.LongRope(1e4, (1.0,), (1.0,))),
        ),
        (
            ValueError,
            "at least 4 features, got 2",
            lambda: positions.rotary(X, rope=ropes.Dynamic(), features=2),
        ),
        (
            ValueError,
            r"frequencies \[J\] or .*leading axes \(\), got shape \(7, 2\)",
            lambda: positions.rotary(X, rope=np.ones((7, 2), np.float32)),
        ),
        (
            ValueError,
            r"length must be one integer or .*got shape \(5,\)",
            lambda: positions.rotary(X, rope=ropes.Dynamic(), length=np.full(5, 3)),
        ),
        (TypeError, "length must be integers", lambda: positions.rotary(X, length=2.5)),
        (ValueError, "length must lie in 0 … ", lambda: positions.rotary(X, length=-5)),
        (TypeError, "rope must be floating point", lambda: positions.rotary(X, rope="default")),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
