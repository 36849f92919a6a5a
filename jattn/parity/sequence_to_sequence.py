"""Rows 25 and 32: networks that write a sequence; how to build each from a fixture and call it."""

from typing import Any

import jax
from flax import nnx

from jattn.interop import torch_layouts as layouts
from jattn.models import char_rnn, luong
from jattn.parity.recurrent import translate
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def char_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 25: the network by its name, from its config."""
    sizes = {name: value for name, value in arguments.items() if name != "kind"}
    build = getattr(char_rnn, arguments["kind"])
    return build(char_rnn.Config(**sizes), param_dtype=dtype, rngs=nnx.Rngs(0))


def luong_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 32: from its config."""
    return luong.LuongTranslator(luong.Config(**arguments), param_dtype=dtype, rngs=nnx.Rngs(0))


def spell(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 25."""
    return {"logits": module(inputs["tokens"])}


def translate_luong(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 32, teacher-forced; without attention there are no weights."""
    if arguments.get("attention", True):
        return translate(module, inputs, arguments)
    return {"logits": module(inputs["source"], inputs["target_in"], lengths=inputs.get("lengths"))}


SYSTEMS = (
    System(
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
        rules=layouts.CHAR_RNN,
        note='"hello" → "ohlol"',
    ),
    System(
        32,
        "Luong encoder-decoder",
        functions=("jattn.scores.bilinear",),
        modules=("jattn.models.LuongTranslator",),
        paper="Luong et al. 2015",
        link="https://arxiv.org/abs/1508.04025",
        reference="luong.LuongTranslator",
        build=luong_module,
        call=translate_luong,
        rules=layouts.LUONG,
        note="`attention=False` is the plain LSTM encoder-decoder",
    ),
)
