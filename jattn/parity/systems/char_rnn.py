"""Character networks: "hello" becomes "ohlol"."""

from typing import Any

import jax
from flax import nnx

from jattn.models import char_rnn
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def char_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The network by its name, from its config."""
    sizes = {name: value for name, value in arguments.items() if name != "kind"}
    build = getattr(char_rnn, arguments["kind"])
    return build(char_rnn.Config(**sizes), param_dtype=dtype, rngs=nnx.Rngs(0))


def spell(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Logits of the next characters."""
    return {"logits": module(inputs["tokens"])}


SYSTEMS = (
    System(
        "char_rnn/spelling",
        25,
        "character network",
        functions=(),
        modules=tuple(
            f"jattn.models.{name}" for name in ("CharCell", "CharRNN", "EmbeddedCharRNN")
        ),
        paper="Elman 1990",
        link="https://doi.org/10.1207/s15516709cog1402_1",
        reference="char_rnn.char_rnn",
        build=char_module,
        call=spell,
        note='"hello" → "ohlol"',
    ),
)
