"""BERT: the encoder, its pre-training, and the data of that."""

from typing import Any

import jax
from flax import nnx

from jattn.interop.huggingface import bert_config
from jattn.interop.huggingface.bert import PRE_TRAINING
from jattn.models import bert, pretraining
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def model_of(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The class of an architecture, from its config."""
    config = dict(arguments)
    cls: Any = bert_config.ARCHITECTURES[config.pop("architecture")]
    activation = bert_config.ACTIVATIONS[config.pop("activation", "gelu")]
    return cls(bert.Config(**config, activation=activation), param_dtype=dtype, rngs=nnx.Rngs(0))


def encode(model: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """The vectors of the tokens, and of the sequence."""
    hidden = model(**inputs)
    return {"last_hidden_state": hidden, "pooler_output": model.pool(hidden)}


def pre_train(model: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The logits of words, and of the order of the texts."""
    outputs = model(**inputs)
    if arguments["architecture"] == "BertForMaskedLM":
        return {"logits": outputs}
    return {"prediction_logits": outputs[0], "seq_relationship_logits": outputs[1]}


def classify(model: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Logits of the classes."""
    return {"logits": model(**inputs)}


def hide(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The words that the fixture's numbers choose."""
    special = pretraining.Special(**arguments)
    names = "tokens", "order", "fate", "words"
    tokens, order, fate, words = (inputs[name] for name in names)
    tokens, labels = pretraining.hide_words(tokens, special, order, fate, words)
    return {"tokens": tokens, "labels": labels}


BERT: dict[str, Any] = {
    "functions": ("jattn.attend",),
    "paper": "Devlin et al. 2019",
    "link": "https://arxiv.org/abs/1810.04805",
    "reference": "bert.Bert",
    "build": model_of,
}
SYSTEMS = (
    System("bert/encoder", 36, "BERT", modules=("jattn.models.Bert",), call=encode, **BERT),
    System(
        "bert/pre_training",
        36,
        "BERT with heads for hidden words and the next sentence",
        modules=("jattn.models.BertForPreTraining", "jattn.models.BertForMaskedLM"),
        call=pre_train,
        rules=PRE_TRAINING[-1],
        **BERT,
    ),
    System(
        "bert/classification",
        36,
        "BERT with a classifier of sequences or tokens",
        modules=(
            "jattn.models.BertForSequenceClassification",
            "jattn.models.BertForTokenClassification",
        ),
        call=classify,
        **BERT,
    ),
    System(
        "bert/hidden_words",
        37,
        "data of BERT's pre-training",
        functions=(
            "jattn.models.pretraining.mask_words",
            "jattn.models.pretraining.sentence_pairs",
            "jattn.models.pretraining.pack_pairs",
        ),
        paper="Devlin et al. 2019",
        link="https://arxiv.org/abs/1810.04805",
        reference="bert.HiddenWords",
        call=hide,
        note="drawn anew from every key",
    ),
)
