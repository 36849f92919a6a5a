"""Recurrent networks and their cells: plain, LSTM and GRU."""

from typing import Any

import jax
from einops import rearrange
from flax import nnx

from jattn import nn
from jattn.interop import torch_rules, within
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def recurrent_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The network or cell, by the name that PyTorch and jattn share."""
    options = {name: value for name, value in arguments.items() if name != "kind"}
    if options.get("activation") == "relu":
        options["activation"] = jax.nn.relu
    kinds: dict[str, Any] = {
        kind.__name__: kind
        for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    }
    return kinds[arguments["kind"]](**options, param_dtype=dtype, rngs=nnx.Rngs(0))


def recur(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """PyTorch's states are [L · directions, B, F], ours [B, L · directions, F]."""
    state = _state([rearrange(part, "l b f -> b l f") for part in _parts(inputs)])
    output, last = module(inputs["x"], state, lengths=inputs.get("lengths"))
    return {
        "output": output,
        **{name: rearrange(part, "b l f -> l b f") for name, part in _named(last).items()},
    }


def step(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """One step of a cell."""
    return _named(module(inputs["x"], _state(_parts(inputs))))


def _parts(inputs: Arrays) -> list[Array]:
    return [inputs[name] for name in ("state", "cell") if name in inputs]


def _state(parts: list[Array]) -> Any:
    return tuple(parts) if len(parts) > 1 else parts[0] if parts else None


def _named(state: Any) -> dict[str, Array]:
    parts = state if isinstance(state, tuple) else (state,)
    return dict(zip(("state", "cell"), parts, strict=False))


SYSTEMS = (
    System(
        "recurrent/network",
        24,
        "recurrent networks",
        functions=(),
        modules=("jattn.nn.RNN", "jattn.nn.LSTM", "jattn.nn.GRU"),
        paper="Hochreiter and Schmidhuber 1997",
        link="https://doi.org/10.1162/neco.1997.9.8.1735",
        reference="recurrent.Recurrent",
        build=recurrent_module,
        call=recur,
        rules=within(torch_rules(nn.LSTM), "rnn"),
        note="`lengths` has the meaning of packed sequences",
    ),
    System(
        "recurrent/cell",
        24,
        "recurrent cells",
        functions=(
            "jattn.functional.recurrence.lstm_step",
            "jattn.functional.recurrence.gru_step",
        ),
        modules=("jattn.nn.RNNCell", "jattn.nn.LSTMCell", "jattn.nn.GRUCell"),
        paper="Cho et al. 2014",
        link="https://arxiv.org/abs/1406.1078",
        reference="recurrent.Cell",
        build=recurrent_module,
        call=step,
        rules=within(torch_rules(nn.LSTMCell), "rnn"),
    ),
)
