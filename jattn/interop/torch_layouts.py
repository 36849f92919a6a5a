"""How PyTorch names and lays out weights: tables for the rule engine, put together per model."""

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
        dataclasses.replace(rule, torch=prefixed(torch, rule.torch), flax=prefixed(flax, rule.flax))
        for rule in rules
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
"""Linear layers W_q, W_k, W_v and W_o ↔ `jattn.nn.MultiHeadAttention`; grouped and multi-query too.

Also ↔ `jattn.nn.SharedProjectionAttention`, and without W_o ↔ `jattn.nn.SelfAttention`.
"""

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
"""`torch.nn.MultiheadAttention` with inputs of one width ↔ `jattn.nn.MultiHeadAttention`."""

RESIDUAL_ATTENTION = (
    *within(MULTI_HEAD_ATTENTION, "attention", "attention"),
    *within(LINEAR, "skip", "skip"),
    Rule("norm.weight", "norm.scale"),
    Rule("norm.bias", "norm.bias"),
)
"""An attention, a Linear on the skip path and a LayerNorm ↔ `jattn.nn.ResidualAttention`."""

FEATURE_POOLING = within(LINEAR, "W", "key")
"""A Linear layer W ↔ `jattn.nn.FeaturePooling`."""

MULTI_HOP_POOLING = (Rule("W.weight", "query"), Rule("W.bias", "bias"))
"""A Linear layer W ↔ `jattn.nn.MultiHopPooling`."""

LEARNED_QUERY_POOLING = (*within(LINEAR, "W", "key"), Rule("u_w", "query"))
"""A Linear layer W and a vector u_w ↔ `jattn.nn.LearnedQueryPooling`."""

RECURRENT_CELL = (
    Rule("weight_ih", "input_kernel", TRANSPOSE),
    Rule("weight_hh", "hidden_kernel", TRANSPOSE),
    Rule("bias_ih", "input_bias"),
    Rule("bias_hh", "hidden_bias"),
)
"""`torch.nn.RNNCell`, `LSTMCell`, `GRUCell` ↔ `jattn.nn`'s: same gate order, both biases kept."""

RECURRENT = tuple(
    Rule(f"{name}_l{{layer}}{end}", f"{cells}.{{layer}}.{parameter}", layout)
    for cells, end in (("layers", ""), ("backward_layers", "_reverse"))
    for name, parameter, layout in (
        *((rule.torch, rule.flax, rule.layout) for rule in RECURRENT_CELL),
        ("weight_hr", "proj_kernel", TRANSPOSE),
    )
)
"""`torch.nn.RNN`, `LSTM`, `GRU` ↔ `jattn.nn`'s, with both directions and projections."""

SEQ2SEQ = (
    *within(EMBEDDING, "encoder.embedding", "encoder.embedding"),
    *within(RECURRENT, "encoder.rnn", "encoder.gru"),
    *within(ADDITIVE_ATTENTION, "decoder.attention", "decoder.attention"),
    *within(EMBEDDING, "decoder.embedding", "decoder.embedding"),
    *within(RECURRENT, "decoder.rnn", "decoder.gru"),
    *within(LINEAR, "decoder.dense", "decoder.out"),
)
"""The Bahdanau encoder-decoder in its usual PyTorch names ↔ `jattn.models.BahdanauTranslator`."""

CHAR_RNN = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(RECURRENT_CELL, "cell", "cell"),
    *within(RECURRENT, "rnn", "rnn"),
    *within(LINEAR, "dense", "out"),
)
"""A character network, by any of its three parts that have weights ↔ `jattn.models.char_rnn`'s."""

LUONG = (
    *within(EMBEDDING, "encoder.embedding", "encoder.embedding"),
    *within(RECURRENT, "encoder.rnn", "encoder.lstm"),
    *within(EMBEDDING, "decoder.embedding", "decoder.embedding"),
    *within(LINEAR, "decoder.h_projection", "decoder.first_h"),
    *within(LINEAR, "decoder.c_projection", "decoder.first_c"),
    *within(RECURRENT_CELL, "decoder.rnn", "decoder.cell"),
    Rule("decoder.W.weight", "decoder.attention.weight"),
    *within(LINEAR, "decoder.W_u", "decoder.combine"),
    *within(LINEAR, "decoder.W_v", "decoder.out"),
)
"""The encoder-decoder of Luong's equations in their letters ↔ `jattn.models.LuongTranslator`."""

CLASSIFIER = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(RECURRENT, "rnn", "network"),
    *within(LEARNED_QUERY_POOLING, "attention", "pooling"),
    *within(LINEAR, "fc", "out"),
)
"""Embedding, recurrent network, attention pooling or none, Linear ↔ `jattn.models.Classifier`."""
