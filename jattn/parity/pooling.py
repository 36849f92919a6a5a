"""Rows 1 to 8: pooling, scores and masks; how to build each from a fixture and call it."""

from collections.abc import Callable
from typing import Any

import jax
from einops import rearrange
from flax import nnx

from jattn import nn
from jattn.attention import attend
from jattn.functional import masks, scores
from jattn.functional.softmax import masked_softmax
from jattn.interop import torch_layouts as layouts
from jattn.interop.rules import Rule
from jattn.parity.system import (
    Arguments,
    Arrays,
    Call,
    System,
    constructor,
    padding,
    without_parameters,
)

Array = jax.Array


def kernel_regression_module(_arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 3: whether a sample sees itself is a mask, not an argument of the module."""
    return nn.NadarayaWatson(param_dtype=dtype, rngs=nnx.Rngs(0))


def scored_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 7: the module of a score."""
    match arguments:
        case {"score": "dot_product"}:
            return nn.DotProductAttention(scaled=False)
        case {"score": "bilinear", **widths}:
            return nn.BilinearAttention(**widths, param_dtype=dtype, rngs=nnx.Rngs(0))
    return nn.CosineAttention()


def attend_single_head(inputs: Arrays, mask: Any, score: Callable[..., Array]) -> dict[str, Array]:
    """`attend` for operands [B, T, H] without a head axis."""
    query, key, value = (
        rearrange(inputs[name], "b t h -> b t 1 h") for name in ("query", "key", "value")
    )
    output, weights = attend(query, key, value, score=score, mask=mask, return_weights=True)
    return {
        "output": rearrange(output, "b t 1 v -> b t v"),
        "weights": rearrange(weights, "b 1 t s -> b t s"),
    }


def pool_with(score: Callable[..., Array]) -> Call:
    """Rows 1 and 2: attend with a score."""

    def call(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
        return attend_single_head(inputs, padding(inputs), score)

    return call


def pool(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Rows 3 and 5 to 7: a module that pools values."""
    mask = masks.no_self() if arguments.get("leave_one_out") else padding(inputs)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    output, weights = module(query, key, value, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


def softmax(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 4."""
    return {
        "weights": masked_softmax(
            inputs["scores"], inputs.get("mask"), lengths=inputs.get("lengths")
        )
    }


def mask_of(arguments: Arguments, inputs: Arrays) -> masks.Mask:
    """Row 8: the mask that a fixture names."""
    causal = masks.causal(arguments.get("offset", 0))
    window = masks.sliding_window(arguments.get("left", 0), arguments.get("right", 0))
    makers: dict[str, Callable[[], masks.Mask]] = {
        "causal": lambda: causal,
        "sliding_window": lambda: window,
        "no_self": masks.no_self,
        "padding": lambda: masks.padding(inputs["lengths"]),
        "prefix_lm": lambda: masks.prefix_lm(inputs["lengths"]),
        "segments": lambda: masks.segments(inputs["query_ids"], inputs["key_ids"]),
        "dense": lambda: masks.from_array(rearrange(inputs["dense"], "b t s -> b 1 t s")),
        "causal & padding": lambda: causal & masks.padding(inputs["lengths"]),
        "~window | causal & ~no_self": lambda: ~window | causal & masks.no_self(),
    }
    return makers[arguments["mask"]]()


def masked(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 8: scaled dot-product attention under a mask."""
    return attend_single_head(inputs, mask_of(arguments, inputs), scores.scaled_dot_product)


SYSTEMS = (
    System(
        1,
        "average pooling",
        functions=("jattn.attend", "jattn.scores.constant"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.AveragePooling",
        call=pool_with(scores.constant),
    ),
    System(
        2,
        "Nadaraya-Watson kernel regression",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.KernelRegression",
        call=pool_with(scores.gaussian),
    ),
    System(
        3,
        "Nadaraya-Watson kernel regression, parametric",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        modules=("jattn.nn.NadarayaWatson",),
        paper="Watson 1964",
        link="https://www.jstor.org/stable/25049340",
        reference="pooling.ParametricKernelRegression",
        build=kernel_regression_module,
        call=pool,
        rules=(Rule("w", "weight"),),
    ),
    System(
        4,
        "masked softmax",
        functions=("jattn.masked_softmax",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="pooling.MaskedSoftmax",
        call=softmax,
        note="a row with nothing to see is zeros; code that fills with −1e6 makes it uniform",
    ),
    System(
        5,
        "additive attention",
        functions=("jattn.scores.additive",),
        modules=("jattn.nn.AdditiveAttention",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="pooling.AdditiveAttention",
        build=constructor(nn.AdditiveAttention),
        call=pool,
        rules=layouts.ADDITIVE_ATTENTION,
    ),
    System(
        6,
        "scaled dot-product attention",
        functions=("jattn.attend", "jattn.dot_product_attention"),
        modules=("jattn.nn.DotProductAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="pooling.DotProductAttention",
        build=without_parameters(nn.DotProductAttention),
        call=pool,
    ),
    System(
        7,
        "dot-product, bilinear and cosine scores",
        functions=("jattn.scores.dot_product", "jattn.scores.bilinear", "jattn.scores.cosine"),
        modules=(
            "jattn.nn.DotProductAttention",
            "jattn.nn.BilinearAttention",
            "jattn.nn.CosineAttention",
        ),
        paper="Luong et al. 2015",
        link="https://arxiv.org/abs/1508.04025",
        reference="pooling.scored_attention",
        build=scored_module,
        call=pool,
        rules=(Rule("W", "weight"),),
    ),
    System(
        8,
        "masks and their algebra",
        functions=(
            "jattn.masks.padding",
            "jattn.masks.causal",
            "jattn.masks.no_self",
            "jattn.masks.segments",
            "jattn.masks.prefix_lm",
            "jattn.masks.sliding_window",
            "jattn.masks.from_array",
        ),
        paper="Dong et al. 2024",
        link="https://arxiv.org/abs/2412.05496",
        reference="pooling.MaskedAttention",
        call=masked,
        note="combined with `&`, `|` and `~`",
    ),
)
