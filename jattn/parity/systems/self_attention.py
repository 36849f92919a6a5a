"""Self-attention of one head, of heads that share a projection, and with a residual around it."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.parity.system import Arguments, Arrays, System, constructor, padding

Array = jax.Array


def residual_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Around an attention of one head."""
    widths, rngs = (arguments["in_features"], arguments["out_features"]), nnx.Rngs(0)
    attention = nn.SelfAttention(*widths, param_dtype=dtype, rngs=rngs)
    use_layer_norm = arguments.get("use_layer_norm", False)
    return nn.ResidualAttention(
        attention, *widths, use_layer_norm=use_layer_norm, param_dtype=dtype, rngs=rngs
    )


def attend_to_itself(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Output and weights under the lengths."""
    output, weights = module(inputs["x"], mask=padding(inputs), return_weights=True)
    return {"output": output, "weights": weights}


SYSTEMS = (
    System(
        "self_attention/shared_projection",
        13,
        "shared-projection heads",
        functions=("jattn.attend",),
        modules=("jattn.nn.SharedProjectionAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="self_attention.SharedProjectionAttention",
        build=constructor(nn.SharedProjectionAttention),
        call=attend_to_itself,
        note="code that never calls its projections is the same with identity kernels",
    ),
    System(
        "self_attention/single_head",
        14,
        "single-head self-attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.SelfAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="self_attention.SelfAttention",
        build=constructor(nn.SelfAttention),
        call=attend_to_itself,
    ),
    System(
        "self_attention/residual",
        18,
        "residual self-attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.ResidualAttention", "jattn.nn.SelfAttention"),
        paper="He et al. 2016",
        link="https://arxiv.org/abs/1512.03385",
        reference="self_attention.ResidualAttention",
        build=residual_module,
        call=attend_to_itself,
    ),
)
