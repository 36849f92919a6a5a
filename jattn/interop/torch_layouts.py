"""How PyTorch modules name and lay out their weights: tables for the rule engine, put together per model."""

import dataclasses
from collections.abc import Iterable

from jattn.interop.rules import TRANSPOSE, Rearrange, Rule, names


def within(rules: Iterable[Rule], torch: str = "", flax: str = "") -> tuple[Rule, ...]:
    """The rules of a submodule, seen from the module that holds it.

    Args:
      rules: the submodule's weight table.
      torch: name of the submodule in PyTorch; `""` for the module itself.
      flax: dotted path of the submodule in Flax; `""` for the module itself.

    Returns:
      The same rules with both sides prefixed.

    Example:
      >>> within(LINEAR, "fc", "out")[1]
      Rule(torch=('fc.bias',), flax=('out.bias',), layout=Rearrange(pattern='... -> ...', sizes={}))
    """

    def prefixed(prefix: str, side: str | tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}.{name}" if prefix else name for name in names(side))

    return tuple(
        dataclasses.replace(rule, torch=prefixed(torch, rule.torch), flax=prefixed(flax, rule.flax)) for rule in rules
    )


LINEAR = (Rule("weight", "kernel", TRANSPOSE), Rule("bias", "bias"))
"""`torch.nn.Linear` ↔ `nnx.Linear`."""

EMBEDDING = (Rule("weight", "embedding"),)
"""`torch.nn.Embedding` ↔ `nnx.Embed`."""

ADDITIVE_ATTENTION = (
    *within(LINEAR, "W_q", "query"),
    *within(LINEAR, "W_k", "key"),
    Rule("w_v.weight", "weight", Rearrange("1 hidden -> hidden")),
)
"""Linear layers W_q, W_k and w_v ↔ `jattn.nn.AdditiveAttention`."""

MULTI_HEAD_ATTENTION = (
    *within(LINEAR, "W_q", "query"),
    *within(LINEAR, "W_k", "key"),
    *within(LINEAR, "W_v", "value"),
    *within(LINEAR, "W_o", "out"),
)
"""Linear layers W_q, W_k, W_v and W_o ↔ `jattn.nn.MultiHeadAttention`; grouped and multi-query too."""

PACKED_MULTI_HEAD_ATTENTION = (
    Rule(
        "in_proj_weight",
        ("query.kernel", "key.kernel", "value.kernel"),
        Rearrange("(parts o) i -> parts i o", {"parts": 3}),
    ),
    Rule(
        "in_proj_bias",
        ("query.bias", "key.bias", "value.bias"),
        Rearrange("(parts o) -> parts o", {"parts": 3}),
    ),
    *within(LINEAR, "out_proj", "out"),
)
"""`torch.nn.MultiheadAttention` with query, key and value of one width ↔ `jattn.nn.MultiHeadAttention`."""

GRU = (
    Rule("weight_ih_l{layer}", "layers.{layer}.input_kernel", TRANSPOSE),
    Rule("weight_hh_l{layer}", "layers.{layer}.hidden_kernel", TRANSPOSE),
    Rule("bias_ih_l{layer}", "layers.{layer}.input_bias"),
    Rule("bias_hh_l{layer}", "layers.{layer}.hidden_bias"),
)
"""`torch.nn.GRU` ↔ `jattn.nn.GRU`: the same gate order, both biases kept."""

GRU_CELL = (
    Rule("weight_ih", "input_kernel", TRANSPOSE),
    Rule("weight_hh", "hidden_kernel", TRANSPOSE),
    Rule("bias_ih", "input_bias"),
    Rule("bias_hh", "hidden_bias"),
)
"""`torch.nn.GRUCell` ↔ `jattn.nn.GRUCell`."""

SEQ2SEQ = (
    *within(EMBEDDING, "encoder.embedding", "encoder.embedding"),
    *within(GRU, "encoder.rnn", "encoder.gru"),
    *within(ADDITIVE_ATTENTION, "decoder.attention", "decoder.attention"),
    *within(EMBEDDING, "decoder.embedding", "decoder.embedding"),
    *within(GRU, "decoder.rnn", "decoder.gru"),
    *within(LINEAR, "decoder.dense", "decoder.out"),
)
"""The Bahdanau encoder-decoder in its usual PyTorch names ↔ `jattn.models.Seq2Seq`."""
