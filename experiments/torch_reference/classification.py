"""Rows 26 and 30: a sequence classified by its last step, or by attention to all of its steps."""

from typing import Any

import torch
from torch import nn

from experiments.torch_reference.pooling import Outputs
from experiments.torch_reference.recurrent import run_packed
from experiments.torch_reference.sequence_pooling import FeaturePooling, LearnedQueryPooling


class Classifier(nn.Module):
    """Embedding, RNN, LSTM or GRU, and a Linear on the last step, or (row 30) on the pooled steps.

    The popular code takes `output[:, -1]` for the last step: the backward direction has read one
    token there, and without lengths that token is padding. Here it is `LastStep`; without a
    pooling, each direction gives its end.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        embedding_features: int,
        hidden_features: int,
        network: str = "LSTM",
        pooling: str | None = None,
        padding_idx: int | None = 0,
        dropout_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_features, padding_idx)
        options |= {"batch_first": True, "dropout": dropout_rate}
        self.rnn = getattr(nn, network)(embedding_features, hidden_features, **options)
        self.directions = 1 + self.rnn.bidirectional
        width = self.directions * hidden_features
        self.pooling = pooling
        if pooling == "FeaturePooling":
            self.attention: nn.Module = FeaturePooling(width)
        if pooling == "LearnedQueryPooling":
            self.attention = LearnedQueryPooling(width, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> Outputs:
        """Token ids [B, T] → logits [B, C], and with attention the weights."""
        outputs, state = run_packed(self.rnn, self.embedding(tokens), None, lengths)
        if self.pooling is None:
            h = state[0] if isinstance(state, tuple) else state
            return {"logits": self.fc(torch.cat(list(h[-self.directions :]), dim=-1))}
        if self.pooling == "LastStep":
            last = torch.full(tokens.shape[:1], -1) if lengths is None else lengths - 1
            return {"logits": self.fc(outputs[torch.arange(len(outputs)), last])}
        pooled = self.attention(outputs, lengths)
        return {"logits": self.fc(pooled["context"]), "weights": pooled["weights"]}
