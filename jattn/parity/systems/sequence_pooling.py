"""Sequences pooled over time: by features, by several queries, by one learned query."""

from typing import Any

import jax

from jattn import nn
from jattn.parity.system import Arguments, Arrays, System, constructor

Array = jax.Array


def pool(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Context and weights."""
    context, weights = module(inputs["x"], lengths=inputs.get("lengths"), return_weights=True)
    return {"context": context, "weights": weights}


SYSTEMS = (
    System(
        "sequence_pooling/feature",
        27,
        "feature attention pooling",
        functions=("jattn.attend",),
        modules=("jattn.nn.FeaturePooling",),
        paper="Shen et al. 2018",
        link="https://arxiv.org/abs/1709.04696",
        reference="sequence_pooling.FeaturePooling",
        build=constructor(nn.FeaturePooling),
        call=pool,
    ),
    System(
        "sequence_pooling/multi_hop",
        28,
        "multi-hop pooling",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHopPooling",),
        paper="Lin et al. 2017",
        link="https://arxiv.org/abs/1703.03130",
        reference="sequence_pooling.MultiHopPooling",
        build=constructor(nn.MultiHopPooling),
        call=pool,
        note="softmax over time; code in circulation runs it over the batch",
    ),
    System(
        "sequence_pooling/learned_query",
        29,
        "attention pooling with a learned query",
        functions=("jattn.attend",),
        modules=("jattn.nn.LearnedQueryPooling",),
        paper="Yang et al. 2016",
        link="https://aclanthology.org/N16-1174",
        reference="sequence_pooling.LearnedQueryPooling",
        build=constructor(nn.LearnedQueryPooling),
        call=pool,
    ),
)
