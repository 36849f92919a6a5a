"""Recurrent networks and cells: PyTorch's gate order, both biases, directions and projections."""

from jattn import nn
from jattn.interop.rules import TRANSPOSE, Rule
from jattn.interop.torch.table import Table

CELL = (
    Rule("weight_ih", "input_kernel", TRANSPOSE),
    Rule("weight_hh", "hidden_kernel", TRANSPOSE),
    Rule("bias_ih", "input_bias"),
    Rule("bias_hh", "hidden_bias"),
)
NETWORK = tuple(
    Rule(f"{rule.torch}_l{{layer}}{end}", f"{cells}.{{layer}}.{rule.flax}", rule.layout)
    for cells, end in (("layers", ""), ("backward_layers", "_reverse"))
    for rule in (*CELL, Rule("weight_hr", "proj_kernel", TRANSPOSE))
)

TABLES = {
    nn.RNNCell: (Table("torch.nn.RNNCell", CELL),),
    nn.LSTMCell: (Table("torch.nn.LSTMCell", CELL),),
    nn.GRUCell: (Table("torch.nn.GRUCell", CELL),),
    nn.RNN: (Table("torch.nn.RNN", NETWORK),),
    nn.LSTM: (Table("torch.nn.LSTM", NETWORK),),
    nn.GRU: (Table("torch.nn.GRU", NETWORK),),
}
