"""The contract on meshes: as one device, in the same memory, with gradients.

Inside `jax.shard_map`, with axes checked and unchecked; on meshes with explicit axes, which
`jax.make_mesh` makes by default; on meshes with automatic ones. (Eight virtual devices.)
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import masks, modifiers, scores
from jattn.kernels.blockwise import sizes
from tests.cases import loose, some

pytestmark = pytest.mark.usefixtures("no_rank_promotion", "x64")
B, T, S, N, K, H, V = 8, 8, 6, 4, 2, 3, 5


@pytest.fixture(autouse=True)
def several_devices(kernel):
    if kernel == "blockwise" and sizes.one_cpu_device():
        pytest.skip("this variant is that of one device")


def arguments(rng):
    """Query, key, value, slopes, a bias and lengths."""
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (N,), (B, N, 1, S)
    arrays = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    return *arrays, jnp.asarray(rng.integers(0, S + 1, B))


def attend(kernel, query, key, value, slopes, bias, lengths):
    """Arrays held by masks and modifiers, and captured by closures; empty rows among them."""
    options = {
        "mask": masks.padding(lengths) & masks.mask_mod(lambda b, h, i, j: i != j),
        "modifier": (
            modifiers.alibi(slopes),
            modifiers.bias(bias),
            loose(lambda x, b, h, i, j: x * slopes[h] + i),
        ),
    }
    return jattn.attend(query, key, value, implementation=kernel, return_lse=True, **options)


def loss_of(function):
    def loss(*arguments):
        output, lse = function(*arguments)
        return jnp.sin(output).sum() + jnp.sin(jnp.where(jnp.isneginf(lse), 0, lse)).sum()

    return loss


def derivatives(function, second=False):
    """Outputs and gradients, and a Hessian-vector product where asked for."""
    loss = loss_of(function)

    def all_of(*arguments):
        *point, lengths = arguments
        gradient = jax.grad(lambda *x: loss(*x, lengths), tuple(range(5)))
        products = jax.jvp(gradient, point, point) if second else gradient(*point)
        return function(*arguments), products

    return jax.jit(all_of)


def assert_close(came, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), came, expected
    )


def auto(*shape):
    names = ("batch", "heads")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_shard_map_over_the_batch(kernel, devices, check_vma, rng):
    """Lengths and the bias are sharded, slopes are shared: their gradient is the sum of all."""
    given = arguments(rng)
    one = functools.partial(attend, kernel)
    specs = (P("batch"),) * 3 + (P(), P("batch"), P("batch"))
    sharded = jax.shard_map(
        one, mesh=auto(devices), in_specs=specs, out_specs=P("batch"), check_vma=check_vma
    )
    assert_close(derivatives(sharded)(*given), derivatives(one)(*given))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_shard_map_over_keys_merges_to_the_whole(kernel, check_vma, rng):
    """A ring in small: each device has some keys, and all queries; partial results are gathered."""
    query, key, value, *_ = arguments(rng)

    def local(query, key, value):
        first = jax.lax.axis_index("batch") * key.shape[1]
        positions = jnp.arange(T), first + jnp.arange(key.shape[1], dtype=jnp.int32)
        options = {"mask": masks.causal(-1), "positions": positions, "return_lse": True}
        part = jattn.attend(query, key, value, implementation=kernel, **options)
        return jax.tree.map(lambda array: array[None], part)

    def whole(query, key, value):
        specs = P(), P(None, "batch"), P(None, "batch")
        outputs, lses = jax.shard_map(
            local, mesh=auto(2), in_specs=specs, out_specs=P("batch"), check_vma=check_vma
        )(query, key, value)
        return jattn.merge_partials([(outputs[k], lses[k]) for k in (0, 1)])

    def plain(query, key, value):
        options = {"mask": masks.causal(-1), "implementation": kernel, "return_lse": True}
        return jattn.attend(query, key, value, **options)

    def results(function):
        gradient = jax.jit(jax.grad(loss_of(function), (0, 1, 2)))
        return jax.jit(function)(query, key, value), gradient(query, key, value)

    assert_close(results(whole), results(plain))


@pytest.mark.slow
def test_shard_map_called_eagerly(kernel, rng):
    given = arguments(rng)
    one = functools.partial(attend, kernel)
    specs = (P("batch"),) * 3 + (P(), P("batch"), P("batch"))
    sharded = jax.shard_map(one, mesh=auto(2), in_specs=specs, out_specs=P("batch"))
    assert_close(sharded(*given), one(*given))


def test_a_score_that_captures_what_all_devices_share(kernel, rng):
    """Its gradient is summed over devices once, outside of every loop."""
    query, key, value, *_ = arguments(rng)
    weight = jnp.asarray(rng.standard_normal((H, H)))

    def one(query, key, value, weight):
        score = lambda q, k: jax.nn.relu(jnp.einsum("...th,hi,...si->...ts", q, weight, k))  # noqa: E731
        return jattn.attend(query, key, value, score=score, implementation=kernel)

    sharded = jax.shard_map(
        one, mesh=auto(2), in_specs=(P("batch"),) * 3 + (P(),), out_specs=P("batch")
    )

    def gradient(function):
        return jax.jit(jax.grad(lambda *x: jnp.sin(function(*x)).sum(), (0, 3)))

    assert_close(
        gradient(sharded)(query, key, value, weight), gradient(one)(query, key, value, weight)
    )
    compiled = gradient(sharded).lower(query, key, value, weight).compile().as_text()
    assert "all-reduce" in compiled
    for body in loop_bodies(compiled):
        assert "all-reduce" not in body


def loop_bodies(program):
    """The computations that a loop of a compiled program runs, and those that these call."""
    computations = {}
    for part in program.split("\n\n"):
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", part.strip()):
            computations[found[1]] = part
    reached = set(re.findall(r"body=%?([\w.-]+)", program))
    while True:
        called = re.findall(
            r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+)",
            "".join(computations[name] for name in reached),
        )
        if set(called) <= reached:
            return [computations[name] for name in reached]
        reached |= set(called)


# How query, key, value, slopes, bias and lengths lie on a mesh of explicit axes
EXPLICIT = {
    "batch": ((2,), (P("batch"),) * 3 + (P(), P(), P())),
    "batch, of 8": ((8,), (P("batch"),) * 3 + (P(), P(), P())),
    "batch, bias and lengths too": ((2,), (P("batch"),) * 3 + (P(), P("batch"), P("batch"))),
    "batch and heads": (
        (2, 2),
        (P("batch", None, "heads"),) * 3 + (P(), P("batch", "heads"), P("batch")),
    ),
    "the sequence": ((2,), (P(None, "batch"),) * 3 + (P(),) * 3),
    "queries along the sequence, of 8": ((8,), (P(None, "batch"),) + (P(),) * 5),
    "keys along the sequence": ((2,), (P(), P(None, "batch"), P(None, "batch")) + (P(),) * 3),
    "batch and the sequence": ((2, 2), (P("batch", "heads"),) * 3 + (P(), P("batch"), P("batch"))),
    "the sequence over two axes": ((2, 2), (P(None, ("batch", "heads")),) + (P(),) * 5),
    "the query alone": ((2,), (P("batch"),) + (P(),) * 5),
    "nothing": ((2,), (P(),) * 6),
}


BOTH_ORDERS = "batch and the sequence"
FEW = ["batch and heads", "the sequence", "nothing"]


@pytest.mark.parametrize("name", some(EXPLICIT, FEW))
def test_a_mesh_with_explicit_axes(kernel, name, rng):
    """What comes out lies as the query does, and every number is that of one device."""
    shape, specs = EXPLICIT[name]
    given = arguments(rng)
    one = functools.partial(attend, kernel)
    both = functools.partial(derivatives, second=name == BOTH_ORDERS)
    expected = both(one)(*given)
    with jax.set_mesh(jax.make_mesh(shape, ("batch", "heads")[: len(shape)])):
        placed = [jax.device_put(x, spec) for x, spec in zip(given, specs, strict=True)]
        came = both(one)(*placed)
        assert jax.typeof(came[0][0]).sharding.spec == P(*specs[0], *(None,) * (4 - len(specs[0])))
    assert_close(jax.tree.map(np.asarray, came), jax.tree.map(np.asarray, expected))


def test_an_explicit_mesh_under_vmap_scan_and_remat_and_eagerly(kernel, rng):
    query, key, value, *_ = arguments(rng)

    def one(query, key, value):
        return jattn.attend(query, key, value, mask=masks.causal(), implementation=kernel)

    def scanned(*rows):
        return jax.lax.scan(lambda c, x: (c, one(*x)), 0, rows)[1]

    expected = one(query, key, value)
    with jax.set_mesh(jax.make_mesh((2,), ("heads",))):
        spec = P(None, None, "heads")
        placed = [jax.device_put(array, spec) for array in (query, key, value)]
        for function in (one, jax.vmap(one), scanned, jax.checkpoint(one), jax.jit(jax.vmap(one))):
            assert_close(np.asarray(function(*placed)), np.asarray(expected))


def test_weights_on_an_explicit_mesh(rng):
    query, key, *_ = arguments(rng)
    expected = jattn.attention_weights(query, key)
    with jax.set_mesh(jax.make_mesh((2,), ("batch",))):
        placed = (jax.device_put(array, P("batch")) for array in (query, key))
        assert_close(np.asarray(jattn.attention_weights(*placed)), np.asarray(expected))


def test_explicit_axes_inside_a_shard_map_over_others_are_refused_by_name(kernel, rng):
    query, key, value, *_ = arguments(rng)
    with jax.set_mesh(jax.make_mesh((2, 2), ("batch", "heads"))):
        placed = [jax.device_put(x, P("batch", None, "heads")) for x in (query, key, value)]
        mapped = jax.shard_map(
            functools.partial(jattn.attend, implementation=kernel),
            axis_names={"batch"}, in_specs=P("batch"), out_specs=P("batch"),
        )  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"manual.*explicit"):
            jax.jit(mapped)(*placed)


def test_arrays_that_lie_on_an_explicit_mesh_which_is_not_in_use(kernel, rng):
    """`device_put` is enough: nobody has to set the mesh."""
    query, key, value, *_ = arguments(rng)
    attend = jax.jit(functools.partial(jattn.attend, mask=masks.causal(), implementation=kernel))
    sharding = NamedSharding(jax.make_mesh((2,), ("batch",)), P("batch"))
    placed = [jax.device_put(array, sharding) for array in (query, key, value)]
    assert_close(np.asarray(attend(*placed)), np.asarray(attend(query, key, value)))


@pytest.mark.parametrize("placed", [(), (1, 2)], ids=["nothing", "key and value"])
def test_arrays_made_before_the_mesh_was_set(kernel, placed, rng):
    given = list(arguments(rng)[:3])
    attend = functools.partial(jattn.attend, mask=masks.causal(), implementation=kernel)
    expected = attend(*given)
    with jax.set_mesh(jax.make_mesh((2,), ("batch",))):
        for k in placed:
            given[k] = jax.device_put(given[k], P("batch"))
        assert_close(np.asarray(attend(*given)), np.asarray(expected))


@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sharded_sequence_eagerly_and_on_a_mesh_that_is_not_in_use(kernel, shape, jit, rng):
    query, key, value, *_ = arguments(rng)
    attend = functools.partial(jattn.attend, mask=masks.causal(), implementation=kernel)
    called = jax.jit(attend) if jit else attend
    mesh, spec = jax.make_mesh(shape, ("data", "seq")), P(None, "seq")
    rows = query, *(x[:, :4] for x in (key, value))
    expected = attend(*rows)
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array in rows]
    assert_close(np.asarray(called(*placed)), np.asarray(expected))
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda *x: jnp.sin(called(*x)).sum(), (0, 1, 2))
        came = jax.tree.map(np.asarray, gradient(*placed))
    plain = jax.grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))(*rows)
    assert_close(came, jax.tree.map(np.asarray, plain))


def test_half_precision_products_differ_over_all_axes_of_both_operands():
    query, key = jnp.ones((B, T, H), jnp.bfloat16), jnp.ones((S, H), jnp.bfloat16)

    def product(key, query):
        return scores.dot_product(jnp.broadcast_to(key, (B // 2, S, H)), query)

    mapped = jax.shard_map(product, mesh=auto(2), in_specs=(P(), P("batch")), out_specs=P("batch"))
    gradient = jax.grad(lambda k, q: mapped(k, q).sum())(key, query)
    np.testing.assert_array_equal(gradient.astype(float), np.full((S, H), B * T))


def test_automatic_sharding_of_batch_and_heads(kernel, rng):
    given = arguments(rng)
    one = functools.partial(attend, kernel)
    mesh = auto(2, 2)
    specs = EXPLICIT["batch and heads"][1]
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)
    ]
    assert_close(derivatives(one)(*placed), derivatives(one)(*given))


# Memory and messages between devices, read off the compiled program

LONG = 4096


def compiled(kind, spec, backward):
    """Attention over 4,096 positions, 8 heads and 4 examples on a mesh of 2 × 2."""
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, spec)
    shape = jax.ShapeDtypeStruct((4, LONG, 8, 16), jnp.float32, sharding=sharding)

    def forward(query, key, value):
        return jattn.attend(query, key, value, mask=masks.causal())

    def gradients(*rows):
        return jax.vjp(forward, *rows)[1](rows[0])

    with jax.enable_x64(False), jax.set_mesh(mesh):
        return jax.jit(gradients if backward else forward).lower(*(shape,) * 3).compile()


def messages(program):
    names = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
    text = program.as_text()
    counts = {name: len(re.findall(rf"{name}(?:-start)?\(", text)) for name in names}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_and_heads_need_no_messages_and_linear_memory(kind, backward):
    program = compiled(kind, P("batch", None, "heads"), backward)
    assert messages(program) == {}
    scores = 4 * 2 * 4 * LONG**2  # bytes of those of one device
    assert program.memory_analysis().temp_size_in_bytes < scores / 10


def test_a_sharded_sequence_gathers_keys_and_values_once():
    """Queries stay where they are; backward, gradients of keys and values are summed once."""
    forward, backward = (compiled(AxisType.Explicit, P("batch", "heads"), b) for b in (False, True))
    assert messages(forward) == {"all-gather": 2}
    assert messages(backward) == {"all-gather": 2, "all-reduce": 1}
    scores = 4 * 2 * 8 * LONG * LONG / 2
    assert backward.memory_analysis().temp_size_in_bytes < scores / 10


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_has_linear_memory(check_vma):
    shape = jax.ShapeDtypeStruct((2, LONG, 8, 16), jnp.float32)
    attend = functools.partial(jattn.attend, mask=masks.causal())
    with jax.enable_x64(False):
        mapped = jax.shard_map(
            attend, mesh=auto(2), in_specs=P("batch"), out_specs=P("batch"), check_vma=check_vma
        )
        gradient = jax.jit(jax.grad(lambda *x: mapped(*x).sum(), (0, 1, 2)))
        memory = gradient.lower(*(shape,) * 3).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8 * LONG**2 / 10


def test_keys_and_queries_may_shard_different_axes_by_one_axis_of_the_mesh(rng):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    query, rows = rng.standard_normal((2, 2, 4, 2, 3)), rng.standard_normal((2, 2, 4, 2, 3))
    by_first = jax.device_put(query, NamedSharding(mesh, P("x")))
    by_second = jax.device_put(rows, NamedSharding(mesh, P(None, "x")))
    with jax.set_mesh(mesh):
        found = jax.jit(jattn.attend)(by_first, by_second, by_second)
    np.testing.assert_allclose(found, jattn.attend(query, rows, rows), rtol=1e-5, atol=1e-6)
