"""Weights to and from other libraries."""

from jattn.interop.convert import load_torch as load_torch
from jattn.interop.convert import to_torch as to_torch
from jattn.interop.convert import torch_rules as torch_rules
from jattn.interop.errors import ConversionError as ConversionError
from jattn.interop.huggingface.files import load_pretrained as load_pretrained
from jattn.interop.huggingface.files import save_pretrained as save_pretrained
from jattn.interop.rules import IDENTITY as IDENTITY
from jattn.interop.rules import TRANSPOSE as TRANSPOSE
from jattn.interop.rules import Layout as Layout
from jattn.interop.rules import Rearrange as Rearrange
from jattn.interop.rules import Rule as Rule
from jattn.interop.rules import Tied as Tied
from jattn.interop.rules import from_flax as from_flax
from jattn.interop.rules import to_flax as to_flax
from jattn.interop.rules import within as within
from jattn.nn.pytorch import torch_masks as torch_masks
