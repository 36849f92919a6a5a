"""Attention pooling whose score has parameters."""

from jattn import nn
from jattn.interop.rules import Rearrange, Rule, within
from jattn.interop.torch.layers import LINEAR
from jattn.interop.torch.table import Table

ADDITIVE = (
    *within(LINEAR, "W_q", "query"),
    *within(LINEAR, "W_k", "key"),
    Rule("w_v.weight", "weight", Rearrange("1 hidden -> hidden")),
)

TABLES = {
    nn.NadarayaWatson: (Table("w", (Rule("w", "weight"),)),),
    nn.AdditiveAttention: (Table("W_q, W_k, w_v", ADDITIVE),),
    nn.BilinearAttention: (
        Table("W", (Rule("W", "weight"),)),
        Table("torch.nn.Linear W, of the keys", (Rule("W.weight", "weight"),)),
    ),
}
