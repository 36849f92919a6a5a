"""Rows 9 to 18: heads; how each system is built from a fixture and called with its inputs."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.functional import heads
from jattn.interop import torch_layouts as layouts
from jattn.parity.system import Arguments, Arrays, System, constructor, padding

Array = jax.Array


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


def wide_heads(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 12: `MultiHeadAttention` with an output as wide as a head."""
    num_heads, head_features = arguments["num_heads"], arguments["head_features"]
    return nn.MultiHeadAttention(
        num_heads,
        arguments["in_features"],
        num_heads * head_features,
        head_features,
        use_bias=arguments.get("use_bias", False),
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def heads_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """`MultiHeadAttention` from the arguments of its PyTorch reference."""
    given = dict(arguments)
    num_heads, features = given.pop("num_heads"), given.pop("features")
    query = given.pop("query_features", features)
    key = given.pop("key_features", query)
    return nn.MultiHeadAttention(
        num_heads,
        query,
        features,
        given.pop("out_features", features),
        in_kv_features=key,
        in_value_features=given.pop("value_features", key),
        use_bias=given.pop("use_bias", False),
        **given,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def residual(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Row 18, around the attention of row 14."""
    widths, rngs = (arguments["in_features"], arguments["out_features"]), nnx.Rngs(0)
    attention = nn.SelfAttention(*widths, param_dtype=dtype, rngs=rngs)
    use_layer_norm = arguments.get("use_layer_norm", False)
    return nn.ResidualAttention(
        attention, *widths, use_layer_norm=use_layer_norm, param_dtype=dtype, rngs=rngs
    )


def multi_head(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 10, 12, 15 and 16."""
    operands = inputs["query"], inputs.get("key"), inputs.get("value")
    output, weights = module(*operands, mask=padding(inputs), return_weights=True)
    return {"output": output, "weights": weights}


def self_attention(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 13, 14 and 18."""
    output, weights = module(inputs["x"], mask=padding(inputs), return_weights=True)
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        9,
        "head split and merge",
        functions=(
            "jattn.heads.split_heads",
            "jattn.heads.merge_heads",
            "jattn.heads.fold_heads",
            "jattn.heads.unfold_heads",
            "jattn.heads.repeat_lengths",
        ),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.HeadSplit",
        call=split_and_merge,
    ),
    System(
        10,
        "multi-head attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.MultiHeadAttention",
        build=heads_module,
        call=multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
    ),
    System(
        12,
        "wide heads",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="self_attention.WideHeads",
        build=wide_heads,
        call=multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="`qkv_features=N * H, out_features=H`",
    ),
    System(
        13,
        "shared-projection heads",
        functions=("jattn.attend",),
        modules=("jattn.nn.SharedProjectionAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="self_attention.SharedProjectionAttention",
        build=constructor(nn.SharedProjectionAttention),
        call=self_attention,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="code that never calls its projections is the same with identity kernels",
    ),
    System(
        14,
        "single-head self-attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.SelfAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="self_attention.SelfAttention",
        build=constructor(nn.SelfAttention),
        call=self_attention,
        rules=layouts.MULTI_HEAD_ATTENTION,
    ),
    System(
        15,
        "grouped-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Ainslie et al. 2023",
        link="https://arxiv.org/abs/2305.13245",
        reference="multi_head.MultiHeadAttention",
        build=heads_module,
        call=multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="`num_kv_heads=K`",
    ),
    System(
        16,
        "multi-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Shazeer 2019",
        link="https://arxiv.org/abs/1911.02150",
        reference="multi_head.MultiHeadAttention",
        build=heads_module,
        call=multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="`num_kv_heads=1`",
    ),
    System(
        18,
        "residual self-attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.ResidualAttention", "jattn.nn.SelfAttention"),
        paper="He et al. 2016",
        link="https://arxiv.org/abs/1512.03385",
        reference="self_attention.ResidualAttention",
        build=residual,
        call=self_attention,
        rules=layouts.RESIDUAL_ATTENTION,
    ),
)
