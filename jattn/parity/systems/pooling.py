"""Attention pooling: averages, kernel regression, and one score after another."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.functional import masks, scores
from jattn.parity.system import (
    Arguments,
    Arrays,
    Call,
    System,
    attend_single_head,
    constructor,
    padding,
    without_parameters,
)

Array = jax.Array


def kernel_regression_module(_arguments: Arguments, dtype: Any) -> nnx.Module:
    """Whether a sample sees itself is a mask, not an argument of the module."""
    return nn.NadarayaWatson(param_dtype=dtype, rngs=nnx.Rngs(0))


def scored_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The module of a score."""
    match arguments:
        case {"score": "dot_product"}:
            return nn.DotProductAttention(scaled=False)
        case {"score": "bilinear", **widths}:
            return nn.BilinearAttention(**widths, param_dtype=dtype, rngs=nnx.Rngs(0))
    return nn.CosineAttention()


def pool_with(score: Callable[..., Array]) -> Call:
    """Attend with a score that has no parameters."""

    def call(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
        return attend_single_head(inputs, padding(inputs), score)

    return call


def pool(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """A module that pools values; of its samples each sees all, or all others."""
    mask = masks.no_self() if arguments.get("leave_one_out") else padding(inputs)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    output, weights = module(query, key, value, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        "pooling/average",
        1,
        "average pooling",
        functions=("jattn.attend", "jattn.scores.constant"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.AveragePooling",
        call=pool_with(scores.constant),
    ),
    System(
        "pooling/kernel_regression",
        2,
        "Nadaraya-Watson kernel regression",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.KernelRegression",
        call=pool_with(scores.gaussian),
    ),
    System(
        "pooling/parametric_kernel_regression",
        3,
        "Nadaraya-Watson kernel regression, parametric",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        modules=("jattn.nn.NadarayaWatson",),
        paper="Watson 1964",
        link="https://www.jstor.org/stable/25049340",
        reference="pooling.ParametricKernelRegression",
        build=kernel_regression_module,
        call=pool,
    ),
    System(
        "pooling/additive",
        5,
        "additive attention",
        functions=("jattn.scores.additive",),
        modules=("jattn.nn.AdditiveAttention",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="pooling.AdditiveAttention",
        build=constructor(nn.AdditiveAttention),
        call=pool,
    ),
    System(
        "pooling/scaled_dot_product",
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
        "pooling/scores",
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
    ),
)
