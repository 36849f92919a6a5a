"""The three character networks of the usual tutorial, "hello" → "ohlol"."""

import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.shared import Outputs


class CharCell(nn.Module):
    """A cell in a loop on one-hot input; its state is the logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.cell = nn.RNNCell(vocabulary, vocabulary)

    def forward(self, tokens: torch.Tensor) -> Outputs:
        """Token ids [B, T] → logits [B, T, C]."""
        inputs = nn.functional.one_hot(tokens, self.vocabulary).to(next(self.parameters()).dtype)
        state, states = None, []
        for step in inputs.unbind(dim=1):
            state = self.cell(step, state)
            states.append(state)
        return {"logits": torch.stack(states, dim=1)}


class CharRNN(nn.Module):
    """The network of many steps on one-hot input."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rnn = nn.RNN(vocabulary, vocabulary, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> Outputs:
        """Token ids [B, T] → logits [B, T, C]."""
        inputs = nn.functional.one_hot(tokens, self.vocabulary).to(next(self.parameters()).dtype)
        return {"logits": self.rnn(inputs)[0]}


class EmbeddedCharRNN(nn.Module):
    """Embedding, RNN and Linear."""

    def __init__(
        self, vocabulary: int, embedding_features: int, hidden_features: int, num_layers: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_features)
        self.rnn = nn.RNN(embedding_features, hidden_features, num_layers, batch_first=True)
        self.dense = nn.Linear(hidden_features, vocabulary)

    def forward(self, tokens: torch.Tensor) -> Outputs:
        """Token ids [B, T] → logits [B, T, C]."""
        return {"logits": self.dense(self.rnn(self.embedding(tokens))[0])}


def char_rnn(kind: str, **arguments: int) -> nn.Module:
    """The network of that name."""
    return {"CharCell": CharCell, "CharRNN": CharRNN, "EmbeddedCharRNN": EmbeddedCharRNN}[kind](
        **arguments
    )


def cases() -> list[Case]:
    """Every case of the character networks: "hello" and another word."""
    tokens: Inputs = {"tokens": ids([1, 0, 2, 2, 3], [3, 3, 0, 1, 2])}
    sizes = {"vocabulary": 5, "embedding_features": 7, "hidden_features": 3, "num_layers": 2}
    return cases_of(
        "char_rnn/spelling",
        char_rnn,
        cell=({"kind": "CharCell", "vocabulary": 5}, tokens),
        rnn=({"kind": "CharRNN", "vocabulary": 5}, tokens),
        embedding=({"kind": "EmbeddedCharRNN", **sizes}, tokens),
    )
