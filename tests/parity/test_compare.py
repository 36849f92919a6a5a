"""A comparison is worth something only if a wrong port fails it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import nn
from jattn.interop import IDENTITY, Rule, torch_rules
from jattn.parity.compare import run
from jattn.parity.fixtures import Fixture, load
from jattn.parity.systems import SYSTEMS

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"


def fixture(name):
    return load(FOLDER / f"{name}.safetensors")


def failing(name, **changes):
    truth = fixture(name)
    system = dataclasses.replace(SYSTEMS[truth.system], **changes)
    return {row.name for row in run(truth, system=system).rows if not row.passed}


def changed_call(name, change):
    """The port, with its outputs changed."""
    call = SYSTEMS[fixture(name).system].call
    return lambda module, inputs, arguments: change(call(module, inputs, arguments))


def test_a_transposed_weight_fails():
    rules = torch_rules(nn.MultiHeadAttention)
    wrong = tuple(
        Rule("W_q.weight", "query.kernel", IDENTITY) if r.torch == ("W_q.weight",) else r
        for r in rules
    )
    assert "output/output" in failing("multi_head/self_attention", rules=wrong)


def test_swapped_weights_fail():
    rules = (Rule("W", "weight", SwappedRows()),)
    assert {"output/output", "grad/param/W"} <= failing("pooling/bilinear", rules=rules)


class SwappedRows:
    def forward(self, array):
        return array[::-1]

    inverse = forward


def test_an_inverted_mask_fails():
    def call(module, inputs, arguments):
        return SYSTEMS["masks/mask_algebra"].call(
            module, inputs | {"dense": ~inputs["dense"]}, arguments
        )

    assert "output/weights" in failing("masks/dense", call=call)


def test_a_forgotten_scale_fails():
    assert failing(
        "pooling/scaled_dot_product",
        build=lambda _arguments, _dtype: nn.DotProductAttention(scaled=False),
    )


def test_a_wrong_gradient_fails_though_the_outputs_are_right():
    def call(module, inputs, arguments):
        stopped = inputs | {"key": jax.lax.stop_gradient(inputs["key"])}
        return SYSTEMS["pooling/scaled_dot_product"].call(module, stopped, arguments)

    assert failing("pooling/scaled_dot_product", call=call) == {"grad/input/key"}


@pytest.mark.parametrize("change", [
    lambda outputs: {"output": outputs["output"]},
    lambda outputs: outputs | {"weights": outputs["weights"][..., :-1]},
    lambda outputs: outputs | {"weights": outputs["weights"].at[0, 0, 0].set(jnp.nan)},
    lambda outputs: outputs | {"weights": outputs["weights"].astype(jnp.float32)},
    lambda outputs: outputs | {"weights": outputs["weights"] > 0},
], ids=["missing", "unfit", "not a number", "rounded", "boolean"])  # fmt: skip
def test_a_wrong_output_fails(change):
    name = "pooling/scaled_dot_product"
    assert "output/weights" in failing(name, call=changed_call(name, change))


def test_an_output_too_many_fails():
    name = "masks/masked_softmax"
    call = changed_call(name, lambda outputs: outputs | {"more": jnp.zeros(3)})
    assert failing(name, call=call) == {"output/more"}


def test_integers_are_the_same_or_wrong():
    name = "multi_head/heads"
    call = changed_call(name, lambda outputs: outputs | {"lengths": outputs["lengths"] + 1})
    assert failing(name, call=call) == {"output/lengths"}


@pytest.mark.parametrize(("error", "passes"), [(0.9e-9, True), (1.1e-9, False)])
def test_the_rule_of_float64(error, passes):
    """The largest output is 8 and there are no gradients, so 8e-9 is allowed."""
    truth = Fixture("pooling/average", "rule", outputs={"output": np.array([2.0, -8.0])})
    system = dataclasses.replace(
        SYSTEMS["pooling/average"],
        call=lambda *_: {
            "output": jnp.array([2.0, -8.0], jnp.float64) + np.array([8 * error, 0.0])
        },
    )
    (row,) = run(truth, system=system).rows
    assert row.passed is passes
    assert row.max_error == pytest.approx(8 * error, rel=1e-6)
    assert row.relative_error == pytest.approx(error, rel=1e-6)
    assert row.ulps == pytest.approx(8 * error / 2.0**-49, rel=1e-6)


def test_the_rule_of_float32():
    """The root mean square of the error may be twice PyTorch's own."""
    expected = np.array([1.0, 3.0, 2.0, 1.0])

    def passes(error):
        truth = Fixture(
            "pooling/average",
            "rule",
            outputs={"output": expected},
            float32_errors={"output/output": 1e-3},
        )
        found = jnp.asarray(expected, jnp.float32) + np.float32(error)
        system = dataclasses.replace(SYSTEMS["pooling/average"], call=lambda *_: {"output": found})
        return run(truth, np.float32, system=system).passed

    assert passes(1.9e-3)
    assert not passes(2.1e-3)


def test_bad_requests():
    truth = fixture("pooling/average")
    with pytest.raises(
        ValueError, match="dtype: expected one of float64, float32, bfloat16, got float16"
    ):
        run(truth, np.float16)
    with pytest.raises(ValueError, match=r"expected a system of .*got 'pooling/none'"):
        run(dataclasses.replace(truth, system="pooling/none"))
    with pytest.raises(
        ValueError, match=r"pooling/scaled_dot_product: .*unexpected keyword argument 'depth'"
    ):
        run(dataclasses.replace(fixture("pooling/scaled_dot_product"), arguments={"depth": 3}))
    with pytest.raises(ValueError, match=r"pooling/average: average pooling cannot be .*'key'"):
        run(
            dataclasses.replace(
                truth, inputs={"query": truth.inputs["query"]}, cotangents={}, input_gradients={}
            )
        )
    with pytest.raises(ValueError, match=r"unused: W"):
        run(
            fixture("pooling/bilinear"),
            system=dataclasses.replace(SYSTEMS["pooling/scores"], rules=()),
        )


def test_nothing_compared_is_no_success():
    assert not run(
        Fixture("pooling/average", "empty"),
        system=dataclasses.replace(SYSTEMS["pooling/average"], call=lambda *_: {}),
    ).passed
