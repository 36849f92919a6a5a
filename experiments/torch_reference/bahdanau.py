"""Bahdanau's translator: an encoder-decoder of GRUs with additive attention."""

import torch
from torch import nn

from experiments.torch_reference.pooling import AdditiveAttention
from experiments.torch_reference.shared import Outputs, run_packed


class Encoder(nn.Module):
    """Embedding and GRU."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.GRU(embedding, hidden, num_layers, batch_first=True)

    def forward(
        self, source: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, S] → outputs [B, S, F] and state [L, B, F]."""
        return run_packed(self.rnn, self.embedding(source), None, lengths)


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


class BahdanauTranslator(nn.Module):
    """The popular encoder runs over the padding: that is `lengths=None`."""

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

    def forward(
        self, source: torch.Tensor, target_in: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> Outputs:
        """Source [B, S] and target_in [B, T], both token ids."""
        memory, state = self.encoder(source, lengths)
        return self.decoder(target_in, memory, state, lengths)
