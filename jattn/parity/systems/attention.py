"""Attention with a sink for each head."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.attention import attend_with_sink
from jattn.functional import masks
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def sink_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The module that owns the sinks, where they are learned."""
    if not arguments.get("learned", True):
        return nnx.Module()
    return nn.AttentionSink(arguments["num_heads"], param_dtype=dtype, rngs=nnx.Rngs(0))


def attend_to_sink(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """With the learned sinks or, where there are none, a sink of 0."""
    attend = module if arguments.get("learned", True) else attend_with_sink
    offset = arguments.get("offset")
    mask = None if offset is None else masks.causal(offset)
    operands = inputs["query"], inputs["key"], inputs["value"]
    output, weights = attend(*operands, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        "attention/sink",
        23,
        "attention sinks",
        functions=("jattn.attend_with_sink",),
        modules=("jattn.nn.AttentionSink",),
        paper="OpenAI 2025",
        link="https://arxiv.org/abs/2508.10925",
        reference="attention.SinkAttention",
        build=sink_module,
        call=attend_to_sink,
        note="a sink of 0, that of `attend_with_sink`, is softmax-off-by-one",
    ),
)
