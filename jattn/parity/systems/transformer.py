"""The Transformer: layers and stacks as PyTorch has them, and models made of them."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.interop import torch_masks
from jattn.interop.rules import within
from jattn.interop.torch.transformer import READER, WRITER
from jattn.models import feature_encoder, transformer
from jattn.nn.transformer_layers import layer_norm
from jattn.parity.system import Arguments, Arrays, Build, System, constructor

Array = jax.Array
VASWANI: dict[str, Any] = {
    "paper": "Vaswani et al. 2017",
    "link": "https://arxiv.org/abs/1706.03762",
}


def _masks(
    inputs: Mapping[str, Array], num_heads: int, attn_mask: str, padding: str, prefix: str = ""
) -> dict[str, Any]:
    """Two masks in PyTorch's form as a mask and a modifier."""
    given = inputs.get(attn_mask), inputs.get(padding)
    mask, modifier = torch_masks(*given, num_heads=num_heads)
    return {f"{prefix}mask": mask, f"{prefix}modifier": modifier}


def encode(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The output of an encoder layer, or of a stack of them."""
    masks = _masks(inputs, arguments["num_heads"], "attn_mask", "key_padding_mask")
    return {"output": module(inputs["x"], **masks)}


def decode(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The output of a decoder layer, or of a stack of them."""
    N = arguments["num_heads"]
    masks = _masks(inputs, N, "attn_mask", "key_padding_mask")
    masks |= _masks(inputs, N, "memory_mask", "memory_key_padding_mask", "memory_")
    return {"output": module(inputs["x"], inputs["memory"], **masks)}


def both(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The output of a whole Transformer."""
    masks: dict[str, Any] = {}
    for torch, ours in (("src", "source"), ("tgt", "target"), ("memory", "memory")):
        names = f"{torch}_mask", f"{torch}_key_padding_mask"
        masks |= _masks(inputs, arguments["num_heads"], *names, f"{ours}_")
    return {"output": module(inputs["source"], inputs["target"], **masks)}


def stack(kind: Any, layer: Any) -> Build:
    """A stack of layers, and a norm if the fixture has one."""

    def build(arguments: Arguments, dtype: Any) -> nnx.Module:
        sizes = dict(arguments)
        number, final_norm = sizes.pop("num_layers"), sizes.pop("final_norm", False)
        options: dict[str, Any] = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
        layers = [layer(**sizes, **options) for _ in range(number)]
        return kind(layers, layer_norm(sizes["features"], 1e-5, options) if final_norm else None)

    return build


def features_encoder(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config."""
    config = feature_encoder.Config(**arguments)
    return feature_encoder.FeatureEncoder(config, param_dtype=dtype, rngs=nnx.Rngs(0))


def features_classifier(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config and the number of classes."""
    sizes = dict(arguments)
    classes = sizes.pop("classes")
    config = feature_encoder.Config(**sizes)
    return feature_encoder.FeatureClassifier(config, classes, param_dtype=dtype, rngs=nnx.Rngs(0))


def encode_features(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """The output at every step."""
    return {"output": module(inputs["x"], lengths=inputs.get("lengths"))}


def classify(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Logits."""
    return {"logits": module(inputs["x"], lengths=inputs.get("lengths"))}


def translator(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config."""
    config = transformer.Config(**arguments)
    return transformer.TransformerTranslator(config, param_dtype=dtype, rngs=nnx.Rngs(0))


def translate(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Teacher-forced logits."""
    sequences = inputs["source"], inputs["target_in"]
    return {"logits": module(*sequences, lengths=inputs.get("lengths"))}


SYSTEMS = (
    System(
        "transformer/encoder_layer",
        33,
        "Transformer encoder layer",
        functions=("jattn.attend",),
        modules=("jattn.nn.TransformerEncoderLayer",),
        **VASWANI,
        reference="transformer.EncoderLayer",
        build=constructor(nn.TransformerEncoderLayer),
        call=encode,
    ),
    System(
        "transformer/decoder_layer",
        33,
        "Transformer decoder layer",
        functions=("jattn.attend",),
        modules=("jattn.nn.TransformerDecoderLayer",),
        **VASWANI,
        reference="transformer.DecoderLayer",
        build=constructor(nn.TransformerDecoderLayer),
        call=decode,
    ),
    System(
        "transformer/encoder",
        33,
        "Transformer encoder",
        functions=("jattn.attend",),
        modules=("jattn.nn.TransformerEncoder",),
        **VASWANI,
        reference="transformer.Encoder",
        build=stack(nn.TransformerEncoder, nn.TransformerEncoderLayer),
        call=encode,
    ),
    System(
        "transformer/decoder",
        33,
        "Transformer decoder",
        functions=("jattn.attend",),
        modules=("jattn.nn.TransformerDecoder",),
        **VASWANI,
        reference="transformer.Decoder",
        build=stack(nn.TransformerDecoder, nn.TransformerDecoderLayer),
        call=decode,
    ),
    System(
        "transformer/transformer",
        33,
        "`torch.nn.Transformer`",
        functions=("jattn.attend",),
        modules=("jattn.nn.Transformer",),
        **VASWANI,
        reference="transformer.Transformer",
        build=constructor(nn.Transformer),
        call=both,
    ),
    System(
        "transformer/feature_encoder",
        34,
        "encoder behind a Linear",
        functions=(),
        modules=("jattn.models.FeatureEncoder",),
        **VASWANI,
        reference="transformer.FeatureEncoder",
        build=features_encoder,
        call=encode_features,
    ),
    System(
        "transformer/feature_classifier",
        34,
        "classifier of feature sequences",
        functions=(),
        modules=("jattn.models.FeatureClassifier",),
        **VASWANI,
        reference="transformer.FeatureClassifier",
        build=features_classifier,
        call=classify,
    ),
    System(
        "transformer/translator",
        35,
        "sequence-to-sequence Transformer",
        functions=(),
        modules=("jattn.models.TransformerTranslator",),
        **VASWANI,
        reference="transformer.Translator",
        build=translator,
        call=translate,
        # A tied table stands once among PyTorch's parameters
        rules=(*within(READER, "", "encoder"), *within(WRITER, "", "decoder")),
        note="`tied=True` shares the table of target embeddings with the logits",
    ),
)
