"""Heads, and multi-head attention with wide, grouped or shared key/value heads."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.functional import heads
from jattn.interop.torch.multi_head import PACKED, WIDTHS
from jattn.interop.torch.transformer import multihead_attention
from jattn.parity.system import Arguments, Arrays, System, constructor, padding

Array = jax.Array


def split_and_merge(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Into heads, into the folded form, and back from both."""
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
    """From query to key and value, or to itself where there is no key."""
    operands = inputs["query"], inputs.get("key"), inputs.get("value")
    output, weights = module(*operands, mask=padding(inputs), return_weights=True)
    return {"output": output, "weights": weights}


def unpooled(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The attention before its heads are pooled."""
    sizes = {name: each for name, each in arguments.items() if name != "pooled"}
    return nn.MultiHeadAttention(**sizes, param_dtype=dtype, rngs=nnx.Rngs(0))


def pooled(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Of the attention after."""
    grouped = nn.to_grouped_query(module, arguments["pooled"])
    return multi_head(grouped, inputs, arguments)


def torch_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From PyTorch's arguments; whether weights are averaged is one of the call."""
    sizes = {name: each for name, each in arguments.items() if name != "average"}
    return nn.TorchMultiheadAttention(**sizes, param_dtype=dtype, rngs=nnx.Rngs(0))


def torch_call(module: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """As PyTorch is called."""
    output, weights = module(**inputs, average_attn_weights=arguments.get("average", True))
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        "multi_head/head_split",
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
        "multi_head/attention",
        10,
        "multi-head attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.MultiHeadAttention",
        build=constructor(nn.MultiHeadAttention),
        call=multi_head,
    ),
    System(
        "multi_head/torch",
        11,
        "`torch.nn.MultiheadAttention`",
        functions=("jattn.attend", "jattn.interop.torch_masks"),
        modules=("jattn.nn.TorchMultiheadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.TorchMultiheadAttention",
        build=torch_module,
        call=torch_call,
        rules=multihead_attention(PACKED),
    ),
    System(
        "multi_head/torch_widths",
        11,
        "`torch.nn.MultiheadAttention` with `kdim` and `vdim`",
        functions=("jattn.attend", "jattn.interop.torch_masks"),
        modules=("jattn.nn.TorchMultiheadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.TorchMultiheadAttention",
        build=torch_module,
        call=torch_call,
        rules=multihead_attention(WIDTHS),
    ),
    System(
        "multi_head/wide_heads",
        12,
        "wide heads",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.WideHeads",
        build=constructor(nn.MultiHeadAttention),
        call=multi_head,
        note="`head_features=H, out_features=H`",
    ),
    System(
        "multi_head/grouped_query",
        15,
        "grouped-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Ainslie et al. 2023",
        link="https://arxiv.org/abs/2305.13245",
        reference="multi_head.MultiHeadAttention",
        build=constructor(nn.MultiHeadAttention),
        call=multi_head,
        note="`num_kv_heads=K`",
    ),
    System(
        "multi_head/multi_query",
        16,
        "multi-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Shazeer 2019",
        link="https://arxiv.org/abs/1911.02150",
        reference="multi_head.MultiHeadAttention",
        build=constructor(nn.MultiHeadAttention),
        call=multi_head,
        note="`num_kv_heads=1`",
    ),
    System(
        "multi_head/to_grouped_query",
        17,
        "multi-head to grouped-query conversion",
        functions=("jattn.heads.pool_heads", "jattn.nn.to_grouped_query"),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Ainslie et al. 2023",
        link="https://arxiv.org/abs/2305.13245",
        reference="multi_head.ToGroupedQuery",
        build=unpooled,
        call=pooled,
        note="the mean of each group of consecutive heads",
    ),
)
