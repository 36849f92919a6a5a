"""A port that is wrong in a known way: the report names the layer, and what would mend it."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.interop import IDENTITY, ConversionError, Rule
from jattn.parity.cli import main
from jattn.parity.diffing import assert_matches, diff
from jattn.parity.fixtures import Fixture, load
from tests.parity.tagger import FIXTURE, D, H, N, run_lstm, turn


@pytest.fixture(scope="module")
def recorded():
    return load(FIXTURE)


class Attention(nnx.Module):
    def __init__(self, wrong, rngs):
        self.wrong = wrong
        use_bias = wrong != "no bias"
        self.query, self.key, self.value = (nnx.Linear(D, D, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(D, D, use_bias=use_bias, rngs=rngs)

    def __call__(self, x, mask):
        query, key, value = (self.split(each(x)) for each in (self.query, self.key, self.value))
        scale = D if self.wrong == "scale" else H
        query, key = (turn(each, neighbours=self.wrong == "rotary") for each in (query, key))
        scores = jnp.einsum("bnth,bnsh->bnts", query, key) / scale**0.5
        mask = ~mask if self.wrong == "mask" else mask
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=0 if self.wrong == "softmax" else -1)
        output = weights @ value
        if self.wrong == "merge":
            return self.out(output.reshape(x.shape))
        return self.out(output.swapaxes(1, 2).reshape(x.shape))

    def split(self, x):
        B, T, _ = x.shape
        if self.wrong == "heads":
            return x.reshape(B, N, T, H)
        return x.reshape(B, T, N, H).swapaxes(1, 2)


class Block(nnx.Module):
    def __init__(self, wrong, rngs):
        self.wrong = wrong
        epsilon = 1e-6 if wrong == "eps" else 1e-5
        self.attention = Attention(wrong, rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(D, epsilon=epsilon, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask):
        if self.wrong == "norm order":
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))

    def mlp(self, x):
        return self.down(jax.nn.gelu(self.up(x), approximate=self.wrong == "gelu"))


class LSTM(nnx.Module):
    def __init__(self, wrong, rngs):
        self.wrong = wrong
        self.weight_ih, self.weight_hh = (
            nnx.Param(jax.random.normal(rngs.params(), (size, 4 * D))) for size in (6, D)
        )
        self.bias_ih, self.bias_hh = (nnx.Param(jnp.zeros(4 * D)) for _ in range(2))

    def __call__(self, x):
        def gates(x, h):
            found = x @ self.weight_ih[...] + self.bias_ih[...]
            found = found + h @ self.weight_hh[...] + self.bias_hh[...]
            i, f, g, o = jnp.split(found, 4, axis=-1)
            return (i, g, f, o) if self.wrong == "gates" else (i, f, g, o)

        return run_lstm(x, gates)


class Tagger(nnx.Module):
    """The port; `wrong` names what is wrong with its second block, or with its LSTM."""

    def __init__(self, wrong=None):
        rngs = nnx.Rngs(0)
        self.lstm = LSTM(wrong, rngs)
        self.blocks = nnx.List([Block(None, rngs), Block(wrong, rngs)])
        self.head = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x, mask):
        x = self.lstm(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def port(wrong=None):
    model = Tagger(wrong)
    if wrong != "dropout":
        model.eval()
    return model


@pytest.fixture(scope="module")
def right(recorded):
    """The report of a port that is right."""
    return diff(recorded, port())


def test_a_right_port_is_equal_in_every_layer_forward_and_backward(recorded, right):
    report = right
    assert report.passed, str(report)
    assert report.first is None and report.first_backward is None and report.hints == ()
    assert len(report.rows) == 1 + 1 + len(recorded.parameters)
    assert report.pairs["blocks.1.attention.query"] == "blocks.1.attention.query"
    assert report.pairs["lstm"] == "lstm"
    for row in report.layers:
        assert row.alone is not None and row.alone < 1e-12 and row.error < 1e-12
    assert sum(row.gradient is not None for row in report.layers) > 15


HINTS = {
    "gates": ("lstm[0]", "blocks (gates)"),
    "gelu": ("blocks.1[0]", "matches with erf GELU instead of the other form"),
    "eps": ("blocks.1.norm1[0]", "matches with eps 1e-05"),
    "mask": ("blocks.1.attention[0]", "matches if the mask is inverted"),
    "scale": ("blocks.1.attention[0]", "matches with scale 1/√4"),
    "rotary": ("blocks.1.attention[0]", "rotary positions are interleaved"),
    "heads": ("blocks.1.attention[0]", "heads were split without one"),
    "merge": ("blocks.1.attention[0]", "heads were split without one"),
    "softmax": ("blocks.1.attention[0]", "matches with the softmax over axis -1"),
    "dropout": ("blocks.0[0]", "dropout was on"),
    "norm order": ("blocks.1[0]", None),
}


def doubled(names):
    x = np.array([[1.0, 2.0], [3.0, 5.0]])
    outputs = {"twice": 2 * x, "half": x / 2}
    return Fixture(
        "yours/both", "both", inputs={"x": x}, outputs={name: outputs[name] for name in names},
        cotangents={"twice": x, "half": 1 + x}, input_gradients={"x": 2 * x + (1 + x) / 2},
    )  # fmt: skip


@pytest.mark.parametrize("names", [("twice", "half"), ("half", "twice")])
def test_outputs_by_name_are_held_against_those_of_the_same_name(names):
    def port(x):
        return {"half": x / 2, "twice": 2 * x}

    assert_matches(doubled(names), port)
    assert_matches(doubled(names), port, call=lambda module, given: module(given["x"]))
    with pytest.raises(ValueError, match="its outputs twice lack half"):
        diff(doubled(names), lambda x: {"twice": 2 * x})


def test_pairs_and_rules_that_are_given_are_kept_and_all_others_guessed(recorded, right):
    name = "blocks.1.attention.query"
    rules = [rule for rule in right.rules if f"{name}.weight" in rule.torch]
    report = diff(recorded, port(), pairs={name: name}, rules=rules)
    assert report.passed and report.pairs == right.pairs
    with pytest.raises(ValueError, match="pairs: PyTorch's module has no layer 'heads'"):
        diff(recorded, port(), pairs={"heads": "head"})


def test_outputs_that_pytorch_has_not_are_counted():
    x = np.array([1.0, 2.0])
    fixture = Fixture("yours/double", "double", inputs={"x": x}, outputs={"output": 2 * x})
    report = diff(fixture, lambda x: (2 * x, x))
    assert report.passed and report.more == 1
    assert "1 of 1 outputs and gradients are equal; the port has 1 more" in str(report)


QUICK = ("eps",)


@pytest.mark.parametrize(
    "wrong",
    [wrong if wrong in QUICK else pytest.param(wrong, marks=pytest.mark.slow) for wrong in HINTS],
)
def test_a_fault_is_found_in_its_layer_and_what_mends_it_is_said(recorded, wrong):
    label, hint = HINTS[wrong]
    report = diff(recorded, port(wrong))
    assert not report.passed
    assert report.first.torch == label, str(report)
    if hint is None:
        assert report.hints == ()
    else:
        assert any(hint in each for each in report.hints), str(report)
    with pytest.raises(AssertionError, match="differs from PyTorch"):
        assert_matches(recorded, port(wrong))


def test_a_transposed_weight_is_found_in_its_layer(recorded, right):
    name = "blocks.1.attention.query.weight"
    rules = [replace(rule, layout=IDENTITY) if name in rule.torch else rule for rule in right.rules]
    report = diff(recorded, port(), rules=rules)
    assert report.first.torch == "blocks.1.attention.query[0]"
    assert report.hints == ("matches if kernel is transposed",)


def test_a_missing_bias_has_no_place_and_what_ignores_it_differs_in_its_layer(recorded, right):
    name = "blocks.1.attention.out.bias"
    with pytest.raises(ConversionError, match=rf"unused: {name}"):
        diff(recorded, port("no bias"))
    rules = [*(rule for rule in right.rules if name not in rule.torch), Rule(name, ())]
    report = diff(recorded, port("no bias"), rules=rules)
    assert report.first.torch == "blocks.1.attention.out[0]"
    assert "a bias is missing" in report.hints[0]


README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.mark.torch
def test_the_walk_through_of_the_readme_finds_what_it_says(tmp_path, capsys):
    text = README.read_text(encoding="utf-8").partition("## Port a module, prove it")[2]
    program = text.partition("```python\n")[2].partition("```")[0]
    changes = (
        ("decode=False, ", "decode=False, attention_fn=attention_fn(), "),
        ("LayerNorm(24, ", "LayerNorm(24, epsilon=1e-5, "),
        ("self.linear1(x)", "self.linear1(x), approximate=False"),
    )
    source, fixture = tmp_path / "my_port.py", str(tmp_path / "layer.safetensors")
    source.write_text("from jattn.nn import attention_fn\n" + program)
    assert main(["parity", "record", f"{source}:original", "-o", fixture]) == 0
    said = [line for line in text.splitlines() if line.startswith("  matches ")]
    assert len(said) == 3
    for hint, (before, after) in zip(said, changes, strict=True):
        assert main(["parity", "diff", fixture, f"{source}:port"]) == 1
        assert capsys.readouterr().out.rstrip().endswith(hint)
        source.write_text(source.read_text().replace(before, after))
    assert main(["parity", "diff", fixture, f"{source}:port"]) == 0
    assert "14 of 14 outputs and gradients are equal" in capsys.readouterr().out
