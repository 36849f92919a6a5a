"""What the error of a conversion says of names that are near, and of layouts that would fit."""

import numpy as np
import pytest
from flax import nnx

from jattn import models, nn
from jattn.interop import (
    TRANSPOSE,
    ConversionError,
    Rule,
    load_pretrained,
    load_torch,
    to_flax,
    to_torch,
)
from tests.interop.folders import lm, tensors, weights, whole

RNGS = nnx.Rngs(0)


def linear():
    return nnx.Linear(16, 48, rngs=RNGS)


def suggested(module, weights, rules=None):
    with pytest.raises(ConversionError) as caught:
        load_torch(module, weights, rules)
    for item in caught.value.suggestions:
        assert f"  perhaps: {item}\n" in f"{caught.value}\n"
    return caught.value.suggestions


def renamed(weights, old, new):
    return {name.replace(old, new): tensor for name, tensor in weights.items()}


def test_a_name_misspelt():
    found = suggested(linear(), renamed(to_torch(linear()), "weight", "weigth"))
    assert found == ("weigth is the missing weight: the names are near",)


def test_a_name_that_is_not_near_by_its_shape():
    assert suggested(linear(), renamed(to_torch(linear()), "weight", "m")) == (
        "m is the missing weight: no other has its shape (48, 16)",
    )


def test_no_more_than_three_names_and_each_tensor_once():
    found = suggested(lm(), renamed(tensors(), "self_attn", "attn"))
    expected = [
        f"model.layers.0.attn.{name}.weight is the missing model.layers.0.self_attn.{name}.weight: "
        "the names are near"
        for name in ("k_proj", "o_proj", "q_proj")
    ]
    assert list(found) == expected


def test_the_numbers_of_layers_are_no_misspelling():
    source = {k: v for k, v in tensors().items() if "layers.1.self_attn" not in k}
    extra = {k: v for k, v in renamed(tensors(), ".1.", ".2.").items() if "layers.2.self_attn" in k}
    assert suggested(lm(), source | renamed(extra, "_proj.", "_project.")) == ()


def test_nothing_is_said_where_nothing_is_near():
    source = to_torch(linear())
    del source["weight"]
    assert suggested(linear(), source) == ()
    assert suggested(linear(), source | {"table": np.ones((7, 5), np.float32)}) == ()
    assert suggested(linear(), source | {"weight": np.ones((47, 16), np.float32)}) == ()
    assert suggested(linear(), source | {"weight": np.ones((48, 16), np.int32)}) == ()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((16, 48), "(16, 48) would fit transposed"),
        ((144, 16), "(144, 16) is three parts of (48, 16)"),
        ((48, 64), "(48, 64) is four parts of (48, 16)"),
        ((24, 16), "(24, 16) is one of two parts of (48, 16)"),
        ((48, 4, 4), "(48, 4, 4) would fit reshaped to (48, 16)"),
        ((768,), "(768,) would fit reshaped to (48, 16)"),
    ],
)
def test_the_layout_that_would_fit(shape, said):
    found = suggested(linear(), to_torch(linear()) | {"weight": np.ones(shape, np.float32)})
    assert found == (f"weight: {said}",)


def test_axes_in_another_order():
    target = nnx.State({"kernel": nnx.Param(np.ones((5, 3, 7), np.float32))})
    with pytest.raises(ConversionError) as caught:
        to_flax({"w": np.ones((7, 5, 3), np.float32)}, target, [Rule("w", "kernel")])
    (found,) = caught.value.suggestions
    assert found == "w: (7, 5, 3) would fit with its axes in the order (1, 2, 0)"


def test_heads_that_are_apart_or_not():
    """What PyTorch needs is said, in whichever form Flax keeps it."""
    module = nnx.MultiHeadAttention(6, 48, decode=False, rngs=RNGS)
    source = to_torch(module)
    heads = source["out_proj.weight"].reshape(48, 6, 8)
    assert suggested(module, source | {"out_proj.weight": heads}) == (
        "out_proj.weight: (48, 6, 8) would fit reshaped to (48, 48)",
    )
    query = source["in_proj_weight"][:48]
    for attention in (module, nn.MultiHeadAttention(6, 48, use_bias=True, rngs=RNGS)):
        assert suggested(attention, source | {"in_proj_weight": query}) == (
            "in_proj_weight: (48, 48) is one of three parts of (144, 48)",
        )


def test_a_part_that_is_missing_beside_others():
    rule = Rule(("q", "k"), "both")
    target = nnx.State({"both": nnx.Param(np.ones((2, 5, 3), np.float32))})
    part = np.ones((5, 3), np.float32)
    with pytest.raises(ConversionError, match=r"perhaps: kk is the missing k: no other has its sh"):
        to_flax({"q": part, "kk": part}, target, [rule])


def test_a_parameter_that_no_rule_fills():
    with pytest.raises(ConversionError, match=r"perhaps: biases is the missing bias: the names ar"):
        load_torch(
            linear(), renamed(to_torch(linear()), "bias", "biases"),
            [Rule("weight", "kernel", TRANSPOSE)],
        )  # fmt: skip


def test_an_error_that_explains_more_has_no_suggestions():
    network = nn.LSTM(3, 4, rngs=RNGS)
    source = {f"rnn.{name}": tensor for name, tensor in to_torch(network).items()}
    assert suggested(network, source) == ()


def test_where_all_sizes_are_others_multiples_are_chance():
    twice = models.causal_lm.Config(11, 8, 2, 2, 1, 4, 10)
    large = models.CausalLM(twice, rngs=RNGS)
    assert suggested(large, tensors()) == ()


def test_many_and_long_names_take_no_time():
    source = {f"{n}{'a' * 3000}": np.ones(2, np.float32) for n in range(500)}
    assert suggested(linear(), source) == ()


def test_a_folder_has_suggestions_too(tmp_path):
    folder = whole(tmp_path / "model")
    weights(folder, **{"lm_head.weight": None, "head.weight": tensors()["lm_head.weight"]})
    with pytest.raises(ConversionError) as caught:
        load_pretrained(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: out.kernel",
        "  unused: head.weight",
        "  perhaps: head.weight is the missing lm_head.weight: the names are near",
        f"  config.json of {folder} and its tensors contradict each other",
    ]
