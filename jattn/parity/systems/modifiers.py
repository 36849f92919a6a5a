"""What positions add to the scores: ALiBi, T5's biases, and BERT's relative keys."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.attention import attend
from jattn.functional import masks, modifiers
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def biased(inputs: Arrays, arguments: Arguments, modifier: modifiers.Modifier) -> dict[str, Array]:
    """Attention of heads under a modifier, causal or not."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    mask = masks.causal() if arguments["causal"] else None
    output, weights = attend(query, key, value, modifier=modifier, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


def alibi(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """With the slopes of the fixture or, where it has none, those of the paper."""
    slopes: Any = inputs.get("slopes")
    if slopes is None:
        slopes = modifiers.alibi_slopes(inputs["query"].shape[-2])
    return biased(inputs, arguments, modifiers.alibi(slopes))


def t5_bias(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """With the table of the fixture."""
    options = {name: arguments[name] for name in ("bidirectional", "max_distance")}
    return biased(inputs, arguments, modifiers.t5_bias(inputs["table"], **options))


def relative_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The module that owns the table; whether it is causal is one of the call."""
    sizes = {name: each for name, each in arguments.items() if name != "causal"}
    return nn.RelativePositions(**sizes, param_dtype=dtype, rngs=nnx.Rngs(0))


def relative_key(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """With the module's table."""
    operands = inputs["query"], inputs["key"], inputs["value"]
    mask = masks.causal() if arguments.get("causal") else None
    output, weights = module(*operands, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        "modifiers/relative_key",
        22,
        "relative keys of BERT",
        functions=("jattn.modifiers.relative_key",),
        modules=("jattn.nn.RelativePositions",),
        paper="Shaw et al. 2018",
        link="https://arxiv.org/abs/1803.02155",
        reference="modifiers.RelativePositions",
        build=relative_module,
        call=relative_key,
        note="relative_key and relative_key_query",
    ),
    System(
        "modifiers/alibi",
        23,
        "ALiBi: a penalty on distance",
        functions=("jattn.modifiers.alibi", "jattn.modifiers.alibi_slopes"),
        paper="Press et al. 2022",
        link="https://arxiv.org/abs/2108.12409",
        reference="modifiers.Alibi",
        call=alibi,
    ),
    System(
        "modifiers/t5_bias",
        23,
        "T5's learned bias of distances",
        functions=("jattn.modifiers.t5_bias",),
        paper="Raffel et al. 2020",
        link="https://arxiv.org/abs/1910.10683",
        reference="modifiers.T5Bias",
        call=t5_bias,
    ),
)
