"""Every attention mechanism as a pure JAX function and a Flax module, proven equal to PyTorch."""

__version__ = "0.1.0"

# attend: weights(score(query, key), mask) · value
from jattn.attention import attend as attend
from jattn.attention import attend_with_sink as attend_with_sink
from jattn.attention import attention_weights as attention_weights
from jattn.attention import dot_product_attention as dot_product_attention
from jattn.attention import explain as explain
from jattn.attention import merge_partials as merge_partials

# the pieces: each a module of pure functions
from jattn.functional import heads as heads
from jattn.functional import masks as masks
from jattn.functional import modifiers as modifiers
from jattn.functional import positions as positions
from jattn.functional import ropes as ropes
from jattn.functional import scores as scores
from jattn.functional.softmax import masked_softmax as masked_softmax

# modules that own parameters, and models built of them
from jattn import models as models
from jattn import nn as nn

# their weights, to and from PyTorch
from jattn import interop as interop
