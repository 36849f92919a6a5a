"""Trains references for fifty steps; records the data, the first and last weights, every loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference import bahdanau, bert, causal_lm, char_rnn, pooling, transformer
from experiments.torch_reference.cases import Case
from jattn.parity.fixtures import Fixture
from jattn.parity.recording import versions

Tensors = dict[str, torch.Tensor]
STEPS = 50


@dataclasses.dataclass(frozen=True)
class Training:
    """A case to be trained, on the whole of its inputs at every step.

    Args:
      case: the reference, its arguments and its inputs.
      labels: what the loss needs besides the outputs.
      loss: a name in `LOSSES`.
      optimizer: `name`, one in `OPTIMIZERS`, and `learning_rate`; `weight_decay`, where it has one;
        `max_norm` where gradients are clipped.
    """

    case: Case
    labels: Mapping[str, np.ndarray]
    loss: str
    optimizer: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Name of the fixture's file, in the folder of the other fixtures."""
        return f"training/{self.case.file_name}"


def squared_error(outputs: Tensors, labels: Tensors) -> torch.Tensor:
    """Mean of the squared error."""
    return nn.functional.mse_loss(outputs["output"], labels["target"])


def cross_entropy(outputs: Tensors, labels: Tensors) -> torch.Tensor:
    """Mean over the tokens [B, T] that lie within the lengths [B], where there are some."""
    target = labels["target"]
    if "lengths" in labels:
        target = target.masked_fill(
            torch.arange(target.shape[1]) >= labels["lengths"][:, None], -100
        )
    return nn.functional.cross_entropy(
        outputs["logits"].flatten(0, 1), target.flatten(), ignore_index=-100
    )


def class_entropy(outputs: Tensors, labels: Tensors) -> torch.Tensor:
    """Mean over the examples [B]."""
    return nn.functional.cross_entropy(outputs["logits"], labels["target"])


def pre_training_loss(outputs: Tensors, labels: Tensors) -> torch.Tensor:
    """That of `transformers`: hidden words, and whether the second text follows the first."""
    words = nn.functional.cross_entropy(
        outputs["prediction_logits"].flatten(0, 1), labels["words"].flatten(), ignore_index=-100
    )
    follows = outputs["seq_relationship_logits"]
    return words + nn.functional.cross_entropy(follows, labels["follows"])


LOSSES: dict[str, Callable[[Tensors, Tensors], torch.Tensor]] = {
    "squared_error": squared_error,
    "cross_entropy": cross_entropy,
    "class_entropy": class_entropy,
    "pre_training": pre_training_loss,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def kernel_regression() -> Training:
    """Each sample of a noisy curve is predicted from all others."""
    generator = np.random.default_rng(3)
    x = np.sort(generator.uniform(0, 5, size=(1, 47, 1)), axis=1)
    y = 2 * np.sin(x) + x**0.8 + generator.normal(scale=0.5, size=x.shape)
    inputs = {"query": x, "key": x, "value": y}
    case = Case(
        "pooling/parametric_kernel_regression",
        "leave_one_out",
        pooling.ParametricKernelRegression,
        {"leave_one_out": True},
        inputs,
    )
    return Training(case, {"target": y}, "squared_error", {"name": "sgd", "learning_rate": 0.5})


def spelling() -> Training:
    """Of "hello" → "ohlol", with the letters in alphabetical order."""
    sizes = {"vocabulary": 4, "embedding_features": 10, "hidden_features": 8, "num_layers": 2}
    arguments = {"kind": "EmbeddedCharRNN", **sizes}
    tokens = {"tokens": np.array([[1, 0, 2, 2, 3]])}
    case = Case("char_rnn/spelling", "ohlol", char_rnn.char_rnn, arguments, tokens)
    adam = {"name": "adam", "learning_rate": 0.05}
    return Training(case, {"target": np.array([[3, 1, 2, 3, 2]])}, "cross_entropy", adam)


def translation() -> Training:
    """A few padded pairs are learnt by heart; 1 starts a target and 2 ends it."""
    model = {
        "source_vocabulary": 13,
        "target_vocabulary": 17,
        "embedding_features": 5,
        "hidden_features": 7,
        "num_layers": 2,
    }
    source = np.array([[3, 1, 12, 4, 0], [7, 7, 2, 9, 11], [1, 0, 0, 0, 0]])
    target = np.array([[16, 3, 9, 2], [5, 5, 2, 0], [8, 2, 0, 0]])
    target_in = np.concatenate([np.ones((3, 1), target.dtype), target[:, :-1]], axis=1)
    inputs = {"source": source, "target_in": target_in, "lengths": np.array([4, 5, 1])}
    labels = {"target": target, "lengths": np.array([4, 3, 2])}
    adam = {"name": "adam", "learning_rate": 0.02, "max_norm": 0.5}
    return Training(
        Case("translation/bahdanau", "by_heart", bahdanau.BahdanauTranslator, model, inputs),
        labels,
        "cross_entropy",
        adam,
    )


def sequence_classification() -> Training:
    """Random sequences of features are classified by heart, of different lengths."""
    generator = np.random.default_rng(5)
    config = transformer.FEATURES | {"dropout_rate": 0.0, "classes": 3}
    inputs = {"x": generator.normal(size=(6, 5, 7)), "lengths": np.array([5, 3, 4, 5, 2, 5])}
    case = Case(
        "transformer/feature_classifier",
        "by_heart",
        transformer.FeatureClassifier,
        config,
        inputs,
    )
    adam = {"name": "adam", "learning_rate": 0.01}
    return Training(case, {"target": np.array([0, 1, 2, 2, 1, 0])}, "class_entropy", adam)


def language_modelling() -> Training:
    """A few sequences of tokens are learnt by heart, each token from those before it."""
    generator = np.random.default_rng(7)
    tokens = generator.integers(13, size=(3, 10))
    case = Case(
        "causal_lm/model",
        "by_heart",
        causal_lm.CausalLM,
        causal_lm.FORMS["llama"],
        {"tokens": tokens[:, :-1]},
    )
    adamw = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "max_norm": 0.5}
    return Training(case, {"target": tokens[:, 1:]}, "cross_entropy", adamw)


def pre_training() -> Training:
    """Hidden words and the order of two texts are learnt by heart."""
    generator = np.random.default_rng(11)
    tokens = generator.integers(4, 13, size=(4, 9))
    words = np.where(generator.random(tokens.shape) < 0.3, tokens, -100)
    inputs = {
        "tokens": np.where(words == -100, tokens, 3),
        "types": (np.arange(9) > np.array([[3], [4], [5], [2]])).astype(np.int64),
        "lengths": np.array([9, 7, 8, 9]),
    }
    words = np.where(np.arange(9) < inputs["lengths"][:, None], words, -100)
    still = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    arguments = {"architecture": "BertForPreTraining", **bert.SMALL, **still}
    case = Case("bert/pre_training", "by_heart", bert.Bert, arguments, inputs)
    adamw = {"name": "adamw", "learning_rate": 0.005, "weight_decay": 0.1, "max_norm": 0.5}
    labels = {"words": words, "follows": np.array([0, 1, 1, 0])}
    return Training(case, labels, "pre_training", adamw)


def all_trainings() -> list[Training]:
    """Every training that has a fixture."""
    return [
        kernel_regression(),
        spelling(),
        translation(),
        sequence_classification(),
        language_modelling(),
        pre_training(),
    ]


def train(training: Training) -> Fixture:
    """Trains for fifty steps in float64.

    Outputs are the losses and gradient norms [50] before each step, and the last weights.
    """
    case = training.case
    generator = np.random.default_rng(case.seed)
    module = case.reference(**case.arguments).double().train()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(
                torch.from_numpy(np.array(generator.normal(scale=0.5, size=tuple(parameter.shape))))
            )
    first = _arrays(parameters)
    losses, norms = _optimise(module, training)
    data = {**case.inputs, **{f"label/{name}": label for name, label in training.labels.items()}}
    trained = {f"trained/{name}": array for name, array in _arrays(parameters).items()}
    return Fixture(
        system=case.system,
        case=case.name,
        arguments={
            "module": case.arguments,
            "loss": training.loss,
            "optimizer": training.optimizer,
        },
        seed=case.seed,
        versions=versions(),
        parameters=first,
        inputs={name: np.asarray(array) for name, array in data.items()},
        outputs={"losses": np.array(losses), "norms": np.array(norms), **trained},
    )


def _optimise(module: nn.Module, training: Training) -> tuple[list[float], list[float]]:
    settings = dict(training.optimizer)
    name, rate = settings.pop("name"), settings.pop("learning_rate")
    max_norm = settings.pop("max_norm", float("inf"))
    optimizer = OPTIMIZERS[name](module.parameters(), lr=rate, **settings)
    inputs = {name: torch.from_numpy(array) for name, array in training.case.inputs.items()}
    labels = {name: torch.from_numpy(array) for name, array in training.labels.items()}
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = LOSSES[training.loss](module(**inputs), labels)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), max_norm).item())
        losses.append(loss.item())
        optimizer.step()
    return losses, norms


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
