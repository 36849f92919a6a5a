"""Flax NNX modules: they own parameters, project, call attend, and merge."""

from jattn.nn.adapters import attention_fn as attention_fn
from jattn.nn.attention import AdditiveAttention as AdditiveAttention
from jattn.nn.attention import BilinearAttention as BilinearAttention
from jattn.nn.attention import CosineAttention as CosineAttention
from jattn.nn.attention import DotProductAttention as DotProductAttention
from jattn.nn.attention import NadarayaWatson as NadarayaWatson
from jattn.nn.multi_head import MultiHeadAttention as MultiHeadAttention
from jattn.nn.positions import LearnedPositions as LearnedPositions
from jattn.nn.positions import SinusoidalPositions as SinusoidalPositions
from jattn.nn.recurrent import GRU as GRU
from jattn.nn.recurrent import GRUCell as GRUCell
