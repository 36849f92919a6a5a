"""How each system is built from a fixture's arguments, and called with its inputs, in jattn's own words."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn import nn
from jattn.attention import attend
from jattn.functional import heads, masks, positions, scores
from jattn.functional.softmax import masked_softmax
from jattn.models import seq2seq
from jattn.nn.recurrent import GRU, GRUCell

Array = jax.Array
Arguments = Mapping[str, Any]
Arrays = Mapping[str, Array]
Build = Callable[[Arguments, Any], nnx.Module]
Call = Callable[[Any, Arrays, Arguments], dict[str, Array]]


def constructor(module: Callable[..., nnx.Module]) -> Build:
    """Build a module with parameters; the fixture's arguments are its own."""

    def build(arguments: Arguments, dtype: Any) -> nnx.Module:
        return module(**arguments, param_dtype=dtype, rngs=nnx.Rngs(0))

    return build


def without_parameters(module: Callable[..., nnx.Module]) -> Build:
    """Build a module that has none, so no type for them either."""

    def build(arguments: Arguments, _dtype: Any) -> nnx.Module:
        return module(**arguments, rngs=nnx.Rngs(0))

    return build


def no_module(_arguments: Arguments, _dtype: Any) -> nnx.Module:
    """A system that is a pure function: an empty module."""
    return nnx.Module()


def kernel_regression_module(_arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 3: whether a sample sees itself is a mask, not an argument of the module."""
    return nn.NadarayaWatson(param_dtype=dtype, rngs=nnx.Rngs(0))


def scored_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 7: the module of a score."""
    match arguments:
        case {"score": "dot_product"}:
            return nn.DotProductAttention(scaled=False)
        case {"score": "bilinear", **widths}:
            return nn.BilinearAttention(**widths, param_dtype=dtype, rngs=nnx.Rngs(0))
    return nn.CosineAttention()


def recurrent_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 24: the network or its cell."""
    kind, widths = arguments["kind"], {name: value for name, value in arguments.items() if name != "kind"}
    return {"gru": GRU, "gru_cell": GRUCell}[kind](**widths, param_dtype=dtype, rngs=nnx.Rngs(0))


def seq2seq_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 31: from its config."""
    return seq2seq.Seq2Seq(seq2seq.Config(**arguments), param_dtype=dtype, rngs=nnx.Rngs(0))


def padding(inputs: Arrays) -> masks.Mask | None:
    """The mask of the lengths, where a fixture has some."""
    return masks.padding(inputs["lengths"]) if "lengths" in inputs else None


def attend_single_head(inputs: Arrays, mask: Any, score: Callable[..., Array]) -> dict[str, Array]:
    """`attend` for operands [B, T, H] without a head axis."""
    query, key, value = (rearrange(inputs[name], "b t h -> b t 1 h") for name in ("query", "key", "value"))
    output, weights = attend(query, key, value, score=score, mask=mask, return_weights=True)
    return {"output": rearrange(output, "b t 1 v -> b t v"), "weights": rearrange(weights, "b 1 t s -> b t s")}


def pool_with(score: Callable[..., Array]) -> Call:
    """Rows 1 and 2: attend with a score."""

    def call(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
        return attend_single_head(inputs, padding(inputs), score)

    return call


def pool(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Rows 3 and 5 to 7: a module that pools values."""
    mask = masks.no_self() if arguments.get("leave_one_out") else padding(inputs)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    output, weights = module(query, key, value, mask=mask, return_weights=True)
    return {"output": output, "weights": weights}


def softmax(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 4."""
    return {"weights": masked_softmax(inputs["scores"], inputs.get("mask"), lengths=inputs.get("lengths"))}


def mask_of(arguments: Arguments, inputs: Arrays) -> masks.Mask:
    """Row 8: the mask that a fixture names."""
    causal = masks.causal(arguments.get("offset", 0))
    window = masks.sliding_window(arguments.get("left", 0), arguments.get("right", 0))
    makers: dict[str, Callable[[], masks.Mask]] = {
        "causal": lambda: causal,
        "sliding_window": lambda: window,
        "no_self": masks.no_self,
        "padding": lambda: masks.padding(inputs["lengths"]),
        "prefix_lm": lambda: masks.prefix_lm(inputs["lengths"]),
        "segments": lambda: masks.segments(inputs["query_ids"], inputs["key_ids"]),
        "dense": lambda: masks.dense(rearrange(inputs["dense"], "b t s -> b 1 t s")),
        "causal & padding": lambda: causal & masks.padding(inputs["lengths"]),
        "~window | causal & ~no_self": lambda: ~window | causal & masks.no_self(),
    }
    return makers[arguments["mask"]]()


def masked(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 8: scaled dot-product attention under a mask."""
    return attend_single_head(inputs, mask_of(arguments, inputs), scores.scaled_dot_product)


def split_and_merge(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 9: into heads, into the folded form, and back from both."""
    num_heads = arguments["num_heads"]
    split = heads.split_heads(inputs["x"], num_heads)
    folded = heads.fold_heads(split)
    return {
        "split": split,
        "merged": heads.merge_heads(split**2),
        "folded": folded,
        "unfolded": heads.unfold_heads(folded**3, num_heads),
        "lengths": heads.repeat_lengths(inputs["lengths"], num_heads),
    }


def multi_head(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 10, 15 and 16."""
    operands = inputs["query"], inputs.get("key"), inputs.get("value")
    output, weights = module(*operands, mask=padding(inputs), return_weights=True)
    return {"output": output, "weights": weights}


def rotate(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 20: the rotation by an offset, applied to any x, and the encodings that it takes to one another."""
    features, offset, where = arguments["features"], arguments["offset"], inputs["positions"]
    rotation = positions.sinusoidal_rotation(offset, features)
    return {
        "rotation": rotation,
        "rotated": jnp.einsum("...d, ed -> ...e", inputs["x"], rotation),
        "encoding": positions.sinusoidal_encoding(where, features),
        "shifted": positions.sinusoidal_encoding(where + offset, features),
    }


def add_positions(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 19 and 21."""
    return {"output": module(inputs["x"])}


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
