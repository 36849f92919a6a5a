"""Luong's translator: an encoder-decoder of LSTMs with multiplicative attention."""

import torch
from torch import nn

from experiments.torch_reference.shared import (
    Outputs,
    allowed_by_lengths,
    masked_softmax,
    run_packed,
)


def reverse(sequences: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Sequences [B, S, ...], each from its end to its beginning; what lies past the end stays."""
    if lengths is None:
        return sequences.flip(1)
    turned = [
        torch.cat([row[:length].flip(0), row[length:]])
        for row, length in zip(sequences, lengths, strict=True)
    ]
    return torch.stack(turned)


class Encoder(nn.Module):
    """Embedding and an LSTM in both directions."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)

    def forward(
        self, source: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Tokens [B, S] → outputs [B, S, 2F] and the last (h, c), [2, B, F] each."""
        return run_packed(self.rnn, self.embedding(source), None, lengths)


class Decoder(nn.Module):
    """Cell input [y; the last o], or [embedding of its own last prediction; y]."""

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, attention: bool, feed: str
    ) -> None:
        super().__init__()
        fed = embedding if feed == "prediction" else hidden if attention else 0
        self.feed, self.attention = feed, attention
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.h_projection = nn.Linear(2 * hidden, hidden, bias=False)
        self.c_projection = nn.Linear(2 * hidden, hidden, bias=False)
        self.rnn = nn.LSTMCell(embedding + fed, hidden)
        if attention:
            self.W = nn.Linear(2 * hidden, hidden, bias=False)
            self.W_u = nn.Linear(3 * hidden, hidden, bias=False)
        self.W_v = nn.Linear(hidden, vocabulary, bias=False)

    def attend(
        self, h: torch.Tensor, memory: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h [B, F] and encoder outputs [B, S, 2F] → o [B, F] and weights [B, S]."""
        scores = torch.einsum("bf,bsf->bs", h, self.W(memory))[:, None]
        weights = masked_softmax(
            scores, None if lengths is None else allowed_by_lengths(lengths, memory.shape[1])
        )
        context = (weights @ memory)[:, 0]
        return torch.tanh(self.W_u(torch.cat([context, h], dim=-1))), weights[:, 0]

    def forward(
        self,
        tokens: torch.Tensor,
        memory: torch.Tensor,
        last: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor | None,
    ) -> Outputs:
        """Tokens [B, T], teacher-forced → logits [B, T, C]; with attention, weights [B, T, S]."""
        h = self.h_projection(torch.cat([*last[0]], dim=-1))
        c = self.c_projection(torch.cat([*last[1]], dim=-1))
        o, prediction = torch.zeros_like(h), torch.ones_like(tokens[:, 0])  # 1 is the start token
        logits, weights = [], []
        for y in self.embedding(tokens).unbind(dim=1):
            other = [y, o] if self.attention else [y]
            parts = [self.embedding(prediction), y] if self.feed == "prediction" else other
            h, c = self.rnn(torch.cat(parts, dim=-1), (h, c))
            o = h
            if self.attention:
                o, looked = self.attend(h, memory, lengths)
                weights.append(looked)
            logits.append(self.W_v(o))
            prediction = logits[-1].argmax(dim=-1)
        outputs = {"logits": torch.stack(logits, dim=1)}
        return outputs | ({"weights": torch.stack(weights, dim=1)} if self.attention else {})


class LuongTranslator(nn.Module):
    """With input feeding; `attention=False` is the plain LSTM encoder-decoder."""

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_features: int,
        hidden_features: int,
        attention: bool = True,
        feed: str = "output",
        reverse_source: bool = False,
    ) -> None:
        super().__init__()
        self.reverse_source = reverse_source
        self.encoder = Encoder(source_vocabulary, embedding_features, hidden_features)
        self.decoder = Decoder(
            target_vocabulary, embedding_features, hidden_features, attention, feed
        )

    def forward(
        self, source: torch.Tensor, target_in: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> Outputs:
        """Source [B, S] and target_in [B, T] are token ids; weights are in the source order."""
        memory, last = self.encoder(
            reverse(source, lengths) if self.reverse_source else source, lengths
        )
        outputs = self.decoder(target_in, memory, last, lengths)
        if self.reverse_source and "weights" in outputs:
            outputs["weights"] = reverse(outputs["weights"].transpose(1, 2), lengths).transpose(
                1, 2
            )
        return outputs
