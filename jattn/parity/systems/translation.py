"""Translators: encoder-decoders with attention, Bahdanau's and Luong's."""

from typing import Any

import jax
from flax import nnx

from jattn.models import bahdanau, luong
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def bahdanau_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config."""
    config = bahdanau.Config(**arguments)
    return bahdanau.BahdanauTranslator(config, param_dtype=dtype, rngs=nnx.Rngs(0))


def luong_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config."""
    return luong.LuongTranslator(luong.Config(**arguments), param_dtype=dtype, rngs=nnx.Rngs(0))


def translate(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Teacher-forced logits, and the weights where there is attention."""
    sequences, lengths = (inputs["source"], inputs["target_in"]), inputs.get("lengths")
    if not arguments.get("attention", True):
        return {"logits": module(*sequences, lengths=lengths)}
    logits, weights = module(*sequences, lengths=lengths, return_weights=True)
    return {"logits": logits, "weights": weights}


SYSTEMS = (
    System(
        "translation/bahdanau",
        31,
        "Bahdanau encoder-decoder",
        functions=(),
        modules=("jattn.models.BahdanauTranslator",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="bahdanau.BahdanauTranslator",
        build=bahdanau_module,
        call=translate,
    ),
    System(
        "translation/luong",
        32,
        "Luong encoder-decoder",
        functions=("jattn.scores.bilinear",),
        modules=("jattn.models.LuongTranslator",),
        paper="Luong et al. 2015",
        link="https://arxiv.org/abs/1508.04025",
        reference="luong.LuongTranslator",
        build=luong_module,
        call=translate,
        note="`attention=False` is the plain LSTM encoder-decoder",
    ),
)
