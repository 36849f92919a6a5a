"""Character networks: a cell, a network, or an embedding, a network and a Linear."""

from jattn import models
from jattn.interop.rules import within
from jattn.interop.torch.layers import EMBEDDING, LINEAR
from jattn.interop.torch.recurrent import CELL, NETWORK
from jattn.interop.torch.table import Table

EMBEDDED = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(NETWORK, "rnn", "rnn"),
    *within(LINEAR, "dense", "out"),
)

TABLES = {
    models.CharCell: (Table("cell", within(CELL, "cell", "cell")),),
    models.CharRNN: (Table("rnn", within(NETWORK, "rnn", "rnn")),),
    models.EmbeddedCharRNN: (Table("embedding, rnn, dense", EMBEDDED),),
}
