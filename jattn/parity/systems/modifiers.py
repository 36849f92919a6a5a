"""Biases of position that are added to the scores: ALiBi and T5's."""

from typing import Any

import jax

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


SYSTEMS = (
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
