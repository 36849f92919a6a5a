"""A sequence classified by its last step, or by attention to all of its steps."""

from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.sequence_pooling import FeaturePooling, LearnedQueryPooling
from experiments.torch_reference.shared import Outputs, run_packed


class Classifier(nn.Module):
    """Embedding, RNN, LSTM or GRU, and a Linear on the last step, or on the pooled steps.

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


def cases() -> list[Case]:
    """Every case of the classifier, by the last step and by attention.

    The last step is that of one or both directions, or what popular code takes for it.
    """
    model = {"vocabulary": 13, "classes": 3, "embedding_features": 5, "hidden_features": 7}
    deep: dict[str, Any] = model | {"num_layers": 2, "bidirectional": True, "dropout_rate": 0.5}
    tokens: Inputs = {"tokens": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0])}
    padded: Inputs = tokens | {"lengths": np.array([4, 6, 1])}
    last = deep | {"pooling": "LastStep"}
    feature, query = deep | {"pooling": "FeaturePooling"}, deep | {"pooling": "LearnedQueryPooling"}
    return [
        *cases_of(
            "classification/last_step",
            Classifier,
            classifier=(model | {"network": "RNN"}, tokens),
            classifier_lengths=(model | {"network": "RNN"}, padded),
            classifier_gru_two_ways=(deep | {"network": "GRU"}, padded),
            classifier_lstm_last_step=(last, tokens),
            classifier_lstm_last_step_lengths=(last, padded),
        ),
        *cases_of(
            "classification/attention",
            Classifier,
            attention_feature=(feature, tokens),
            attention_feature_lengths=(feature, padded),
            attention_query=(query, tokens),
            attention_query_lengths=(query | {"padding_idx": None}, padded),
        ),
    ]
