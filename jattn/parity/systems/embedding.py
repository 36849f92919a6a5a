"""The table of vectors, with PyTorch's padding, norms and counted gradients."""

from typing import Any

import jax

from jattn import nn
from jattn.interop import torch_rules, within
from jattn.parity.system import Arguments, Arrays, System, constructor

Array = jax.Array


def look_up(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """The rows of the tokens, and the table as `max_norm` rewrites it."""
    tokens = inputs["tokens"]
    return {"output": module(tokens), "table": module.renormalized(tokens)}


SYSTEMS = (
    System(
        "embedding/table",
        26,
        "embedding",
        functions=(),
        modules=("jattn.nn.Embedding",),
        paper="Bengio et al. 2003",
        link="https://www.jmlr.org/papers/v3/bengio03a.html",
        reference="embedding.Embedding",
        build=constructor(nn.Embedding),
        call=look_up,
        rules=within(torch_rules(nn.Embedding), "embedding"),
    ),
)
