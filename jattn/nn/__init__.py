"""Flax NNX modules: they own parameters, project, call attend, and merge."""

from jattn.nn.adapters import attention_fn as attention_fn
from jattn.nn.embedding import Embedding as Embedding
from jattn.nn.multi_head import MultiHeadAttention as MultiHeadAttention
from jattn.nn.pooling import AdditiveAttention as AdditiveAttention
from jattn.nn.pooling import BilinearAttention as BilinearAttention
from jattn.nn.pooling import CosineAttention as CosineAttention
from jattn.nn.pooling import DotProductAttention as DotProductAttention
from jattn.nn.pooling import NadarayaWatson as NadarayaWatson
from jattn.nn.positions import LearnedPositions as LearnedPositions
from jattn.nn.positions import SinusoidalPositions as SinusoidalPositions
from jattn.nn.recurrent import GRU as GRU
from jattn.nn.recurrent import LSTM as LSTM
from jattn.nn.recurrent import RNN as RNN
from jattn.nn.recurrent_cells import GRUCell as GRUCell
from jattn.nn.recurrent_cells import LSTMCell as LSTMCell
from jattn.nn.recurrent_cells import LSTMState as LSTMState
from jattn.nn.recurrent_cells import RNNCell as RNNCell
from jattn.nn.self_attention import ResidualAttention as ResidualAttention
from jattn.nn.self_attention import SelfAttention as SelfAttention
from jattn.nn.self_attention import SharedProjectionAttention as SharedProjectionAttention
from jattn.nn.sequence_pooling import FeaturePooling as FeaturePooling
from jattn.nn.sequence_pooling import LearnedQueryPooling as LearnedQueryPooling
from jattn.nn.sequence_pooling import MultiHopPooling as MultiHopPooling
