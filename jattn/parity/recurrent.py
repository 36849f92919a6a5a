"""Rows 24 to 32: recurrent networks; how to build each from a fixture and call it."""

from typing import Any

import jax
from einops import rearrange
from flax import nnx

from jattn.interop import torch_layouts as layouts
from jattn.models import bahdanau
from jattn.nn.embedding import Embedding
from jattn.nn.recurrent import GRU, LSTM, RNN
from jattn.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def recurrent_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 24: the network, its cell or the embedding, by the name that PyTorch and jattn share."""
    options = {name: value for name, value in arguments.items() if name != "kind"}
    if options.get("activation") == "relu":
        options["activation"] = jax.nn.relu
    kinds = {"Embedding": Embedding, "RNN": RNN, "LSTM": LSTM, "GRU": GRU}
    kinds |= {"RNNCell": RNNCell, "LSTMCell": LSTMCell, "GRUCell": GRUCell}
    return kinds[arguments["kind"]](**options, param_dtype=dtype, rngs=nnx.Rngs(0))


def bahdanau_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 31: from its config."""
    return bahdanau.BahdanauTranslator(
        bahdanau.Config(**arguments), param_dtype=dtype, rngs=nnx.Rngs(0)
    )


def recur(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 24: PyTorch's states are [L · directions, B, F], ours [B, L · directions, F].

    An LSTM's is a pair.
    """
    if arguments["kind"] == "Embedding":
        return {"output": module(inputs["tokens"]), "table": module.renormalized(inputs["tokens"])}
    names = [name for name in ("state", "cell") if name in inputs]
    if arguments["kind"].endswith("Cell"):
        after = module(inputs["x"], _state([inputs[name] for name in names]))
        return dict(
            zip(("state", "cell"), after if isinstance(after, tuple) else (after,), strict=False)
        )
    state = _state([rearrange(inputs[name], "l b f -> b l f") for name in names])
    output, last = module(inputs["x"], state, lengths=inputs.get("lengths"))
    parts = [
        rearrange(part, "b l f -> l b f") for part in (last if isinstance(last, tuple) else (last,))
    ]
    return {"output": output, **dict(zip(("state", "cell"), parts, strict=False))}


def _state(parts: list[Array]) -> Any:
    return tuple(parts) if len(parts) > 1 else parts[0] if parts else None


def translate(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 31, teacher-forced."""
    lengths = inputs.get("lengths")
    logits, weights = module(
        inputs["source"], inputs["target_in"], lengths=lengths, return_weights=True
    )
    return {"logits": logits, "weights": weights}


SYSTEMS = (
    System(
        24,
        "recurrent networks and embedding",
        functions=tuple(
            f"jattn.functional.recurrence.{name}" for name in ("lstm_step", "gru_step")
        ),
        modules=tuple(
            f"jattn.nn.{name}"
            for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "Embedding")
        ),
        paper="Hochreiter and Schmidhuber 1997",
        link="https://doi.org/10.1162/neco.1997.9.8.1735",
        reference="recurrent.recurrent",
        build=recurrent_module,
        call=recur,
        rules=layouts.within(layouts.RECURRENT, "rnn")
        + layouts.within(layouts.RECURRENT_CELL, "rnn")
        + layouts.within(layouts.EMBEDDING, "embedding", ""),
        note=(
            "`lengths` has the meaning of packed sequences; the embedding of row 26 is proven here"
        ),
    ),
    System(
        31,
        "Bahdanau encoder-decoder",
        functions=(),
        modules=("jattn.models.BahdanauTranslator",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="recurrent.BahdanauTranslator",
        build=bahdanau_module,
        call=translate,
        rules=layouts.SEQ2SEQ,
    ),
)
