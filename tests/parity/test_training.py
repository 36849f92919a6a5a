"""From the same weights, data and settings, fifty optimizer steps are PyTorch's."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jattn.interop import from_flax, to_flax
from jattn.models.pretraining import pretraining_loss
from jattn.models.tokens import cross_entropy as token_loss
from jattn.parity.fixtures import load
from jattn.parity.systems import SYSTEMS

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "training"
FIXTURES = {fixture.title: fixture for fixture in map(load, sorted(FOLDER.glob("*/*.safetensors")))}
STEPS = 50


def squared_error(outputs, labels):
    return jnp.mean(jnp.square(outputs["output"] - labels["target"]))


def cross_entropy(outputs, labels):
    return token_loss(outputs["logits"], labels["target"], lengths=labels.get("lengths"))


def class_entropy(outputs, labels):
    return token_loss(outputs["logits"], labels["target"])


def pre_training(outputs, labels):
    logits = outputs["prediction_logits"], outputs["seq_relationship_logits"]
    return pretraining_loss(*logits, labels["words"], labels["follows"])


LOSSES = {
    "squared_error": squared_error,
    "cross_entropy": cross_entropy,
    "class_entropy": class_entropy,
    "pre_training": pre_training,
}


def torch_clip(max_norm):
    """`torch.nn.utils.clip_grad_norm_`: g · min(1, max_norm / (‖g‖ + 1e-6)); Optax has no 1e-6."""

    def clip(gradients, _parameters):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def optimizer_of(settings, clip):
    """Optax's defaults are PyTorch's: Adam's β 0.9 and 0.999, and its 1e-8 outside the root.

    That of AdamW's decay is not, so it is always given.
    """
    settings = dict(settings)
    name, max_norm = settings.pop("name"), settings.pop("max_norm", None)
    method = {"sgd": optax.sgd, "adam": optax.adam, "adamw": optax.adamw}[name](**settings)
    return method if max_norm is None else optax.chain(clip(max_norm), method)


def train(fixture, clip=torch_clip):
    """Losses and gradient norms before each step, and the last weights, under PyTorch's names."""
    system, settings = SYSTEMS[fixture.system], fixture.arguments
    module = nnx.eval_shape(lambda: system.build(settings["module"], np.dtype(np.float64)))
    rules = system.rules_for(module)
    structure, shapes, *rest = nnx.split(module, nnx.Param, ...)
    labels = {
        name.removeprefix("label/"): x
        for name, x in fixture.inputs.items()
        if name.startswith("label/")
    }
    inputs = {
        name: jnp.asarray(x) for name, x in fixture.inputs.items() if not name.startswith("label/")
    }
    optimizer = optimizer_of(settings["optimizer"], clip)

    def loss(parameters):
        outputs = system.call(nnx.merge(structure, parameters, *rest), inputs, settings["module"])
        return LOSSES[settings["loss"]](outputs, labels)

    def step(carry, _):
        parameters, state = carry
        value, gradients = jax.value_and_grad(loss)(parameters)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), (
            value,
            optax.tree.norm(gradients),
        )

    @jax.jit
    def run(parameters):
        (parameters, _), curves = jax.lax.scan(
            step, (parameters, optimizer.init(parameters)), length=STEPS
        )
        return parameters, *curves

    parameters, losses, norms = run(to_flax(fixture.parameters, shapes, rules))
    trained = {f"trained/{name}": x for name, x in from_flax(parameters, rules).items()}
    return {"losses": np.asarray(losses), "norms": np.asarray(norms), **trained}


@pytest.mark.parametrize("name", FIXTURES)
def test_losses_gradients_and_last_weights_follow_pytorch(x64, name):
    expected, found = FIXTURES[name].outputs, train(FIXTURES[name])
    assert found.keys() == expected.keys()
    assert expected["losses"].shape == expected["norms"].shape == (STEPS,)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-8, atol=0)
    for tensor, array in expected.items():
        np.testing.assert_allclose(
            found[tensor], array, rtol=0, atol=1e-8 * np.abs(array).max(), err_msg=tensor
        )


@pytest.mark.parametrize("name", FIXTURES)
def test_there_was_something_to_follow(name):
    losses = FIXTURES[name].outputs["losses"]
    assert losses[-1] < losses[0] / 2


def test_gradients_are_clipped_at_first_and_not_at_last():
    fixture = FIXTURES["translation/by_heart"]
    max_norm = fixture.arguments["optimizer"]["max_norm"]
    assert fixture.outputs["norms"][-1] < max_norm < fixture.outputs["norms"][0]


def test_clipping_without_the_1e_6_is_told_apart(x64):
    fixture = FIXTURES["translation/by_heart"]
    found, expected = train(fixture, optax.clip_by_global_norm)["losses"], fixture.outputs["losses"]
    assert np.abs(found / expected - 1).max() > 1e-8
