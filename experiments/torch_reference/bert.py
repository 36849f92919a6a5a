"""BERT: the models of `transformers`, which are exact in double, and relative positions of old."""

from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.modifiers import relative_scores
from experiments.torch_reference.shared import Outputs, masked_softmax

NAMES = {
    "vocabulary": "vocab_size",
    "features": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_features": "intermediate_size",
    "max_length": "max_position_embeddings",
    "num_types": "type_vocab_size",
    "epsilon": "layer_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
    "classes": "num_labels",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
}


class RelativeSelfAttention(nn.Module):
    """Self-attention of versions 4 of `transformers` with `position_embedding_type` relative."""

    def __init__(self, features: int, num_heads: int, max_length: int, with_key: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(features, features) for _ in range(3))
        self.distance_embedding = nn.Embedding(2 * max_length - 1, features // num_heads)
        self.num_heads, self.with_key = num_heads, with_key

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """x [B, T, D]; the mask is 0, or the lowest number where a key is hidden."""
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1))
            for projection in (self.query, self.key, self.value)
        )
        scores = relative_scores(query, key, self.distance_embedding.weight, self.with_key)
        seen = None if attention_mask is None else attention_mask == 0
        pooled = torch.einsum("bnts, bsnh -> btnh", masked_softmax(scores, seen), value)
        return pooled.flatten(start_dim=2), None


class NoPositions(nn.Module):
    """Nothing is added to the embeddings."""

    def forward(self, _positions: torch.Tensor) -> torch.Tensor:
        """Zero."""
        return torch.zeros((), dtype=torch.float64)


class Bert(nn.Module):
    """A model of `transformers` by its name, with its weights under its own names."""

    def __init__(self, architecture: str, positions: str = "absolute", **config: Any) -> None:
        super().__init__()
        import transformers

        given = {NAMES[name]: value for name, value in config.items()}
        given |= {"attn_implementation": "eager"}
        whole = getattr(transformers, architecture)(transformers.BertConfig(**given))
        encoder = getattr(whole, "bert", whole)
        if hasattr(whole, "cls"):  # one bias, also where version 5 has another that it never adds
            whole.cls.predictions.decoder.bias = whole.cls.predictions.bias
        if positions != "absolute":
            encoder.embeddings.position_embeddings = NoPositions()
            for layer in encoder.encoder.layer:
                layer.attention.self = RelativeSelfAttention(
                    config["features"], config["num_heads"], config["max_length"],
                    positions == "relative_key_query",
                )  # fmt: skip
        self.whole = [whole]  # in a list, for its parameters are to keep their names
        for name, child in whole.named_children():
            self.add_module(name, child)

    def forward(
        self,
        tokens: torch.Tensor,
        types: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Outputs:
        """The outputs by the names of `transformers`."""
        mask = None
        if lengths is not None:
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        (whole,) = self.whole
        outputs = whole(tokens, attention_mask=mask, token_type_ids=types, position_ids=positions)
        return {name: output for name, output in outputs.items() if output is not None}


class HiddenWords(nn.Module):
    """Words that are to be predicted, one by one: 15 % of a sequence, and at least one.

    80 % of them become [MASK], 10 % another word, 10 % stay.
    """

    def __init__(self, pad: int, cls: int, sep: int, mask: int) -> None:
        super().__init__()
        self.no_words, self.mask = {pad, cls, sep}, mask

    def forward(
        self, tokens: torch.Tensor, order: torch.Tensor, fate: torch.Tensor, words: torch.Tensor
    ) -> Outputs:
        """The tokens with words hidden, and the labels, where −100 is no word."""
        hidden, labels = tokens.clone(), torch.full_like(tokens, -100)
        for b, row in enumerate(tokens.tolist()):
            places = [t for t, token in enumerate(row) if token not in self.no_words]
            places.sort(key=lambda t: order[b, t].item(), reverse=True)
            for t in places[: max(1, round(0.15 * len(places)))]:
                labels[b, t] = tokens[b, t]
                if fate[b, t] < 0.8:
                    hidden[b, t] = self.mask
                elif fate[b, t] < 0.9:
                    hidden[b, t] = words[b, t]
        return {"tokens": hidden, "labels": labels}


SMALL: dict[str, Any] = {
    "vocabulary": 13,
    "features": 6,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_features": 11,
    "max_length": 9,
}
TOKENS: Inputs = {"tokens": ids([1, 5, 12, 2, 4, 7, 2], [1, 9, 2, 11, 2, 0, 0])}
TYPES: Inputs = {"types": ids([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0])}
PADDED: Inputs = {"lengths": np.array([7, 5])}


def cases() -> list[Case]:
    """Every case of BERT."""
    whole = TOKENS | TYPES | PADDED
    left = TOKENS | {"positions": ids([0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 0])}

    def of(architecture: str, **changes: Any) -> dict[str, Any]:
        return {"architecture": architecture, **SMALL, **changes}

    generator = np.random.default_rng(5)
    drawn = {
        "tokens": np.concatenate([generator.integers(0, 13, (3, 40)), np.full((1, 40), 2)]),
        "order": generator.random((4, 40)),
        "fate": generator.random((4, 40)),
        "words": generator.integers(0, 13, (4, 40)),
    }
    special = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
    return [
        *cases_of("bert/hidden_words", HiddenWords, hidden_words=(special, drawn)),
        *cases_of(
            "bert/encoder",
            Bert,
            encoder=(of("BertModel"), TOKENS),
            encoder_lengths=(of("BertModel", activation="gelu_new", num_types=3), whole),
            encoder_positions=(of("BertModel", activation="relu", epsilon=0.1), left),
            encoder_relative_key=(of("BertModel", positions="relative_key"), whole),
            encoder_relative_key_query=(of("BertModel", positions="relative_key_query"), whole),
        ),
        *cases_of(
            "bert/pre_training",
            Bert,
            pre_training=(of("BertForPreTraining"), whole),
            pre_training_untied=(of("BertForPreTraining", tied=False), whole),
            masked_words=(of("BertForMaskedLM"), whole),
        ),
        *cases_of(
            "bert/classification",
            Bert,
            sequence_classification=(of("BertForSequenceClassification", classes=5), whole),
            token_classification=(of("BertForTokenClassification", classes=5), whole),
        ),
    ]
