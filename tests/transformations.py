"""Every module, model, decoding and public function under every transformation.

The oracle is the same call under plain jit; of derivatives it is the finite difference. Compiling
takes the time, so one program holds all that one transformation says of one case.
"""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.modules import (
    ALL,
    DECODING,
    FUNCTIONS,
    MODELS,
    MODULES,
    expected,
    functional,
    gradient,
    is_floating,
    loss,
    over,
    scalar,
    shape,
)

STATEFUL = [*MODULES, *MODELS]
# Slow but for one program of each: what they are made of says it as well
WHOLE = (*MODELS, *DECODING, *(case for case in MODULES if str(case) == "Transformer"))
# Flax's and JAX's own loops over what a module does: slow but for one of each kind
KINDS = "MultiHeadAttention", "AdditiveAttention", "Embedding", "LSTM", "attend"
OTHERS = tuple(case for case in ALL if str(case) not in KINDS)
# float32: sums are taken in another order
same = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=5e-6)
ERF_VARIES = jax.__version_info__ < (0, 12)


def flipped(tree):
    return jax.tree.map(lambda array: np.flip(array, 0), tree)


@over(*ALL)
def test_one_trace_compiled_ahead_of_time_and_donated(case):
    function, state = functional(case)
    arrays = [jnp.array(array) for array in case.arrays()]
    donated = tuple(range(1, 1 + len(arrays)))
    # The arrays come back, so that donation has a use for their memory
    chex.clear_trace_counter()
    traced_once = chex.assert_max_traces(lambda *a: (function(*a), a[1:]), n=1)
    jitted = jax.jit(traced_once, donate_argnums=donated)
    compiled = jitted.lower(state, *arrays).compile()
    same(compiled(state, *arrays)[0], expected(case))
    assert all(array.is_deleted() for array in arrays)
    same(jitted(state, *map(jnp.array, flipped(case.arrays())))[0], flipped(expected(case)))


@over(*ALL, slow=OTHERS)
def test_disable_jit(case):
    with jax.disable_jit():
        same(case.call(case.module(), *case.arrays()), expected(case))


@over(*STATEFUL, *FUNCTIONS, slow=WHOLE)
def test_derivatives_forward_and_reverse_are_the_finite_difference(case):
    with jax.enable_x64(True):
        function, state = functional(case, param_dtype=jnp.float64)
        loss_of, floats = scalar(case, function, state)
        floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), floats)
        rng = np.random.default_rng(1)
        tangent = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), floats)

        @jax.jit
        def derivatives(floats, tangent):
            def along(step):
                return jax.tree.map(lambda x, v: x + step * v, floats, tangent)

            ends = jax.lax.map(lambda step: loss_of(along(step)), jnp.array([1e-5, -1e-5]))
            products = jax.tree.map(lambda g, v: jnp.sum(g * v), jax.grad(loss_of)(floats), tangent)
            forward = jax.jvp(loss_of, (floats,), (tangent,))[1]
            return (ends[0] - ends[1]) / 2e-5, forward, sum(jax.tree.leaves(products))

        difference, forward, reverse = derivatives(floats, tangent)
    np.testing.assert_allclose(forward, difference, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(reverse, forward, rtol=1e-10, atol=1e-12)


@over(*ALL, slow=WHOLE)
def test_vmap(case):
    function, state = functional(case)
    batches = [np.stack([array, np.flip(array, 0)]) for array in case.arrays()]
    found = jax.jit(jax.vmap(functools.partial(function, state)))(*batches)
    same(found, jax.tree.map(lambda x: np.stack([x, np.flip(x, 0)]), expected(case)))


@over(*STATEFUL, slow=OTHERS)
def test_stacked_modules_under_nnx_vmap_and_scan(case):
    """Two modules of different parameters: `nnx.vmap` creates them, and both run them."""
    create = nnx.vmap(lambda rngs: case.create(rngs=rngs))
    modules = create(nnx.Rngs(0).split(2))
    modules.eval()
    graphdef, state = nnx.split(modules)

    @jax.jit
    def run(state, *arrays):
        def call(module):
            return case.call(module, *arrays)

        def one(n):
            return call(nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[n], state)))

        truth = jax.tree.map(lambda *leaves: jnp.stack(leaves), one(0), one(1))
        scan = nnx.scan(call, in_axes=0, out_axes=0)
        return truth, nnx.vmap(call)(nnx.merge(graphdef, state)), scan(nnx.merge(graphdef, state))

    truth, mapped, scanned = run(state, *case.arrays())
    same(mapped, truth)
    same(scanned, truth)


@over(*STATEFUL, slow=OTHERS)
def test_nnx_remat(case):
    def remat(module, *arrays):
        return loss(nnx.remat(case.call)(module, *arrays))

    same(nnx.jit(nnx.grad(remat))(case.module(), *case.arrays()), gradient(case)[0])


def drops(case):
    return any(
        isinstance(part, nnx.Dropout) and part.rate for _, part in nnx.iter_modules(case.module())
    )


@over(*filter(drops, STATEFUL), slow=WHOLE)
def test_view_eval_and_deterministic_agree(case):
    run = nnx.jit(case.call)
    module = case.module()
    module.train()
    for evaluated in nnx.view(module, deterministic=True), case.module():
        same(run(evaluated, *case.arrays()), expected(case))
    for training in module, nnx.view(case.module(), deterministic=False):
        with pytest.raises(AssertionError):
            same(run(training, *case.arrays()), expected(case))


class Called(nnx.Module):
    """The module of a case, whose own call is the case's."""

    def __init__(self, case, rngs):
        self.call, self.module = case.call, case.create(rngs=rngs)
        self.module.eval()

    def __call__(self, *arrays):
        return self.call(self.module, *arrays)


@over(*STATEFUL, slow=WHOLE)
def test_tabulate(case):
    table = nnx.tabulate(Called(case, nnx.Rngs(0)), *case.arrays(), console_kwargs={"width": 1000})
    assert type(case.module()).__name__ in table


@over(*STATEFUL, slow=WHOLE)
def test_copies_and_checkpoints_are_equal(case, tmp_path):
    module = case.module()
    _graphdef, params, _ = nnx.split(module, nnx.Param, ...)
    for clone in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), nnx.clone(module):
        assert nnx.graphdef(clone) == nnx.graphdef(module)
        chex.assert_trees_all_equal(nnx.state(clone, nnx.Param), params)
    params = nnx.to_pure_dict(params)
    if params:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "params", params)
            own = ocp.checkpoint_utils.construct_restore_args(params)
            restored = checkpointer.restore(tmp_path / "params", params, restore_args=own)
        chex.assert_trees_all_equal(restored, params)


@over(*ALL, slow=tuple(case for case in OTHERS if case not in FUNCTIONS))
def test_leaks_nans_ranks_and_dtypes_are_clean(case, checking_leaks):
    function, state = functional(case)
    loss_of, floats = scalar(case, function, state)

    def run(floats, *arrays):
        found = None if case in DECODING else jax.grad(loss_of)(floats)
        return function(state, *arrays), found

    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        outputs, found = jax.jit(run)(floats, *case.arrays())
    same(outputs, expected(case))
    same(found, gradient(case))


UNKNOWN_LENGTH = {
    "CharCell": "its loop is Python's, over a length that must be a number",
    "blockwise": "asked for by name: its loops need lengths that are numbers",
}


@over(*ALL, known=UNKNOWN_LENGTH, slow=WHOLE)
def test_export_with_a_symbolic_batch_and_length(case):
    graphdef, params, rest = nnx.split(case.module(), nnx.Param, ...)
    params, structure = jax.tree.flatten(params)

    def function(params, *arrays):
        module = nnx.merge(graphdef, jax.tree.unflatten(structure, params), rest)
        return case.call(module, *arrays)

    scope = jax.export.SymbolicScope(case.constraints)
    arrays = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape(form), scope=scope), array.dtype)
        for form, array in zip(case.forms, case.arrays(), strict=True)
    ]
    exported = jax.export.export(jax.jit(function))(params, *arrays)
    read = jax.export.deserialize(exported.serialize())
    same(read.call(params, *case.arrays()), expected(case))


def two_devices(kind):
    return jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["vma", "no_vma"]
)
@over(*ALL, slow=WHOLE)
def test_shard_map_over_the_batch(request, case, check_vma):
    """Outputs, and the gradients of weights that all devices share."""
    if check_vma and not ERF_VARIES and str(case) == "FeedForward":
        reason = "jax.lax.erf itself refuses what varies over a mesh, from JAX 0.12 on"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    function, state = functional(case)
    sharded = jax.shard_map(
        function,
        mesh=two_devices(AxisType.Auto),
        in_specs=(P(), *[P("x")] * len(case.forms)),
        out_specs=P("x"),
        check_vma=check_vma,
    )
    loss_of, floats = scalar(case, sharded, state)

    @jax.jit
    def run(floats, *arrays):
        found = None if case in DECODING else jax.grad(loss_of)(floats)
        return sharded(state, *arrays), found

    outputs, found = run(floats, *case.arrays())
    same(outputs, expected(case))
    same(found, gradient(case))


@over(*ALL, slow=WHOLE)
def test_a_mesh_with_explicit_axes(case):
    """Outputs that are sharded over the batch, and gradients."""
    function, state = functional(case)
    loss_of, floats = scalar(case, function, state)
    mesh = two_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        replicated, over_batch = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
        state = jax.device_put(state, replicated)
        arrays = jax.device_put(case.arrays(), over_batch)
        floats = jax.device_put(floats[0], replicated), jax.device_put(floats[1], over_batch)

        def run(state, floats, *arrays):
            _, rest = nnx.split_state(state, nnx.Param, ...)
            found = None if case in DECODING else jax.grad(loss_of)(floats, rest, arrays)
            return function(state, *arrays), found

        outputs, found = jax.jit(run)(state, floats, *arrays)
        same(jax.device_get(outputs), expected(case))
        same(jax.device_get(found), gradient(case))
        for leaf in jax.tree.leaves(outputs):
            assert leaf.sharding.spec[0] == "x"


@over(*STATEFUL, slow=OTHERS)
def test_linen(case):
    """Flax's bridge takes a module into Linen, which holds its parameters."""

    linen = nnx.bridge.to_linen(Called, case)
    variables = linen.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, *case.arrays()
    )
    params = nnx.to_pure_dict(nnx.state(case.module(), nnx.Param))
    if params:
        params = nnx.restore_int_paths({"params": {"module": params}})["params"]
        truth = jax.tree.leaves(params)
        like = jax.tree.structure(variables["params"])
        variables = {**variables, "params": jax.tree.unflatten(like, truth)}
    same(jax.jit(linen.apply)(variables, *case.arrays()), expected(case))


@over(*[case for case in STATEFUL if "dtype" in case.options], slow=WHOLE)
def test_half_precision(case):
    """`dtype` computes in bfloat16 whatever comes, and so do bfloat16 parameters and inputs."""

    def half(tree):
        def cast(array):
            return array.astype(jnp.bfloat16) if is_floating(array) else array

        return jax.tree.map(cast, tree)

    function, state = functional(case)
    asked, _ = functional(case, dtype=jnp.bfloat16)
    run = jax.jit(lambda *arrays: (asked(state, *arrays), function(half(state), *half(arrays))))
    truth = jax.tree.leaves(expected(case))[0]
    for outputs in run(*case.arrays()):
        first = jax.tree.leaves(outputs)[0]
        chex.assert_type(first, jnp.bfloat16)
        np.testing.assert_allclose(first.astype(jnp.float32), truth, rtol=0.05, atol=0.05)
