"""BERT and its heads, as `transformers` names their weights, today and in old files."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from jattn import nn
from jattn.interop.rules import TRANSPOSE, Rule, Tied, within
from jattn.interop.torch.layers import EMBEDDING, LINEAR, NORM
from jattn.interop.torch.table import Table
from jattn.models import bert

RELATIVE = (Rule("distance_embedding.weight", "embedding"),)
LAYER = (
    *within(LINEAR, "attention.self.query", "attention.query"),
    *within(LINEAR, "attention.self.key", "attention.key"),
    *within(LINEAR, "attention.self.value", "attention.value"),
    *within(RELATIVE, "attention.self", "attention.attend"),
    *within(LINEAR, "attention.output.dense", "attention.out"),
    *within(NORM, "attention.output.LayerNorm", "norm1"),
    *within(LINEAR, "intermediate.dense", "mlp.linear1"),
    *within(LINEAR, "output.dense", "mlp.linear2"),
    *within(NORM, "output.LayerNorm", "norm2"),
)
ENCODER = (
    *within(EMBEDDING, "embeddings.word_embeddings", "embedding"),
    *within(EMBEDDING, "embeddings.token_type_embeddings", "types"),
    *within(EMBEDDING, "embeddings.position_embeddings", "positions"),
    *within(NORM, "embeddings.LayerNorm", "norm"),
    *within(LAYER, "encoder.layer.{layer}", "layers.{layer}"),
    *within(LINEAR, "pooler.dense", "pooler"),
)
IN_MODEL = within(ENCODER, "bert", "bert")
_WORDS, _DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
_BIAS = "cls.predictions.bias"
_TABLE, _BOTH_TABLES = (
    Rule(names, "bert.embedding.embedding", *layout)
    for names, *layout in ((_WORDS,), ((_WORDS, f"{_DECODER}.weight"), Tied(2)))
)
_OUT = Rule(f"{_DECODER}.weight", "words.out.kernel", TRANSPOSE)
_ONCE, _TWICE = (
    Rule(names, "words.bias", *layout)
    for names, *layout in ((_BIAS,), ((_BIAS, f"{_DECODER}.bias"), Tied(2)))
)
TRANSFORM = (
    *within(LINEAR, "transform.dense", "transform"),
    *within(NORM, "transform.LayerNorm", "norm"),
)


def _pre_training(*words: Rule) -> tuple[Rule, ...]:
    return (
        *(rule for rule in IN_MODEL if _WORDS not in rule.torch),
        *words,
        *within(TRANSFORM, "cls.predictions", "words"),
        *within(LINEAR, "cls.seq_relationship", "next"),
    )


# A file holds what is tied once; a state dict, and some old files, hold it under both names
PRE_TRAINING = (
    _pre_training(_TABLE, _ONCE),
    _pre_training(_TABLE, _OUT, _TWICE),
    _pre_training(_BOTH_TABLES, _TWICE),
    _pre_training(_BOTH_TABLES, _ONCE),
    _pre_training(_TABLE, _OUT, _ONCE),
)
CLASSIFIER = (*IN_MODEL, *within(LINEAR, "classifier", "out"))
HEADS = "cls.", "classifier.", "qa_outputs."  # that a file of BERT may hold beside the encoder
_OLD = ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")
_IGNORED = ("embeddings.position_ids",)


def _tables(names: str, *rules: Iterable[Rule]) -> tuple[Table, ...]:
    return tuple(Table(names, tuple(each), _OLD, _IGNORED) for each in rules)


def selected(tensors: Mapping[str, Any], cls: type[nnx.Module]) -> dict[str, Any]:
    """Of the tensors of any BERT those of the encoder, without `bert.`, and of a class's own heads.

    All have the names of today; what holds nothing that is learned is left out.

    Raises:
      ValueError: a tensor stands there under two names.

    Example:
      >>> old = {"bert.embeddings.LayerNorm.gamma": 1, "embeddings.position_ids": 2, "cls.x": 3}
      >>> selected(old, bert.Bert)
      {'embeddings.LayerNorm.weight': 1}
    """
    heads, found = heads_of(cls), dict[str, Any]()
    for name, tensor in Table("", (), _OLD, _IGNORED).current(tensors).items():
        name = name.removeprefix("bert.")
        if name.startswith(HEADS) and not name.startswith(heads):
            continue
        if name in found:
            raise ValueError(f"{name} stands in the tensors with 'bert.' before it, too")
        found[name] = tensor
    return found


def heads_of(cls: type[nnx.Module]) -> tuple[str, ...]:
    """How the names of the weights of a class's own heads begin.

    Example:
      >>> heads_of(bert.BertForMaskedLM)
      ('cls.predictions.',)
    """
    if issubclass(cls, bert.BertForMaskedLM):
        follows = ("cls.seq_relationship.",) if issubclass(cls, bert.BertForPreTraining) else ()
        return ("cls.predictions.", *follows)
    return ("classifier.",) if issubclass(cls, bert.BertForSequenceClassification) else ()


TABLES = {
    bert.Bert: _tables("transformers.BertModel", ENCODER, within(ENCODER, "bert", "")),
    bert.BertForPreTraining: _tables("transformers.BertForPreTraining", *PRE_TRAINING),
    bert.BertForMaskedLM: _tables("transformers.BertForMaskedLM", *PRE_TRAINING),
    bert.BertForSequenceClassification: _tables(
        "transformers.BertForSequenceClassification", CLASSIFIER
    ),
    bert.BertForTokenClassification: _tables("transformers.BertForTokenClassification", CLASSIFIER),
    bert.Block: _tables("attention, intermediate, output", LAYER),
    bert.WordHead: _tables(
        "transform, bias, decoder",
        (*TRANSFORM, Rule("bias", "bias"), *within(LINEAR[:1], "decoder", "out")),
    ),
    nn.RelativePositions: (Table("distance_embedding", RELATIVE),),
}
