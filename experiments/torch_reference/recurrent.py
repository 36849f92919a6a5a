"""Rows 24 and 31: PyTorch's recurrent networks, cells and Embedding; Bahdanau's translator."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from experiments.torch_reference.pooling import AdditiveAttention, Outputs


def run_packed(
    rnn: nn.RNNBase, x: torch.Tensor, state: Any, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, Any]:
    """Runs over x [B, T, D], packed where lengths [B] are given.

    Returns outputs [B, T, F] and state [L, B, F].
    """
    if lengths is None:
        return rnn(x, state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(packed, state)
    return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


class Recurrent(nn.Module):
    """Row 24: PyTorch's RNN (tanh or relu), LSTM (its state is a pair), GRU, or their cells."""

    def __init__(self, kind: str, in_features: int, hidden_features: int, **options: Any) -> None:
        super().__init__()
        names = {
            "use_bias": "bias",
            "dropout_rate": "dropout",
            "proj_features": "proj_size",
            "activation": "nonlinearity",
        }
        own = {names.get(name, name): value for name, value in options.items()}
        cell = kind.endswith("Cell")
        self.rnn = getattr(nn, kind)(
            in_features, hidden_features, **own, **({} if cell else {"batch_first": True})
        )

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        cell: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """x [B, T, D], state and an LSTM's cell [L · directions, B, F], lengths [B].

        A cell takes the same without T and L.
        """
        first = state if cell is None else (state, cell)
        if isinstance(self.rnn, nn.RNNCellBase):
            outputs, last = {}, self.rnn(x, first)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "LSTM with projections is not supported with oneDNN"
                )
                output, last = run_packed(self.rnn, x, first, lengths)
            outputs = {"output": output}
        state, *rest = last if isinstance(last, tuple) else (last,)
        return outputs | {"state": state} | ({"cell": rest[0]} if rest else {})


class Embedding(nn.Module):
    """Row 24: PyTorch's Embedding.

    It looks up in a copy, so that what `max_norm` rewrites can be seen beside it.
    """

    def __init__(self, num_embeddings: int, features: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, features, **options)

    def forward(self, tokens: torch.Tensor) -> Outputs:
        """Token ids [B, T] → rows [B, T, D], and the table as PyTorch has rewritten it."""
        own, table = self.embedding, self.embedding.weight.clone()
        rows = nn.functional.embedding(
            tokens, table, own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq
        )
        return {"output": rows, "table": table.detach()}


def recurrent(kind: str, **arguments: Any) -> nn.Module:
    """Row 24: `Embedding`, or the recurrent network or cell of that name."""
    return Embedding(**arguments) if kind == "Embedding" else Recurrent(kind, **arguments)


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

    def forward(
        self, source: torch.Tensor, target_in: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> Outputs:
        """Source [B, S] and target_in [B, T], both token ids."""
        memory, state = self.encoder(source, lengths)
        return self.decoder(target_in, memory, state, lengths)
