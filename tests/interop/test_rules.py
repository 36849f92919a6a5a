import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jattn.interop import (
    IDENTITY,
    TRANSPOSE,
    ConversionError,
    Rearrange,
    Rule,
    from_flax,
    to_flax,
    torch_rules,
    within,
)


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 5, use_bias=False, rngs=rngs) for _ in range(12)])
        self.scale = nnx.Param(jnp.ones(()))


RULES = (
    *within(torch_rules(nnx.Linear), "fc", "first"),
    Rule("stack.{layer}.weight", "layers.{layer}.kernel", TRANSPOSE),
    Rule("scale", "scale"),
)


def tensors(seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"fc.weight": (5, 3), "fc.bias": (5,), "scale": ()}
    shapes |= {f"stack.{layer}.weight": (5, 5) for layer in range(12)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def block():
    return Block(rngs=nnx.Rngs(0))


def test_each_tensor_lands_in_its_place():
    source = tensors()
    module = block()
    nnx.update(module, to_flax(source, module, RULES))
    np.testing.assert_array_equal(module.first.kernel[...], source["fc.weight"].T)
    np.testing.assert_array_equal(module.first.bias[...], source["fc.bias"])
    np.testing.assert_array_equal(module.layers[11].kernel[...], source["stack.11.weight"].T)
    np.testing.assert_array_equal(module.scale[...], source["scale"])


def test_round_trip_keeps_every_bit_of_every_dtype():
    source = tensors()
    source["fc.bias"][:3] = [np.nan, -np.inf, -0.0]
    module = block()
    for name, (parent, leaf), dtype in (
        ("scale", (module, "scale"), jnp.float16),
        ("stack.3.weight", (module.layers[3], "kernel"), jnp.bfloat16),
    ):
        source[name] = np.asarray(jnp.asarray(source[name], dtype))
        setattr(parent, leaf, nnx.Param(jnp.zeros_like(getattr(parent, leaf)[...], dtype)))
    back = from_flax(to_flax(source, module, RULES), RULES)
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_parameter_keeps_its_dtype_and_a_narrower_float_is_widened(dtype):
    source = tensors()
    source["fc.bias"] = np.asarray(jnp.asarray(source["fc.bias"], dtype))
    bias = to_flax(source, block(), RULES)["first"]["bias"][...]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, source["fc.bias"].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
def test_what_a_parameter_cannot_hold_exactly_is_refused(dtype):
    source = tensors() | {"fc.bias": np.ones(5, dtype)}
    with pytest.raises(ConversionError) as caught:
        to_flax(source, block(), RULES)
    (item,) = caught.value.unfit
    assert item.startswith("fc.bias → first.bias: ")
    assert f"{dtype} does not fit a parameter of float32" in item


def test_shapes_alone_are_enough_as_target():
    abstract = nnx.eval_shape(lambda: Block(rngs=nnx.Rngs(0)))
    state = to_flax(tensors(), nnx.state(abstract, nnx.Param), RULES)
    np.testing.assert_array_equal(state["first"]["bias"][...], tensors()["fc.bias"])


def test_sixty_four_bits_need_x64():
    with jax.enable_x64(True):
        rules = torch_rules(nnx.Linear)
        wide = nnx.Linear(3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        source = from_flax(wide, rules)
        assert from_flax(to_flax(source, wide, rules), rules)["bias"].dtype == np.float64
    with pytest.raises(ConversionError, match="JAX has no float64 unless jax_enable_x64 is set"):
        to_flax(source, wide, rules)


def test_one_error_lists_all_that_is_wrong_and_nothing_changes():
    source = tensors()
    del source["stack.7.weight"]
    source |= {
        "extra": np.ones(2),
        "stack.12.weight": np.ones((5, 5), np.float32),
        "stack.01.weight": np.ones((5, 5), np.float32),
    }
    source["fc.weight"] = np.ones((3, 5), np.float32)
    source["fc.bias"] = np.ones((5, 1), np.float32)
    source["stack.2.weight"] = np.ones(5, np.float32)
    rules = (*RULES, Rule("scale", "first.bias"))
    module = block()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    with pytest.raises(ConversionError) as caught:
        to_flax(source, module, rules)
    error = caught.value
    assert error.missing == ("layers.7.kernel",)
    assert [item.split(" ")[0] for item in error.unused] == [
        "extra",
        "stack.01.weight",
        "stack.12.weight",
    ]
    assert any(item.startswith("scale matches ") for item in error.ambiguous)
    assert any(item.startswith("first.bias is filled more than once") for item in error.ambiguous)
    assert {item.split(" ")[0] for item in error.unfit} == {
        "fc.weight",
        "fc.bias",
        "stack.2.weight",
    }
    for item in (*error.missing, *error.unused, *error.ambiguous, *error.unfit):
        assert item in str(error)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module)))


def test_a_parameter_without_a_rule_is_unused_on_the_way_back():
    with pytest.raises(ConversionError) as caught:
        from_flax(block(), RULES[1:])
    assert caught.value.unused == ("first.kernel",)


class Packed(nnx.Module):
    def __init__(self):
        self.query, self.key, self.value = (nnx.Param(jnp.zeros((3, 5))) for _ in range(3))


PACK = Rule(
    "packed", ("query", "key", "value"), Rearrange("(parts o) i -> parts i o", {"parts": 3})
)


def test_a_packed_tensor_is_taken_apart_and_put_together():
    packed = np.arange(45.0, dtype=np.float32).reshape(15, 3)
    state = to_flax({"packed": packed}, Packed(), [PACK])
    np.testing.assert_array_equal(state["key"][...], packed[5:10].T)
    np.testing.assert_array_equal(from_flax(state, [PACK])["packed"], packed)


def test_several_tensors_are_packed_into_one():
    rule = Rule(("q", "k", "v"), "packed", Rearrange("parts o i -> i (parts o)", {"parts": 3}))
    parts = {name: np.full((5, 3), number, np.float32) for number, name in enumerate("qkv")}
    target = nnx.State({"packed": nnx.Param(jnp.zeros((3, 15)))})
    state = to_flax(parts, target, [rule])
    np.testing.assert_array_equal(
        state["packed"][0], np.repeat(np.arange(3.0, dtype=np.float32), 5)
    )
    np.testing.assert_array_equal(from_flax(state, [rule])["v"], parts["v"])
    with pytest.raises(ConversionError, match="missing: k ") as caught:
        to_flax({"q": parts["q"], "v": parts["v"]}, target, [rule])
    assert len(caught.value.missing) == 1
    with pytest.raises(ConversionError, match="parts differ"):
        to_flax(parts | {"k": parts["k"].astype(np.float16)}, target, [rule])


def test_a_layout_that_gives_the_wrong_number_of_parts():
    rule = dataclasses.replace(PACK, layout=Rearrange("(parts o) i -> parts i o", {"parts": 5}))
    with pytest.raises(ConversionError, match="not 3 parts"):
        to_flax({"packed": np.zeros((15, 3), np.float32)}, Packed(), [rule])


@dataclasses.dataclass(frozen=True)
class Gates:
    """Gate blocks along the first axis in another order: a layout of a user's own."""

    order: tuple[int, ...]

    def forward(self, array):
        return np.concatenate([np.split(array, len(self.order))[gate] for gate in self.order])

    def inverse(self, array):
        return np.concatenate(
            [np.split(array, len(self.order))[gate] for gate in np.argsort(self.order)]
        )


class Tied:
    """Two names in PyTorch, one parameter here."""

    def forward(self, array):
        if array[0].tobytes() != array[1].tobytes():
            raise ValueError("the tied tensors differ")
        return array[0]

    def inverse(self, array):
        return np.stack([array, array])


def test_a_layout_is_any_object_with_two_ways():
    target = nnx.State({"bias": nnx.Param(jnp.zeros(12)), "table": nnx.Param(jnp.zeros((5, 3)))})
    rules = (Rule("b", "bias", Gates((2, 0, 3, 1))), Rule(("embed", "decode"), "table", Tied()))
    table = np.ones((5, 3), np.float32)
    source = {"b": np.arange(12, dtype=np.float32), "embed": table, "decode": table}
    state = to_flax(source, target, rules)
    np.testing.assert_array_equal(state["bias"][:6], np.array([6, 7, 8, 0, 1, 2], np.float32))
    back = from_flax(state, rules)
    for name, tensor in source.items():
        np.testing.assert_array_equal(back[name], tensor)
    with pytest.raises(ConversionError, match="tied tensors differ"):
        to_flax(source | {"decode": 2 * table}, target, rules)


def test_placeholders_differ():
    with pytest.raises(ValueError, match="same placeholders"):
        Rule("a.{layer}", "b.{block}")


def test_a_repeated_placeholder_means_the_same_number():
    rule = Rule("{i}.w{i}", "w.{i}")
    target = nnx.State({"w": {4: nnx.Param(jnp.zeros(2))}})
    assert to_flax({"4.w4": np.ones(2, np.float32)}, target, [rule])["w"][4].shape == (2,)
    with pytest.raises(ConversionError, match="unused"):
        to_flax({"4.w5": np.ones(2, np.float32)}, target, [rule])


PATTERNS = [
    "a b c -> c (b a)",
    "(b a) c -> a b c",
    "... -> ...",
    "a b c -> b a c",
    "1 (a b) c -> a (c b)",
]


DTYPES = ["float16", "float32", "float64", "int64"]


@given(st.sampled_from(PATTERNS), st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(DTYPES))
def test_every_pattern_goes_both_ways(pattern, lengths, dtype):
    a, b, c = lengths
    shape = {"a": (a, b, c), "(": (b * a, c), ".": lengths, "1": (1, a * b, c)}[pattern[0]]
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    sizes = {"a": a, "b": b} if "(" in pattern else {}
    layout = IDENTITY if pattern == IDENTITY.pattern else Rearrange(pattern, sizes)
    back = layout.inverse(layout.forward(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_size_that_the_parameter_tells():
    heads = Rearrange("(parts n h) i -> parts i n h", {"parts": 3, "n": None})
    rule = Rule("packed", ("query", "key", "value"), heads)
    packed = np.arange(90.0, dtype=np.float32).reshape(18, 5)
    for n, h in ((2, 3), (3, 2), (1, 6)):
        shape = jnp.zeros((5, n, h))
        target = nnx.State({name: nnx.Param(shape) for name in ("query", "key", "value")})
        state = to_flax({"packed": packed}, target, [rule])
        assert state["key"].shape == (5, n, h)
        np.testing.assert_array_equal(state["key"][4, n - 1], packed[6 + n * h - h : 6 + n * h, 4])
        np.testing.assert_array_equal(from_flax(state, [rule])["packed"], packed)
    with pytest.raises(ConversionError, match=r"\(17, 5\) does not fit the layout"):
        to_flax({"packed": packed[:17]}, target, [rule])
    with pytest.raises(ValueError, match=r"n must stand alone on the right side of"):
        Rearrange("n h i -> i (n h)", {"n": None})


def test_a_rule_without_a_path_ignores_a_tensor():
    """It says so for one name, or for those of every layer; on the way back nothing is written."""
    source = tensors() | {"rotary.inv_freq": np.ones(3), "stack.3.position_ids": np.arange(4)}
    with pytest.raises(ConversionError) as caught:
        to_flax(source, block(), RULES)
    assert caught.value.unused == ("rotary.inv_freq", "stack.3.position_ids")
    rules = (
        *RULES,
        Rule("rotary.inv_freq", ()),
        *within([Rule("position_ids", ())], "stack.{layer}", "layers.{layer}"),
    )
    state = to_flax(source, block(), rules)
    back = from_flax(state, rules)
    assert back.keys() == tensors().keys()
    assert to_flax(tensors(), block(), rules)["scale"].shape == ()  # what is ignored may be absent
    with pytest.raises(ConversionError, match=r"scale matches scale → scale; scale → nothing"):
        to_flax(tensors(), block(), (*RULES, Rule("scale", ())))
