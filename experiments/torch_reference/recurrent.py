"""Rows 24 and 31: PyTorch's GRU, and the Bahdanau encoder-decoder that stands on it."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from experiments.torch_reference.pooling import AdditiveAttention, Outputs


def run_gru(
    rnn: nn.GRU, x: torch.Tensor, state: torch.Tensor | None, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs over x [B, T, D], packed where lengths [B] are given; outputs [B, T, F] and state [L, B, F]."""
    if lengths is None:
        return rnn(x, state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(packed, state)
    return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


class GRU(nn.Module):
    """Row 24: r, z, n gates, two biases, the hidden bias of n inside the reset gate: PyTorch's own."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_layers: int = 1,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.rnn = nn.GRU(in_features, hidden_features, num_layers, use_bias, True, dropout_rate)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> Outputs:
        """x [B, T, D], state [L, B, F], lengths [B]."""
        outputs, last = run_gru(self.rnn, x, state, lengths)
        return {"output": outputs, "state": last}


class GRUCell(nn.Module):
    """Row 24: one step."""

    def __init__(self, in_features: int, hidden_features: int, use_bias: bool = True) -> None:
        super().__init__()
        self.cell = nn.GRUCell(in_features, hidden_features, use_bias)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> Outputs:
        """x [B, D], state [B, F]."""
        return {"state": self.cell(x, state)}


def recurrent(kind: str, **arguments: int) -> nn.Module:
    """Row 24: the network or its cell."""
    return {"gru": GRU, "gru_cell": GRUCell}[kind](**arguments)


class Encoder(nn.Module):
    """Embedding and GRU."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.GRU(embedding, hidden, num_layers, batch_first=True)

    def forward(self, source: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, S] → outputs [B, S, F] and state [L, B, F]."""
        return run_gru(self.rnn, self.embedding(source), None, lengths)


class Decoder(nn.Module):
    """At each step: query = top hidden state, GRU input = [context; embedding]."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.attention = AdditiveAttention(hidden, hidden, hidden)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.GRU(hidden + embedding, hidden, num_layers, batch_first=True)
        self.dense = nn.Linear(hidden, vocabulary)

    def forward(
        self,
        tokens: torch.Tensor,
        memory: torch.Tensor,
        state: torch.Tensor,
        lengths: torch.Tensor | None,
    ) -> Outputs:
        """Tokens [B, T], teacher-forced → logits [B, T, C] and weights [B, T, S]."""
        logits, weights = [], []
        for embedded in self.embedding(tokens).unbind(dim=1):
            attended = self.attention(state[-1][:, None], memory, memory, lengths)
            step = torch.cat([attended["output"], embedded[:, None]], dim=-1)
            output, state = self.rnn(step, state)
            logits.append(self.dense(output[:, 0]))
            weights.append(attended["weights"][:, 0])
        return {"logits": torch.stack(logits, dim=1), "weights": torch.stack(weights, dim=1)}


class Seq2Seq(nn.Module):
    """Row 31; the popular encoder runs over the padding: that is `lengths=None`."""

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_features: int,
        hidden_features: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(source_vocabulary, embedding_features, hidden_features, num_layers)
        self.decoder = Decoder(target_vocabulary, embedding_features, hidden_features, num_layers)

    def forward(self, source: torch.Tensor, target_in: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """Source [B, S] and target_in [B, T], both token ids."""
        memory, state = self.encoder(source, lengths)
        return self.decoder(target_in, memory, state, lengths)
