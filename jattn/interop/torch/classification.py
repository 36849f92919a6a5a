"""The classifier: embedding, recurrent network, attention pooling or none, Linear."""

from jattn import models
from jattn.interop.rules import within
from jattn.interop.torch.layers import EMBEDDING, LINEAR
from jattn.interop.torch.recurrent import NETWORK
from jattn.interop.torch.sequence_pooling import LEARNED_QUERY
from jattn.interop.torch.table import Table

# The rules of a learned query hold those of feature pooling
CLASSIFIER = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(NETWORK, "rnn", "network"),
    *within(LEARNED_QUERY, "attention", "pooling"),
    *within(LINEAR, "fc", "out"),
)

TABLES = {models.Classifier: (Table("embedding, rnn, attention, fc", CLASSIFIER),)}
