"""Layers: Linear, embeddings, learned positions, and norms."""

from flax import nnx

from jattn import nn
from jattn.interop.rules import TRANSPOSE, Rule
from jattn.interop.torch.table import Table

LINEAR = (Rule("weight", "kernel", TRANSPOSE), Rule("bias", "bias"))
EMBEDDING = (Rule("weight", "embedding"),)
NORM = (Rule("weight", "scale"), Rule("bias", "bias"))

TABLES = {
    nnx.Linear: (Table("torch.nn.Linear", LINEAR),),
    nnx.Embed: (Table("torch.nn.Embedding", EMBEDDING),),
    nnx.LayerNorm: (Table("torch.nn.LayerNorm", NORM),),
    nnx.RMSNorm: (Table("torch.nn.RMSNorm", NORM[:1]),),
    nn.Embedding: (Table("torch.nn.Embedding", EMBEDDING),),
    nn.LearnedPositions: (
        Table("table", (Rule("table.weight", "embedding"),)),
        Table("torch.nn.Embedding", EMBEDDING),
    ),
}
