"""Sequences pooled over time."""

from jattn import nn
from jattn.interop.rules import Rule, within
from jattn.interop.torch.layers import LINEAR
from jattn.interop.torch.table import Table

FEATURE = within(LINEAR, "W", "key")
LEARNED_QUERY = (*within(LINEAR, "W", "key"), Rule("u_w", "query"))

TABLES = {
    nn.FeaturePooling: (Table("W", FEATURE),),
    nn.MultiHopPooling: (Table("W", (Rule("W.weight", "query"), Rule("W.bias", "bias"))),),
    nn.LearnedQueryPooling: (Table("W, u_w", LEARNED_QUERY),),
}
