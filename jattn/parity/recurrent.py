"""Rows 24 to 32: recurrent networks; how each is built from a fixture and called with its inputs."""

from typing import Any

import jax
from einops import rearrange
from flax import nnx

from jattn.interop import torch_layouts as layouts
from jattn.models import seq2seq
from jattn.nn.recurrent import GRU, GRUCell
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def recurrent_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 24: the network or its cell."""
    kind, widths = arguments["kind"], {name: value for name, value in arguments.items() if name != "kind"}
    return {"gru": GRU, "gru_cell": GRUCell}[kind](**widths, param_dtype=dtype, rngs=nnx.Rngs(0))


def seq2seq_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 31: from its config."""
    return seq2seq.Seq2Seq(seq2seq.Config(**arguments), param_dtype=dtype, rngs=nnx.Rngs(0))


def recur(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 24: PyTorch's states are [L, B, F], ours [B, L, F]."""
    if arguments["kind"] == "gru_cell":
        return {"state": module(inputs["x"], inputs["state"])}
    state = rearrange(inputs["state"], "l b f -> b l f") if "state" in inputs else None
    output, last = module(inputs["x"], state, lengths=inputs.get("lengths"))
    return {"output": output, "state": rearrange(last, "b l f -> l b f")}


def translate(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 31, teacher-forced."""
    lengths = inputs.get("lengths")
    logits, weights = module(inputs["source"], inputs["target_in"], lengths=lengths, return_weights=True)
    return {"logits": logits, "weights": weights}


SYSTEMS = (
    System(
        24,
        "gated recurrent unit",
        functions=("jattn.nn.recurrent.gru_step",),
        modules=("jattn.nn.GRU", "jattn.nn.GRUCell"),
        paper="Cho et al. 2014",
        link="https://arxiv.org/abs/1406.1078",
        reference="recurrent.recurrent",
        build=recurrent_module,
        call=recur,
        rules=layouts.within(layouts.GRU, "rnn") + layouts.within(layouts.GRU_CELL, "cell"),
        note="not yet the row's RNN, LSTM, both directions and projections",
    ),
    System(
        31,
        "Bahdanau encoder-decoder",
        functions=(),
        modules=("jattn.models.Seq2Seq",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="recurrent.Seq2Seq",
        build=seq2seq_module,
        call=translate,
        rules=layouts.SEQ2SEQ,
    ),
)
