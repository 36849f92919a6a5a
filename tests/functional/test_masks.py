"""Masks.

Each against a loop, the laws of the algebra, sound classification, drawing, pytree behaviour,
errors.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks
from jattn.functional.block import EMPTY, FULL, PARTIAL, Block

B, N, T, S = 2, 3, 5, 7
LENGTHS = np.array([0, 4])
PER_QUERY = np.array([[0, 1, 2, 5, 7], [7, 3, 3, 0, 1]])
Q_IDS = np.array([[0, 0, 1, 1, 4], [2, 2, 2, 3, 3]])
K_IDS = np.array([[0, 0, 0, 1, 1, 1, 4], [3, 3, 2, 2, 1, 1, 1]])
OFFSETS, WIDTHS = np.array([-2, 3]), np.array([1, 4])
ARRAY = np.random.default_rng(1).random((B, N, T, S)) < 0.5


def bounds(q_low, q_high, k_low, k_high):
    """Of the mask j ≥ 2 i."""
    return jnp.where(k_high < 2 * q_low, EMPTY, jnp.where(k_low >= 2 * q_high, FULL, PARTIAL))


# name -> (mask, the same on single entries with slots t, s and positions i, j)
CASES = {
    "causal": (masks.causal(), lambda b, h, t, s, i, j: j <= i),
    "causal, offset": (masks.causal(-2), lambda b, h, t, s, i, j: j <= i - 2),
    "causal, each": (masks.causal(OFFSETS), lambda b, h, t, s, i, j: j <= i + OFFSETS[b]),
    "window": (masks.sliding_window(2, 1), lambda b, h, t, s, i, j: i - 2 <= j <= i + 1),
    "window ahead": (masks.sliding_window(-1, 2), lambda b, h, t, s, i, j: i + 1 <= j <= i + 2),
    "window, each": (
        masks.sliding_window(WIDTHS, 0),
        lambda b, h, t, s, i, j: i - WIDTHS[b] <= j <= i,
    ),
    "padding": (masks.padding(LENGTHS), lambda b, h, t, s, i, j: s < LENGTHS[b]),
    "padding per query": (masks.padding(PER_QUERY), lambda b, h, t, s, i, j: s < PER_QUERY[b, t]),
    "prefix": (masks.prefix_lm(LENGTHS), lambda b, h, t, s, i, j: j <= i or s < LENGTHS[b]),
    "segments": (masks.segments(Q_IDS, K_IDS), lambda b, h, t, s, i, j: Q_IDS[b, t] == K_IDS[b, s]),
    "no self": (masks.no_self(), lambda b, h, t, s, i, j: i != j),
    "dense": (masks.from_array(ARRAY), lambda b, h, t, s, i, j: ARRAY[b, h, t, s]),
    "dense, shared": (masks.from_array(ARRAY[0, 0]), lambda b, h, t, s, i, j: ARRAY[0, 0, t, s]),
    "dense, keys": (masks.from_array(ARRAY[:, :1, :1]), lambda b, h, t, s, i, j: ARRAY[b, 0, 0, s]),
    "dense, heads": (
        masks.from_array(ARRAY[0, :, :, :1]),
        lambda b, h, t, s, i, j: ARRAY[0, h, t, 0],
    ),
    "callable": (
        masks.mask_mod(lambda b, h, q_idx, k_idx: (q_idx + 2 * k_idx + h + b) % 3 > 0),
        lambda b, h, t, s, i, j: (i + 2 * j + h + b) % 3 > 0,
    ),
    "bounded": (
        masks.mask_mod(lambda b, h, q_idx, k_idx: k_idx >= 2 * q_idx, bounds),
        lambda b, h, t, s, i, j: j >= 2 * i,
    ),
    "algebra": (
        masks.causal(1) & ~masks.no_self() | masks.padding(LENGTHS) & ~masks.segments(Q_IDS, K_IDS),
        lambda b, h, t, s, i, j: (
            (j <= i + 1 and i == j) or (s < LENGTHS[b] and Q_IDS[b, t] != K_IDS[b, s])
        ),
    ),
}
BLOCKS = [
    ((0, 5), (0, 7)),
    ((0, 2), (0, 3)),
    ((2, 3), (4, 3)),
    ((1, 1), (6, 1)),
    ((3, 2), (0, 7)),
    ((0, 1), (2, 2)),
]


def loop(single, q_pos=None, k_pos=None):
    """`[B, N, T, S]`, entry by entry."""
    q_pos = np.broadcast_to(np.arange(T), (B, T)) if q_pos is None else q_pos
    k_pos = np.broadcast_to(np.arange(S), (B, S)) if k_pos is None else k_pos
    entries = [
        single(b, h, t, s, q_pos[b, t], k_pos[b, s]) for b, h, t, s in np.ndindex(B, N, T, S)
    ]
    return np.array(entries, bool).reshape(B, N, T, S)


@pytest.mark.parametrize("name", CASES)
def test_to_array_is_the_loop(name):
    mask, single = CASES[name]
    array = mask.to_array(T, S, batch=(B,), num_heads=N)
    assert array.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(array, (B, N, T, S)), loop(single))


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_a_function_of_scalars(name):
    mask, single = CASES[name]
    entry = jax.jit(jax.vmap(lambda b, h, t, s: mask(b, h, t, s)))
    indices = np.indices((B, N, T, S)).reshape(4, -1)
    # An array that differs between heads but not between examples: T = 5 is no batch axis
    if name == "dense, heads":
        assert bool(mask(0, 1, 2, 0)) == bool(ARRAY[0, 1, 2, 0])
    np.testing.assert_array_equal(entry(*indices).reshape(B, N, T, S), loop(single))
    assert mask(1, 0, 3, 2).shape == () and mask(1, 0, 3, 2).dtype == bool


def test_what_to_array_keeps_of_the_leading_axes():
    assert masks.causal().to_array(T, S).shape == (T, S)
    assert masks.padding(np.array(3)).to_array(T, S).shape == (T, S)
    assert masks.padding(LENGTHS).to_array(T, S).shape == (B, 1, T, S)
    assert masks.from_array(ARRAY).to_array(T, S, num_heads=N).shape == (B, N, T, S)
    assert masks.causal().to_array(0, 3).shape == (0, 3) and masks.causal().to_array(
        3, 0
    ).shape == (3, 0)
    two = masks.padding(np.array([[1, 2], [3, 4]])).to_array(T, S, batch=(2, 2))
    assert two.shape == (2, 2, 1, T, S) and [
        int(row.sum()) for row in two[:, :, 0, 0].reshape(4, S)
    ] == [1, 2, 3, 4]


# Algebra


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("causal", "padding per query"),
        ("padding", "window"),
        ("dense", "callable"),
        ("segments", "no self"),
    ],
)
def test_laws_of_the_algebra(left, right):
    a, b = CASES[left][0], CASES[right][0]
    A, C = loop(CASES[left][1]), loop(CASES[right][1])

    @jax.jit
    def arrays(a, b):
        combined = [
            a & b,
            a | b,
            ~a,
            ~(a & b),
            ~a | ~b,
            ~(a | b),
            ~a & ~b,
            ~~a,
            a & (a | b),
            a | a & b,
            a & ~a,
            a | ~a,
        ]
        return [mask.to_array(T, S, batch=(B,), num_heads=N) for mask in combined]

    expected = [
        A & C,
        A | C,
        ~A,
        ~(A & C),
        ~(A & C),
        ~(A | C),
        ~(A | C),
        A,
        A,
        A,
        A & False,
        A | True,
    ]
    for came, truth in zip(arrays(a, b), expected, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(came, truth.shape), truth)


def test_prefix_lm_is_causal_or_padding():
    prefix, combined = masks.prefix_lm(LENGTHS), masks.causal() | masks.padding(LENGTHS)
    np.testing.assert_array_equal(prefix.to_array(T, S), combined.to_array(T, S))


# Classification: EMPTY means that nothing is allowed, FULL that everything is


# The others know every block exactly, with slots as positions
IN_DOUBT = {"segments", "callable", "algebra"}


def assert_sound(kinds, allowed):
    """`allowed [B, N, rows, columns]` is the truth of a block; returns its kinds `[B, N]`."""
    kinds = np.broadcast_to(kinds, (B, N, 1, 1))[..., 0, 0]
    assert set(np.unique(kinds)) <= {EMPTY, PARTIAL, FULL}
    assert not allowed[kinds == EMPTY].any()
    assert allowed[kinds == FULL].all()
    return kinds


@pytest.mark.parametrize("name", CASES)
def test_classification_is_sound_on_every_block(name):
    mask, single = CASES[name]
    truth = loop(single)
    whole = jax.jit(
        lambda mask: [mask.classify(Block((B,), N, rows, columns)) for rows, columns in BLOCKS]
    )(mask)
    for kinds, (rows, columns) in zip(whole, BLOCKS, strict=True):
        part = truth[:, :, rows[0] : sum(rows), columns[0] : sum(columns)]
        kinds = assert_sound(kinds, part)
        if name not in IN_DOUBT:
            exact = np.where(part.all((-2, -1)), FULL, np.where(part.any((-2, -1)), PARTIAL, EMPTY))
            np.testing.assert_array_equal(kinds, exact)


@pytest.mark.parametrize(
    ("name", "per_example"),
    [*((name, True) for name in CASES), ("window", False), ("algebra", False)],
)
def test_classification_and_rule_follow_positions_and_traced_starts(name, per_example):
    mask, single = CASES[name]
    draw = np.random.default_rng(5)
    q_pos = np.sort(draw.integers(0, 9, (B, T) if per_example else T), -1)
    k_pos = draw.permuted(draw.integers(0, 9, (B, S) if per_example else S), axis=-1)
    truth = loop(single, np.broadcast_to(q_pos, (B, T)), np.broadcast_to(k_pos, (B, S)))

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def both(mask, row, column, rows, columns):
        block = Block(
            (B,), N, (row, rows), (column, columns), (jnp.asarray(q_pos), jnp.asarray(k_pos))
        )
        return jnp.broadcast_to(mask.rule(block), (B, N, rows, columns)), mask.classify(block)

    for row, column in [(0, 0), (3, 4), (1, 2), (2, 0)]:
        allowed, kinds = both(mask, row, column, 2, 3)
        part = truth[:, :, row : row + 2, column : column + 3]
        np.testing.assert_array_equal(allowed, part)
        assert_sound(kinds, part)


@pytest.mark.parametrize("name", CASES)
def test_one_example_and_head_of_a_block_are_those_of_the_whole(name):
    mask, single = CASES[name]
    truth = loop(single)

    @jax.jit
    def both(mask, b, h):
        block = Block((B,), N, (1, 3), (2, 4), examples=(b, 1), head=h)
        return jnp.broadcast_to(mask.rule(block), block.shape), mask.classify(block)

    for b, h in np.ndindex(B, N):
        allowed, kind = both(mask, b, h)
        part = truth[b, h, 1:4, 2:6]
        np.testing.assert_array_equal(allowed[0, 0], part)
        assert kind.size == 1 and (kind != EMPTY or not part.any()) and (kind != FULL or part.all())


def test_classification_of_the_algebra():
    """& is the minimum, | the maximum, ~ swaps the ends."""
    block = Block((), 1, (0, 2), (5, 2))  # beyond the diagonal: causal is EMPTY
    causal, near = masks.causal(), masks.padding(np.array(6))  # near cuts the block: PARTIAL
    for mask, kind in [
        (causal, EMPTY), (~causal, FULL), (near, PARTIAL), (~near, PARTIAL), (causal & near, EMPTY),
        (causal | near, PARTIAL), (~causal & near, PARTIAL), (~causal | near, FULL),
        (~(~causal | near), EMPTY), (masks.mask_mod(lambda b, h, i, j: i < j), PARTIAL),
    ]:  # fmt: skip
        assert int(mask.classify(block).squeeze()) == kind, mask


# Drawing


def test_draw_shows_rows_as_queries():
    assert masks.sliding_window(1, 2).draw(2, 5) == "█ █ █ · ·\n█ █ █ █ ·"
    assert str(masks.causal() & ~masks.no_self()).splitlines()[:3] == [
        "causal() & ~no_self()", "█ · · · · · · ·", "· █ · · · · · ·",
    ]  # fmt: skip


def test_draw_picks_the_example_and_the_head():
    padding = masks.padding(np.array([1, 3]))
    assert padding.draw(1, 4, b=0) == "█ · · ·" and padding.draw(1, 4, b=1) == "█ █ █ ·"
    per_head = masks.mask_mod(lambda b, h, q_idx, k_idx: k_idx == h)
    assert per_head.draw(1, 3, h=2) == "· · █"


@pytest.mark.parametrize("name", CASES)
def test_every_mask_prints(name):
    mask = CASES[name][0]
    assert "█" in str(mask) or "·" in str(mask)
    # A traced mask prints without values
    jax.eval_shape(lambda mask: str(mask) and jnp.zeros(()), mask)


def test_names_show_how_masks_are_combined():
    mask = masks.causal(2) | masks.sliding_window(1) & ~(
        masks.no_self() & masks.padding(np.array([1]))
    )
    assert repr(mask) == "causal(2) | sliding_window(1, 0) & ~(no_self() & padding([1]))"
    assert (
        repr((masks.causal() | masks.no_self()) & masks.causal())
        == "(causal() | no_self()) & causal()"
    )
    assert repr(~(masks.causal() | masks.no_self())) == "~(causal() | no_self())"


# Pytrees


def test_python_integers_are_static_and_arrays_are_leaves():
    assert (
        jax.tree.leaves((masks.causal(3), masks.sliding_window(2, np.int64(1)), masks.no_self()))
        == []
    )
    assert (
        len(
            jax.tree.leaves(
                masks.padding(LENGTHS) & ~masks.from_array(ARRAY) | masks.segments(Q_IDS)
            )
        )
        == 4
    )
    mask = masks.padding(np.array([1, 2])) & masks.causal(1)
    longer = jax.tree.map(lambda lengths: lengths + 2, mask)
    np.testing.assert_array_equal(
        longer.to_array(T, S), (masks.padding(np.array([3, 4])) & masks.causal(1)).to_array(T, S)
    )
    assert (
        jax.tree.structure(mask)
        == jax.tree.structure(longer)
        != jax.tree.structure(masks.causal(1))
    )
    assert jax.tree.structure(masks.causal(1)) != jax.tree.structure(masks.causal(2))


def test_masks_pass_through_jit_and_scan_and_vmap(rng):
    key, value = (rng.standard_normal((S, N, 3)).astype(np.float32) for _ in range(2))
    query = rng.standard_normal((T, N, 3)).astype(np.float32)
    mask = (masks.padding(LENGTHS) | masks.causal(OFFSETS)) & masks.from_array(ARRAY)

    def one(mask):
        return jattn.attend(query, key, value, mask=mask)

    batched = [np.broadcast_to(array, (B, *array.shape)) for array in (query, key, value)]
    expected = jattn.attend(*batched, mask=mask)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(mask), expected, rtol=1e-5, atol=1e-6)
    scanned = jax.lax.scan(lambda carry, mask: (carry, one(mask)), 0, mask)[1]
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_mod_may_capture_what_is_traced():
    @jax.jit
    def array(limit):
        return masks.mask_mod(lambda b, h, q_idx, k_idx: k_idx < limit).to_array(T, S)

    np.testing.assert_array_equal(array(3), np.broadcast_to(np.arange(S) < 3, (T, S)))
    partial = jax.tree_util.Partial(lambda limit, b, h, q_idx, k_idx: k_idx < limit, jnp.int32(3))
    assert len(jax.tree.leaves(masks.mask_mod(partial))) == 1


# FlexAttention's published masks, in their usual form


def test_published_mask_mods():
    document = jnp.array([0, 0, 1, 1, 1, 2, 2])
    prefix, window, dilation = jnp.array([2, 4]), 3, 2

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def document_causal(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx, kv_idx) & (document[q_idx] == document[kv_idx])

    def prefix_mask(b, h, q_idx, kv_idx):
        return (kv_idx <= prefix[b]) | causal(b, h, q_idx, kv_idx)

    def dilated_sliding_window(b, h, q_idx, kv_idx):
        diff = jnp.abs(q_idx - kv_idx)
        return (diff <= window) & ((diff % dilation) == 0) & (diff != 0)

    def noop(b, h, q_idx, kv_idx):
        return True

    def truth(single):
        return [[[single(b, i, j) for j in range(S)] for i in range(S)] for b in range(B)]

    docs = np.asarray(document)
    for mod, single in [
        (document_causal, lambda b, i, j: i >= j and docs[i] == docs[j]),
        (prefix_mask, lambda b, i, j: j <= prefix[b] or i >= j),
        (dilated_sliding_window, lambda b, i, j: 0 < abs(i - j) <= 3 and (i - j) % 2 == 0),
        (noop, lambda b, i, j: True),
    ]:
        array = masks.mask_mod(mod).to_array(S, S, batch=(B,))
        np.testing.assert_array_equal(
            np.broadcast_to(array, (B, 1, S, S))[:, 0], truth(single), err_msg=mod.__name__
        )


# Errors


def fits(mask, lead=(B,)):
    mask.check(lead, N, T, S)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "offset must be an integer.*got 1.5", lambda: masks.causal(1.5)),
        (TypeError, "offset must be integers, got float64", lambda: masks.causal(np.array([1.5]))),
        (TypeError, "offset must be an integer.*got True", lambda: masks.causal(True)),
        (TypeError, "left must be an integer.*got None", lambda: masks.sliding_window(None)),
        (TypeError, "right must be an integer.*got '1'", lambda: masks.sliding_window(1, "1")),
        (
            ValueError,
            r"left \+ right ≥ 0, got left = -2, right = 1",
            lambda: masks.sliding_window(-2, 1),
        ),
        (
            TypeError,
            "lengths must be integers, got float64",
            lambda: masks.padding(np.array([2.0])),
        ),
        (
            TypeError,
            "lengths must be integers, got bool",
            lambda: masks.prefix_lm(np.array([True])),
        ),
        (TypeError, "q_ids must be integers, got float64", lambda: masks.segments(np.zeros(3))),
        (
            TypeError,
            "k_ids must be integers, got float64",
            lambda: masks.segments(Q_IDS, np.zeros(3)),
        ),
        (TypeError, "boolean.*got float64", lambda: masks.from_array(np.zeros((T, S)))),
        (TypeError, "boolean.*got int", lambda: masks.from_array(np.zeros((T, S), int))),
        (TypeError, "mask_mod takes a callable.*got ndarray", lambda: masks.mask_mod(ARRAY)),
        (
            TypeError,
            "must return a boolean, got int32",
            lambda: masks.mask_mod(lambda b, h, i, j: i - j).to_array(T, S),
        ),
        (TypeError, "masks only, got ndarray", lambda: masks.causal() & ARRAY),
        (
            TypeError,
            "masks only, got function",
            lambda: masks.causal() | (lambda b, h, i, j: i > j),
        ),
        (
            ValueError,
            r"offset must be .*\(2,\), got shape \(3,\)",
            lambda: fits(masks.causal(np.arange(3))),
        ),
        (
            ValueError,
            r"right must be .*got shape \(1,\)",
            lambda: fits(masks.sliding_window(2, np.arange(1))),
        ),
        (
            ValueError,
            r"lengths must be .*\(2,\).*\(2, 5\).*got shape \(\)",
            lambda: fits(masks.padding(3)),
        ),
        (
            ValueError,
            r"lengths must be .*got shape \(5, 2\)",
            lambda: fits(masks.padding(PER_QUERY.T)),
        ),
        (
            ValueError,
            "lengths must lie in 0 … 7 .*got 8",
            lambda: fits(masks.padding(np.array([3, 8]))),
        ),
        (
            ValueError,
            "lengths must lie in 0 … 7 .*got -1",
            lambda: fits(~masks.padding(jnp.array([-1, 8])) & masks.causal()),
        ),
        (
            ValueError,
            r"q_ids must have shape \(2, 5\), got \(2, 7\)",
            lambda: fits(masks.segments(K_IDS)),
        ),
        (
            ValueError,
            r"k_ids must have shape \(2, 7\), got \(2, 5\)",
            lambda: fits(masks.segments(Q_IDS)),
        ),
        (
            ValueError,
            r"got shape \(2, 5, 7\); one mask per example",
            lambda: fits(masks.from_array(ARRAY[:, 0])),
        ),
        (
            ValueError,
            r"\(2, 3, 5, 7\), got shape \(7, 5\)",
            lambda: fits(masks.no_self() | masks.from_array(ARRAY[0, 0].T)),
        ),
        (
            ValueError,
            r"got shape \(2, 2, 3, 5, 7\)",
            lambda: fits(masks.from_array(ARRAY[None][[0, 0]])),
        ),
        (
            ValueError,
            "lengths must lie in 0 … 7",
            lambda: masks.padding(np.array([8])).to_array(T, S),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()


# The ends of the integers


FAR = np.array([-1, 0, 2**31 - 1], np.int32)


@pytest.mark.parametrize("offset", [0, 1, -1, 2**31 - 1, -(2**31) + 1, np.array(2)])
def test_causal_compares_positions_at_the_ends_of_int32(offset):
    """Where a difference of positions would wrap around."""
    block = Block((), 1, (0, 3), (0, 3), positions=(jnp.asarray(FAR), jnp.asarray(FAR)))
    wide = FAR.astype(np.int64)
    expected = wide[None, :] <= wide[:, None] + int(offset)
    mask = masks.causal(offset)
    np.testing.assert_array_equal(mask.rule(block)[0], expected)
    window = (
        masks.sliding_window(5, offset)
        if np.all(offset >= -5)
        else masks.sliding_window(2**31 - 1, offset)
    )
    left = 5 if np.all(offset >= -5) else 2**31 - 1
    within = (wide[None, :] >= wide[:, None] - left) & expected
    np.testing.assert_array_equal(window.rule(block)[0], within)


@pytest.mark.parametrize(
    "mask", [masks.causal(), masks.causal(7), masks.sliding_window(3, 2)], ids=repr
)
def test_classes_at_the_ends_of_int32_are_those_of_the_entries(mask):
    low, high = jnp.asarray([-(2**31) + 1, -1, 0]), jnp.asarray([2**31 - 3, 2**31 - 1])
    for q, k in ((low, high), (high, low), (low, low), (high, high)):
        block = Block((), 1, (0, q.size), (0, k.size), positions=(q, k))
        allowed = np.asarray(mask.rule(block))
        truth = FULL if allowed.all() else PARTIAL if allowed.any() else EMPTY
        assert int(mask.classify(block).reshape(())) in {truth, PARTIAL}


def test_traced_ids_and_lengths_of_64_bits_are_not_cut_to_32(x64):
    """2³² + 1 is another document than 1, and 2³² + 1 keys are more than one."""

    @jax.jit
    def drawn(ids, lengths):
        return masks.segments(ids).to_array(2, 2), masks.padding(lengths).to_array(1, 3, batch=())

    same, within = drawn(jnp.array([1, 2**32 + 1]), jnp.asarray(2**32 + 1))
    np.testing.assert_array_equal(same, np.eye(2, dtype=bool))
    assert within.all()


def test_traced_positions_of_64_bits_are_not_cut_to_32(x64):
    @jax.jit
    def weights(q_pos, k_pos):
        ones = jnp.ones((2, 1, 1))
        return jattn.attention_weights(ones, ones, mask=masks.causal(), positions=(q_pos, k_pos))

    came = weights(jnp.array([0, 2**33]), jnp.array([0, 2**32]))
    np.testing.assert_array_equal(came[0], [[1, 0], [0.5, 0.5]])


def test_the_lowest_int32_is_no_index():
    with pytest.raises(ValueError, match="offset must lie in -2147483647 … 2147483647"):
        masks.causal(-(2**31))


def test_a_large_mask_is_printed_in_part():
    text = str(masks.causal() & masks.padding(np.array(400)))
    assert len(text) < 3000
    assert text.splitlines()[0] == "causal() & padding(400)"
    assert text.splitlines()[-1] == "… the first 32 of 400 queries, 32 of 400 keys"
