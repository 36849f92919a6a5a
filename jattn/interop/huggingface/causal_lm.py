"""The Llama family, as `transformers` names its weights: the same names for all of its models."""

from jattn import nn
from jattn.interop.rules import Rule, Tied, within
from jattn.interop.torch.layers import EMBEDDING, LINEAR, NORM
from jattn.interop.torch.table import Table
from jattn.models import causal_lm

SCALE = NORM[:1]
ATTENTION = (
    *within(LINEAR, "q_proj", "query"),
    *within(LINEAR, "k_proj", "key"),
    *within(LINEAR, "v_proj", "value"),
    *within(LINEAR, "o_proj", "out"),
    *within(SCALE, "q_norm", "query_ln"),
    *within(SCALE, "k_norm", "key_ln"),
)
MLP = (
    *within(LINEAR, "gate_proj", "gate"),
    *within(LINEAR, "up_proj", "up"),
    *within(LINEAR, "down_proj", "down"),
)
BLOCK = (
    *within(ATTENTION, "self_attn", "attention"),
    *within(MLP, "mlp", "mlp"),
    *within(SCALE, "input_layernorm", "norm1"),
    *within(SCALE, "post_attention_layernorm", "norm2"),
)
STACK = (
    *within(BLOCK, "model.layers.{layer}", "layers.{layer}"),
    *within(SCALE, "model.norm", "norm"),
)
FREE = (
    *within(EMBEDDING, "model.embed_tokens", "embedding"),
    *STACK,
    *within(LINEAR[:1], "lm_head", "out"),
)
# A file holds a tied table once; a state dict holds it under both names
TIED = (
    Rule(("model.embed_tokens.weight", "lm_head.weight"), "embedding.embedding", Tied(2)),
    *STACK,
)
NAMES = "transformers.LlamaForCausalLM"

TABLES = {
    causal_lm.CausalLM: tuple(
        Table(NAMES, rules, ignored=("rotary_emb.inv_freq",)) for rules in (FREE, TIED)
    ),
    causal_lm.Block: (Table("self_attn, mlp, input_layernorm, post_attention_layernorm", BLOCK),),
    nn.GatedFeedForward: (Table("gate_proj, up_proj, down_proj", MLP),),
    nn.AttentionSink: (Table("sinks", (Rule("sinks", "sink"),)),),
    nn.RMSNorm: (Table("torch.nn.RMSNorm", SCALE),),
}
