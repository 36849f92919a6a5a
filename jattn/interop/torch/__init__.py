"""PyTorch's names for the weights of jattn's modules: a file of tables for each family."""

from jattn.interop.torch.convert import load_torch as load_torch
from jattn.interop.torch.convert import to_torch as to_torch
from jattn.interop.torch.convert import torch_rules as torch_rules
