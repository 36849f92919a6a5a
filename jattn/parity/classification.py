"""Rows 26 to 30: sequences pooled and classified; how to build each from a fixture and call it."""

from typing import Any

import jax
from flax import nnx

from jattn import nn
from jattn.interop import torch_layouts as layouts
from jattn.models import classifier
from jattn.parity.system import Arguments, Arrays, System, constructor

Array = jax.Array


def pool(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 27 to 29."""
    context, weights = module(inputs["x"], lengths=inputs.get("lengths"), return_weights=True)
    return {"context": context, "weights": weights}


def classifier_module(arguments: Arguments, dtype: Any) -> nnx.Module:
    """Rows 26 and 30: the parts of the config by the names that PyTorch's reference shares."""
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
    """Row 26."""
    return {"logits": module(inputs["tokens"], lengths=inputs.get("lengths"))}


def classify_by_attention(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Row 30."""
    logits, weights = module(inputs["tokens"], lengths=inputs.get("lengths"), return_weights=True)
    return {"logits": logits, "weights": weights}


SYSTEMS = (
    System(
        26,
        "sequence classifier by the last step",
        functions=(),
        modules=("jattn.models.Classifier",),
        paper="Dai and Le 2015",
        link="https://arxiv.org/abs/1511.01432",
        reference="classification.Classifier",
        build=classifier_module,
        call=classify,
        rules=layouts.CLASSIFIER,
        note="of both directions their ends; `pooling=LastStep` is the common `output[:, -1]`",
    ),
    System(
        27,
        "feature attention pooling",
        functions=("jattn.attend",),
        modules=("jattn.nn.FeaturePooling",),
        paper="Shen et al. 2018",
        link="https://arxiv.org/abs/1709.04696",
        reference="sequence_pooling.FeaturePooling",
        build=constructor(nn.FeaturePooling),
        call=pool,
        rules=layouts.FEATURE_POOLING,
    ),
    System(
        28,
        "multi-hop pooling",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHopPooling",),
        paper="Lin et al. 2017",
        link="https://arxiv.org/abs/1703.03130",
        reference="sequence_pooling.MultiHopPooling",
        build=constructor(nn.MultiHopPooling),
        call=pool,
        rules=layouts.MULTI_HOP_POOLING,
        note="softmax over time; code in circulation runs it over the batch",
    ),
    System(
        29,
        "attention pooling with a learned query",
        functions=("jattn.attend",),
        modules=("jattn.nn.LearnedQueryPooling",),
        paper="Yang et al. 2016",
        link="https://aclanthology.org/N16-1174",
        reference="sequence_pooling.LearnedQueryPooling",
        build=constructor(nn.LearnedQueryPooling),
        call=pool,
        rules=layouts.LEARNED_QUERY_POOLING,
    ),
    System(
        30,
        "text classifier by attention",
        functions=(),
        modules=("jattn.models.Classifier",),
        paper="Zhou et al. 2016",
        link="https://aclanthology.org/P16-2034",
        reference="classification.Classifier",
        build=classifier_module,
        call=classify_by_attention,
        rules=layouts.CLASSIFIER,
    ),
)
