"""config.json of BERT to and from the config of a `Bert`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from jattn.interop.huggingface import fields
from jattn.interop.huggingface.config import ENDS, NAMED
from jattn.interop.huggingface.fields import NULL
from jattn.models import bert
from jattn.nn.transformer_layers import gelu, gelu_tanh, relu

Json = Mapping[str, Any]

ARCHITECTURES: Mapping[str, type[nnx.Module]] = MappingProxyType(
    {
        "BertModel": bert.Bert,
        "BertForPreTraining": bert.BertForPreTraining,
        "BertForMaskedLM": bert.BertForMaskedLM,
        "BertForSequenceClassification": bert.BertForSequenceClassification,
        "BertForTokenClassification": bert.BertForTokenClassification,
    }
)
"""Architecture → class."""

_NAMES: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {
        "vocabulary": ("vocab_size", 30522),
        "features": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_features": ("intermediate_size", 3072),
        "max_length": ("max_position_embeddings", 512),
        "num_types": ("type_vocab_size", 2),
        "positions": ("position_embedding_type", "absolute"),
        "epsilon": ("layer_norm_eps", 1e-12),
        "dropout_rate": ("hidden_dropout_prob", 0.1),
        "attention_dropout_rate": ("attention_probs_dropout_prob", 0.1),
        "classifier_dropout_rate": ("classifier_dropout", None),
        "tied": ("tie_word_embeddings", True),
        "pad": ("pad_token_id", 0),
    }
)
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        **NAMED, **ENDS,
        **dict.fromkeys(
            ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "type_vocab_size"],
            fields.SIZE,
        ),
        "num_hidden_layers": fields.LAYERS,
        "num_labels": fields.SIZE + NULL,
        "id2label": fields.OBJECT + NULL,
        "position_embedding_type": fields.WORD,
        **dict.fromkeys(
            ["layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"],
            fields.NUMBER,
        ),
        "classifier_dropout": fields.NUMBER + NULL,
        "tie_word_embeddings": fields.FLAG,
        **dict.fromkeys(["is_decoder", "add_cross_attention"], fields.FLAG + NULL),
    }
)  # fmt: skip
ACTIVATIONS: Mapping[str, Callable[..., Any] | str] = MappingProxyType(
    {
        "gelu": "gelu",
        "relu": "relu",
        "gelu_new": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "gelu_fast": gelu_tanh,
    }
)


def read_config(config: Json) -> bert.Config:
    """The config of the BERT that a config.json describes.

    Args:
      config: its contents.

    Raises:
      ValueError: a field is of another kind, or asks for what `Bert` has not: a decoder, another
        activation, other positions.

    Example:
      >>> read_config({"model_type": "bert", "hidden_size": 384}).features
      384
    """
    fields.check(config, _KINDS)
    for flag in ("is_decoder", "add_cross_attention"):
        if config.get(flag):
            raise ValueError(f"{flag}: Bert is an encoder; a decoder is not known")
    activation = str(config.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    read = {ours: config.get(theirs, default) for ours, (theirs, default) in _NAMES.items()}
    named = config.get("id2label") or {}
    if not all(str(each).isdecimal() and isinstance(label, str) for each, label in named.items()):
        raise ValueError("id2label must hold the label of each number")
    labels = tuple(named[n] for n in sorted(named, key=int))
    unnamed = all(label in {"", f"LABEL_{n}"} for n, label in enumerate(labels))
    return bert.Config(
        **read, activation=ACTIVATIONS[activation],
        classes=len(labels) or config.get("num_labels") or 2, labels=None if unnamed else labels,
    )  # fmt: skip


def write_config(config: bert.Config, architecture: str, *, dtype: str) -> dict[str, Any]:
    """A config.json from which `transformers` makes the same model.

    Args:
      config: of the model.
      architecture: a name of `ARCHITECTURES`.
      dtype: of the weights, such as "float32".

    Raises:
      ValueError: the activation has no name there.

    Example:
      >>> write_config(bert.Config(11), "BertModel", dtype="float32")["hidden_size"]
      256
    """
    named: dict[Any, str] = {relu: "relu", gelu: "gelu"}
    given = named.get(config.activation, config.activation)
    names = [name for name, activation in ACTIVATIONS.items() if activation == given]
    if not names:
        raise ValueError(f"activation must be one that transformers names, got {given!r}")
    written = {theirs: getattr(config, ours) for ours, (theirs, _) in _NAMES.items()}
    labels = dict(enumerate(config.labels or [f"LABEL_{n}" for n in range(config.classes)]))
    return written | {
        "architectures": [architecture],
        "model_type": "bert",
        "dtype": dtype,
        "hidden_act": names[0],
        "id2label": labels,
        "label2id": {label: n for n, label in labels.items()},
    }
