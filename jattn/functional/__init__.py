"""Pure functions: arrays in, arrays out."""

from jattn.functional import heads as heads
from jattn.functional import masks as masks
from jattn.functional import modifiers as modifiers
from jattn.functional import positions as positions
from jattn.functional import ropes as ropes
from jattn.functional import scores as scores
from jattn.functional.softmax import masked_softmax as masked_softmax
