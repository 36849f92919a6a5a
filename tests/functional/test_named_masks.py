"""Masks that published models name, each against a loop and against attention without it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jattn
from jattn import masks
from jattn.functional.block import EMPTY, FULL, PARTIAL, Block
from jattn.kernels.blockwise import sizes
from tests import oracle
from tests.cases import operands, run

B, N, T, S = 2, 3, 5, 10
SHARED = np.array([3, 0, 4, 2])  # of 10 slots the last is after all documents
LENGTHS = np.array([[0, 2, 5, 0, 1], [10, 0, 0, 0, 0]])
PARENTS = np.array([[-1, 0, 0, 1, 3], [-1, -1, 1, 0, 1]])
CHAIN, PREFIX = np.array([-1, 0, 1, 2, 3]), np.array([0, 4])


def document_of(lengths):
    """The document of each slot; None after the last."""
    slots = [n for n, length in enumerate(lengths) for _ in range(length)]
    return slots + [None] * (S - len(slots))


def together(lengths, t, s):
    slots = document_of(lengths)
    return slots[t] is not None and slots[t] == slots[s]


def on_path(parents, prefix, t, s):
    """Walk from a draft to its root."""
    path = []
    while t >= 0:
        path.append(prefix + t)
        t = parents[t]
    return s < prefix or s in path


def diffusion(length, size, t, s):
    """In the words of the paper: x_t is the noised half, x_0 the clean one."""
    noised = {n: n // size for n in range(length)}
    clean = {length + n: n // size for n in range(length)}
    if t in noised:
        return noised.get(s) == noised[t] or clean.get(s, length) < noised[t]
    return clean.get(s, length) <= clean[t]


# name -> (mask, the same on single entries with slots t, s and positions i, j, number of queries)
CASES = {
    "documents": (masks.documents(SHARED), lambda b, t, s, i, j: together(SHARED, t, s), S),
    "documents, each": (
        masks.documents(LENGTHS),
        lambda b, t, s, i, j: together(LENGTHS[b], t, s),
        S,
    ),
    "chunks": (masks.chunked_local(3), lambda b, t, s, i, j: np.floor(i / 3) == np.floor(j / 3), T),
    "chunk of one": (masks.chunked_local(1), lambda b, t, s, i, j: i == j, T),
    "diffusion": (masks.block_diffusion(5, 2), lambda b, t, s, i, j: diffusion(5, 2, t, s), S),
    "diffusion in one block": (
        masks.block_diffusion(5, 7),
        lambda b, t, s, i, j: diffusion(5, 7, t, s),
        S,
    ),
    "tree": (masks.tree(PARENTS[0], 2), lambda b, t, s, i, j: on_path(PARENTS[0], 2, t, s), T),
    "tree, each": (
        masks.tree(PARENTS, PREFIX),
        lambda b, t, s, i, j: on_path(PARENTS[b], PREFIX[b], t, s),
        T,
    ),
    "tree of one path": (
        masks.tree(CHAIN, PREFIX),
        lambda b, t, s, i, j: s <= PREFIX[b] + t,
        T,
    ),
}


def loop(name, q_pos=None, k_pos=None):
    """`[B, rows, S]`, entry by entry."""
    _, single, rows = CASES[name]
    q_pos, k_pos = (np.arange(S) if pos is None else pos for pos in (q_pos, k_pos))
    entries = [
        single(b, t, s, q_pos[t], k_pos[s])
        for b, t, s in itertools.product(range(B), range(rows), range(S))
    ]
    return np.array(entries, bool).reshape(B, rows, S)


@pytest.mark.parametrize("name", CASES)
def test_to_array_and_each_entry_are_the_loop(name):
    mask, _, rows = CASES[name]
    array = np.broadcast_to(mask.to_array(rows, S, batch=(B,)), (B, 1, rows, S))
    np.testing.assert_array_equal(array[:, 0], loop(name))
    indices = np.indices((B, rows, S)).reshape(3, -1)
    entries = jax.jit(jax.vmap(lambda b, t, s: mask(b, 0, t, s)))(*indices)
    np.testing.assert_array_equal(entries.reshape(B, rows, S), loop(name))


@pytest.mark.parametrize("name", CASES)
def test_the_class_of_every_block(name):
    """Exact, but for a block that cuts a draft tree; starts are traced, as in a kernel."""
    mask, _, rows = CASES[name]
    truth, is_tree = loop(name), name.startswith("tree")
    prefix = np.broadcast_to(getattr(mask, "prefix", 0), B)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def classes(mask, height, width):
        def one(row, column):
            block = Block((B,), N, (row, height), (column, width))
            return jnp.broadcast_to(mask.classify(block), (B, N, 1, 1))[:, 0, 0, 0]

        starts = jnp.arange(rows + 1 - height), jnp.arange(S + 1 - width)
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(*starts)

    for height, width in [(1, 1), (2, 3), (3, S), (rows, 2)]:
        kinds = np.asarray(classes(mask, height, width))
        for row, column in np.ndindex(kinds.shape[:2]):
            part = truth[:, row : row + height, column : column + width]
            exact = np.where(part.all((1, 2)), FULL, np.where(part.any((1, 2)), PARTIAL, EMPTY))
            cut = is_tree & (column + width > prefix) & (column < prefix + row + height)
            assert ((kinds[row, column] == exact) | cut & (kinds[row, column] == PARTIAL)).all()


@pytest.mark.parametrize("name", CASES)
def test_chunks_see_positions_and_the_others_slots(name):
    """Floor division of negative positions, too."""
    mask, _, rows = CASES[name]
    q_pos, k_pos = np.arange(S) - 4, np.arange(S)[::-1] - 7
    positions = jnp.asarray(q_pos[:rows]), jnp.asarray(k_pos)
    truth = loop(name, q_pos, k_pos)

    @jax.jit
    def both(mask, row, column):
        block = Block((B,), N, (row, 2), (column, 3), positions)
        return jnp.broadcast_to(mask.rule(block), (B, N, 2, 3)), mask.classify(block)

    for row, column in [(0, 0), (3, 7), (1, 4)]:
        allowed, kinds = both(mask, row, column)
        part = truth[:, row : row + 2, column : column + 3]
        np.testing.assert_array_equal(allowed, np.broadcast_to(part[:, None], (B, N, 2, 3)))
        kinds = np.broadcast_to(kinds, (B, 1, 1, 1))[:, 0, 0, 0]
        assert not part[kinds == EMPTY].any() and part[kinds == FULL].all()


@pytest.mark.parametrize("name", CASES)
def test_one_example_of_a_block_is_that_of_the_whole(name):
    mask, *_ = CASES[name]

    @jax.jit
    def both(mask, b):
        block = Block((B,), N, (1, 3), (2, 7), examples=(b, 1), head=1)
        return jnp.broadcast_to(mask.rule(block), block.shape), mask.classify(block)

    for b in range(B):
        allowed, kind = both(mask, b)
        part = loop(name)[b, 1:4, 2:9]
        np.testing.assert_array_equal(allowed[0, 0], part)
        assert kind.size == 1 and (kind != EMPTY or not part.any()) and (kind != FULL or part.all())


def test_several_leading_axes():
    lengths, parents = np.stack([LENGTHS, LENGTHS[::-1]]), np.stack([PARENTS[::-1], PARENTS])
    packed = masks.documents(lengths).to_array(S, S)
    drafts = masks.tree(parents, np.array([[4, 0], [0, 4]])).to_array(T, S)
    each, trees = loop("documents, each"), loop("tree, each")
    np.testing.assert_array_equal(packed, np.stack([each, each[::-1]])[:, :, None])
    np.testing.assert_array_equal(drafts, np.stack([trees[::-1], trees])[:, :, None])


def test_chunks_at_the_ends_of_int32():
    ends = np.array([-(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1], np.int32)
    block = Block((), 1, (0, 5), (0, 5), positions=(jnp.asarray(ends), jnp.asarray(ends)))
    for size in (1, 2, 2**31 - 1):
        chunk = ends.astype(np.int64) // size
        allowed = masks.chunked_local(size).rule(block)[0]
        np.testing.assert_array_equal(allowed, chunk[:, None] == chunk)


@pytest.mark.parametrize(("n", "block_size"), [(4, 2), (5, 2), (6, 6), (5, 1), (3, 4), (1, 1)])
def test_block_diffusion_is_the_published_mask_mod(n, block_size):
    """`block_diff_mask` of the paper's code, with `torch.` read as `np.`."""
    q_idx, kv_idx = np.indices((2 * n, 2 * n))
    x0_flag_q = q_idx >= n
    x0_flag_kv = kv_idx >= n
    block_q = np.where(x0_flag_q == 1, (q_idx - n) // block_size, q_idx // block_size)
    block_kv = np.where(x0_flag_kv == 1, (kv_idx - n) // block_size, kv_idx // block_size)
    block_diagonal = (block_q == block_kv) & (x0_flag_q == x0_flag_kv)
    offset_block_causal = (block_q > block_kv) & (x0_flag_kv == 1) & (x0_flag_q == 0)
    block_causal = (block_q >= block_kv) & (x0_flag_kv == 1) & (x0_flag_q == 1)
    published = block_diagonal | offset_block_causal | block_causal
    np.testing.assert_array_equal(
        masks.block_diffusion(n, block_size).to_array(2 * n, 2 * n), published
    )


# What they are for


@pytest.mark.parametrize("lengths", [SHARED, LENGTHS], ids=["shared", "each"])
def test_packed_documents_are_each_document_alone(kernel, lengths, rng, x64):
    query, key, value = operands(rng, T=S, S=S)
    output, lse, *_ = run(kernel, query, key, value, mask=masks.documents(lengths) & masks.causal())
    for b, own in enumerate(np.broadcast_to(lengths, (B, lengths.shape[-1]))):
        ends = np.cumsum(own)
        for start, end in zip(ends - own, ends, strict=True):
            alone = oracle.attend(
                *(x[b : b + 1, start:end] for x in (query, key, value)),
                score=oracle.scaled_dot_product,
                allowed=lambda b, h, t, s: s <= t,
            )
            np.testing.assert_allclose(output[b, start:end], alone[0][0], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(lse[b, start:end], alone[1][0], rtol=1e-12, atol=1e-12)
        assert (output[b, ends[-1] :] == 0).all() and jnp.isneginf(lse[b, ends[-1] :]).all()


def test_a_path_of_a_tree_is_a_plain_causal_sequence(kernel, rng, x64):
    query, key, value = operands(rng, S=S)
    output, lse, *_ = run(kernel, query, key, value, mask=masks.tree(PARENTS, PREFIX))
    for b, leaf in [(0, 2), (0, 4), (1, 2), (1, 3), (1, 4)]:
        path = [leaf]
        while PARENTS[b, path[0]] >= 0:
            path.insert(0, PARENTS[b, path[0]])
        seen = [*range(PREFIX[b]), *(PREFIX[b] + t for t in path)]
        alone = oracle.attend(
            query[b : b + 1, path], key[b : b + 1, seen], value[b : b + 1, seen],
            score=oracle.scaled_dot_product, allowed=lambda _, h, t, s, b=b: s <= PREFIX[b] + t,
        )  # fmt: skip
        np.testing.assert_allclose(output[b, path], alone[0][0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse[b, path], alone[1][0], rtol=1e-12, atol=1e-12)


# Transformations


def attend_twice(kernel, query, key, value, lengths, parents, prefix):
    """Packed documents, and drafts over a cache; the arrays of both masks are given."""
    packed = masks.documents(lengths) & (masks.causal() | masks.chunked_local(3))
    whole = jattn.attend(query, key, value, mask=packed, implementation=kernel)
    drafts = query[..., :T, :, :]
    tree = masks.tree(parents, prefix)
    return whole, jattn.attend(drafts, key, value, mask=tree, implementation=kernel)


def with_gradients(function):
    def loss(*arrays):
        return sum(jnp.sin(output).sum() for output in function(*arrays))

    return lambda *arrays: (function(*arrays), jax.grad(loss, (0, 1, 2))(*arrays))


def assert_close(came, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=1e-11, atol=1e-12
        ),
        came,
        expected,
    )


@pytest.fixture
def arrays(rng):
    return *operands(rng, T=S, S=S), LENGTHS, PARENTS, PREFIX


def test_traced_lengths_and_trees_under_jit_and_vmap(kernel, arrays, no_rank_promotion, x64):
    function = functools.partial(attend_twice, kernel)
    known = jax.jit(with_gradients(lambda *x: function(*x, *arrays[3:])))(*arrays[:3])
    mapped = jax.vmap(with_gradients(function))
    assert_close(jax.jit(mapped)(*arrays), known)


@pytest.mark.slow
def test_lengths_and_trees_on_several_devices(kernel, arrays, no_rank_promotion, x64):
    if kernel == "blockwise" and sizes.one_cpu_device():
        pytest.skip("this variant is that of one device")
    function = with_gradients(functools.partial(attend_twice, kernel))
    arrays = jax.tree.map(jnp.asarray, arrays)
    expected = jax.jit(function)(*arrays)
    mapped = jax.shard_map(
        functools.partial(attend_twice, kernel),
        mesh=jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=P("batch"), out_specs=P("batch"),
    )  # fmt: skip
    assert_close(jax.jit(with_gradients(mapped))(*arrays), expected)
    with jax.set_mesh(jax.make_mesh((2,), ("batch",))):
        placed = [jax.device_put(array, P("batch")) for array in arrays]
        assert_close(jax.jit(function)(*placed), expected)


def test_lengths_of_any_integers_and_traced_ones_beyond_the_slots():
    array = jax.jit(lambda lengths: masks.documents(lengths).to_array(S, S))
    truth = [[together([3, 0, 4], t, s) for s in range(S)] for t in range(S)]
    for dtype in (np.int8, np.uint8, np.int32):
        np.testing.assert_array_equal(array(np.array([3, 0, 4], dtype)), truth)
    np.testing.assert_array_equal(array(np.array([3, -5, 4])), truth)
    assert array(np.array([2**31 - 1, 2**31 - 1, 9])).all()
    assert array(np.array([S + 5, 3])).all()
    assert not array(np.zeros(0, np.int32)).any()
    narrow = masks.documents(np.array([100, 100], np.int8)).to_array(200, 200)
    np.testing.assert_array_equal(narrow, np.kron(np.eye(2), np.ones((100, 100))))


def test_traced_trees_of_any_integers_and_parents_that_stand_behind(x64):
    array = jax.jit(lambda parents, prefix: masks.tree(parents, prefix).to_array(T, S))
    truth = loop("tree")[0]
    for dtype in (np.int8, np.int32, np.int64):
        np.testing.assert_array_equal(array(PARENTS[0].astype(dtype), dtype(2)), truth)
    roots = [[s < 2 or s == 2 + t for s in range(S)] for t in range(T)]
    np.testing.assert_array_equal(array(np.array([4, 1, 3, 2**32, -7]), 2), roots)
    np.testing.assert_array_equal(array(PARENTS[0], -3), array(PARENTS[0], 0))
    assert array(PARENTS[0], 2**32 + 1).all()
    many = jnp.full(300, -1, jnp.int8)  # in eight bits −1 is 255
    lone = jax.jit(lambda parents: masks.tree(parents).to_array(300, 300))(many)
    np.testing.assert_array_equal(lone, np.eye(300, dtype=bool))
    assert masks.tree(np.zeros(0, int), 3).to_array(0, 3).shape == (0, 3)


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=[pytest.mark.slow] * (n not in {1, 2, 5, 9})) for n in range(1, 10)]
)
def test_paths_of_every_length_reach_their_root(n):
    chain = masks.tree(np.arange(n) - 1).to_array(n, n)
    np.testing.assert_array_equal(chain, np.tril(np.ones((n, n), bool)))


def test_no_array_is_as_large_as_the_scores():
    long, shape = 2**14, jax.ShapeDtypeStruct((1, 2**14, 1, 8), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def attend(query, key, value, lengths):
        local = masks.chunked_local(1000) | masks.block_diffusion(long // 2, 100)
        return jattn.attend(query, key, value, mask=masks.documents(lengths) & local)

    program = jax.jit(attend).lower(shape, shape, shape, lengths).compile()
    assert program.memory_analysis().temp_size_in_bytes < long**2 / 8


# Pictures, pytrees and errors


def test_names_and_pictures():
    many = masks.documents(np.ones(9, int))
    for mask, name, size in [
        (masks.documents(SHARED), "documents([3, 0, 4, 2])", (9, 9)),
        (many, "documents(array of shape (9,))", (9, 9)),
        (masks.documents(np.zeros(1, int)), "documents([0])", (8, 8)),
        (masks.chunked_local(3) & masks.causal(), "chunked_local(3) & causal()", (8, 8)),
        (masks.block_diffusion(np.int64(3), 2), "block_diffusion(3, 2)", (6, 6)),
        (masks.tree(CHAIN), "tree([-1, 0, 1, 2, 3])", (5, 5)),
        (masks.tree(CHAIN, PREFIX), "tree([-1, 0, 1, 2, 3], [0, 4])", (5, 9)),
    ]:
        first, *rows = str(mask).splitlines()
        assert (first, (len(rows), len(rows[0].split()))) == (name, size)
    jax.eval_shape(lambda mask: str(mask) and jnp.zeros(()), many | masks.tree(CHAIN, PREFIX))


def test_arrays_are_leaves_and_python_integers_are_static():
    static = masks.chunked_local(3), masks.block_diffusion(3, 2)
    assert jax.tree.leaves(static) == []
    assert len(jax.tree.leaves(masks.documents([3, 2]))) == 1
    assert [len(jax.tree.leaves(masks.tree(CHAIN, n))) for n in (2, PREFIX)] == [1, 2]


def fits(mask, T=T, S=S):
    mask.check((B,), N, T, S)


BAD = {
    "documents of floats": (
        TypeError, "lengths must be integers, got float64", lambda: masks.documents([1.0]),
    ),
    "one length": (
        ValueError, r"lengths must be \[M\] or \[..., M\], got 3 of shape \(\)",
        lambda: masks.documents(3),
    ),
    "documents of two sequences": (
        ValueError, "documents is for self-attention, T = S, got T = 5 and S = 10",
        lambda: fits(masks.documents(SHARED)),
    ),
    "documents of other examples": (
        ValueError, r"documents lengths must be .*\(2,\), got shape \(3, 4\)",
        lambda: fits(masks.documents(np.ones((3, 4), int)), S),
    ),
    "a negative length": (
        ValueError, "documents lengths must lie in 0 … 10 .*got -1",
        lambda: fits(~masks.documents([3, -1, 2]), S),
    ),
    "documents that are too long": (
        ValueError, "the sum of documents lengths must lie in 0 … 10 .*got 11",
        lambda: fits(masks.documents([[3, 4, 1], [3, 4, 4]]), S),
    ),
    "a sum beyond 32 bits": (
        ValueError, "documents lengths must lie in 0 … 10 .*got 2147483647",
        lambda: masks.documents([2**31 - 1, 2**31 - 1]).to_array(S, S),
    ),
    "half a chunk": (
        TypeError, "size must be a Python integer, got 1.5", lambda: masks.chunked_local(1.5),
    ),
    "a flag for a chunk": (
        TypeError, "size must be a Python integer, got True", lambda: masks.chunked_local(True),
    ),
    "an array for a chunk": (
        TypeError, r"size must be a Python integer, got array\(\[2\]\)",
        lambda: masks.chunked_local(np.array([2])),
    ),
    "no chunk": (
        ValueError, "size must lie in 1 … 2147483647 .*got 0", lambda: masks.chunked_local(0),
    ),
    "no length": (
        ValueError, "length must lie in 1 … 1073741823 .*got 0",
        lambda: masks.block_diffusion(0, 1),
    ),
    "no block": (
        ValueError, "block_size must lie in 1 .*got -2", lambda: masks.block_diffusion(4, -2),
    ),
    "a block of no kind": (
        TypeError, "block_size must be a Python integer, got None",
        lambda: masks.block_diffusion(4, None),
    ),
    "diffusion without the clean half": (
        ValueError, "T = S = 2 · length = 20, .*got T = 10 and S = 10",
        lambda: fits(masks.block_diffusion(10, 2), S),
    ),
    "diffusion of other keys": (
        ValueError, "T = S = 2 · length = 10, .*got T = 10 and S = 5",
        lambda: fits(masks.block_diffusion(5, 2) & masks.causal(), 10, 5),
    ),
    "parents of floats": (
        TypeError, "parents must be integers, got float64", lambda: masks.tree(np.zeros(3)),
    ),
    "one parent": (
        ValueError, r"parents must be \[T\] or \[..., T\], got -1 of shape \(\)",
        lambda: masks.tree(-1),
    ),
    "a parent behind its child": (
        ValueError, r"−1 ≤ parents\[t\] < t, got parents\[1, 2\] = 2",
        lambda: masks.tree([[-1, 0, 1], [-1, 0, 2]]),
    ),
    "a parent below the root": (
        ValueError, r"−1 ≤ parents\[t\] < t, got parents\[0\] = -2",
        lambda: masks.tree(jnp.array([-2, 0, 1])),
    ),
    "half a prefix": (
        TypeError, "prefix must be an integer.*got 0.5", lambda: masks.tree(CHAIN, 0.5),
    ),
    "a negative prefix": (
        ValueError, "prefix must lie in 0 .*got -3", lambda: masks.tree(CHAIN, np.array([2, -3])),
    ),
    "prefixes of other trees": (
        ValueError, r"prefix must be one integer or one per example \(2,\), got shape \(3,\)",
        lambda: masks.tree(PARENTS, np.arange(3)),
    ),
    "prefixes of other examples": (
        ValueError, r"tree prefix must be .*\(2,\), got shape \(3,\)",
        lambda: fits(masks.tree(CHAIN, np.arange(3))),
    ),
    "another number of drafts": (
        ValueError, r"tree parents must be \[T\] = \(4,\) .*\(2, 4\), .*got shape \(2, 5\)",
        lambda: fits(masks.tree(PARENTS), 4),
    ),
    "drafts beyond the keys": (
        ValueError, r"prefix \+ T ≤ S, got prefix = 6, T = 5 and S = 10",
        lambda: fits(masks.tree(CHAIN, np.array([1, 6]))),
    ),
    "drafts that have no keys": (
        ValueError, r"prefix \+ T ≤ S, got prefix = 0, T = 5 and S = 3",
        lambda: jax.eval_shape(lambda prefix: fits(masks.tree(CHAIN, prefix), S=3), PREFIX),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    error, match, call = BAD[name]
    with pytest.raises(error, match=match):
        call()


def test_attend_names_what_does_not_fit(rng):
    query, key, value = operands(rng, dtype=np.float32)
    with pytest.raises(ValueError, match="self-attention, T = S, got T = 5 and S = 7"):
        jattn.attend(query, key, value, mask=masks.documents([3, 2]))
    with pytest.raises(TypeError, match="mask is the function documents itself: call it"):
        jattn.attend(query, key, value, mask=masks.documents)
