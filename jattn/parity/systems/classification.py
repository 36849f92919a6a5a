"""Classifiers of sequences, by the last step and by attention."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.models import classifier
from jattn.parity.system import Arguments, Arrays, System

Array = jax.Array


def classifier_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """The parts of the config by the names that PyTorch's reference shares."""
    parts = (
        nn.RNN,
        nn.LSTM,
        nn.GRU,
        nn.FeaturePooling,
        nn.LearnedQueryPooling,
        classifier.LastStep,
    )
    named: dict[Any, Any] = {part.__name__: part for part in parts}
    options: dict[str, Any] = {name: named.get(value, value) for name, value in arguments.items()}
    return classifier.Classifier(classifier.Config(**options), param_dtype=dtype, rngs=nnx.Rngs(0))


def classify(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Logits."""
    return {"logits": module(inputs["tokens"], lengths=inputs.get("lengths"))}


def classify_by_attention(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Logits and the weights of the attention."""
    logits, weights = module(inputs["tokens"], lengths=inputs.get("lengths"), return_weights=True)
    return {"logits": logits, "weights": weights}


SYSTEMS = (
    System(
        "classification/last_step",
        26,
        "sequence classifier by the last step",
        functions=(),
        modules=("jattn.models.Classifier",),
        paper="Dai and Le 2015",
        link="https://arxiv.org/abs/1511.01432",
        reference="classification.Classifier",
        build=classifier_module,
        call=classify,
        note="of both directions their ends; `pooling=LastStep` is the common `output[:, -1]`",
    ),
    System(
        "classification/attention",
        30,
        "text classifier by attention",
        functions=(),
        modules=("jattn.models.Classifier",),
        paper="Zhou et al. 2016",
        link="https://aclanthology.org/P16-2034",
        reference="classification.Classifier",
        build=classifier_module,
        call=classify_by_attention,
    ),
)
