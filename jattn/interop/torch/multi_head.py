"""Multi-head attention in PyTorch's several names, and the self-attentions beside it."""

from flax import nnx

from jattn import nn
from jattn.interop.rules import TRANSPOSE, Rearrange, Rule, within
from jattn.interop.torch.layers import LINEAR, NORM
from jattn.interop.torch.table import Table


def _projections(query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Four Linears by their names, each with a bias or none, and the norms of the heads."""
    sides = ((query, "query"), (key, "key"), (value, "value"), (out, "out"))
    linears = (rule for torch, flax in sides for rule in within(LINEAR, torch, flax))
    return (
        *linears,
        *within(NORM[:1], "q_norm", "query_ln"),
        *within(NORM[:1], "k_norm", "key_ln"),
    )


_BIASES_AND_OUT = (
    Rule(
        "in_proj_bias",
        ("query.bias", "key.bias", "value.bias"),
        Rearrange("(parts o) -> parts o", {"parts": 3}),
    ),
    *within(LINEAR, "out_proj", "out"),
)
PACKED = (
    Rule(
        "in_proj_weight",
        ("query.kernel", "key.kernel", "value.kernel"),
        Rearrange("(parts o) i -> parts i o", {"parts": 3}),
    ),
    *_BIASES_AND_OUT,
)
WIDTHS = (
    Rule("q_proj_weight", "query.kernel", TRANSPOSE),
    Rule("k_proj_weight", "key.kernel", TRANSPOSE),
    Rule("v_proj_weight", "value.kernel", TRANSPOSE),
    *_BIASES_AND_OUT,
)
# PyTorch packs inputs of one width; with kdim or vdim it keeps three weights and packs the biases
MULTI_HEAD = (
    Table("W_q, W_o", _projections("W_q", "W_k", "W_v", "W_o")),
    Table("q_proj, out_proj", _projections("q_proj", "k_proj", "v_proj", "out_proj")),
    Table("q_proj, o_proj", _projections("q_proj", "k_proj", "v_proj", "o_proj")),
    Table("torch.nn.MultiheadAttention", PACKED),
    Table("torch.nn.MultiheadAttention", WIDTHS),
)
# Flax keeps the heads apart: kernels [D, N, H] and [N, H, D], biases [N, H]
_HEADS = Rearrange("(n h) i -> i n h", {"n": None})
_HEADS_BIASES_AND_OUT = (
    Rule(
        "in_proj_bias",
        ("query.bias", "key.bias", "value.bias"),
        Rearrange("(parts n h) -> parts n h", {"parts": 3, "n": None}),
    ),
    Rule("out_proj.weight", "out.kernel", Rearrange("o (n h) -> n h o", {"n": None})),
    Rule("out_proj.bias", "out.bias"),
)
FLAX_PACKED = (
    Rule(
        "in_proj_weight",
        ("query.kernel", "key.kernel", "value.kernel"),
        Rearrange("(parts n h) i -> parts i n h", {"parts": 3, "n": None}),
    ),
    *_HEADS_BIASES_AND_OUT,
)
FLAX_WIDTHS = (
    Rule("q_proj_weight", "query.kernel", _HEADS),
    Rule("k_proj_weight", "key.kernel", _HEADS),
    Rule("v_proj_weight", "value.kernel", _HEADS),
    *_HEADS_BIASES_AND_OUT,
)
RESIDUAL = tuple(
    Table(
        f"attention ({table.names}), skip, norm",
        (
            *within(table.rules, "attention", "attention"),
            *within(LINEAR, "skip", "skip"),
            *within(NORM, "norm", "norm"),
        ),
    )
    for table in MULTI_HEAD
)

TABLES = {
    nn.MultiHeadAttention: MULTI_HEAD,
    nn.SharedProjectionAttention: MULTI_HEAD[:3],
    nn.SelfAttention: MULTI_HEAD[:2],
    nn.ResidualAttention: RESIDUAL,
    nnx.MultiHeadAttention: (
        Table("torch.nn.MultiheadAttention", FLAX_PACKED),
        Table("torch.nn.MultiheadAttention", FLAX_WIDTHS),
    ),
}
