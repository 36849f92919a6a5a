"""Rows 19 to 23: positions; how each system is built from a fixture and called with its inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn import nn
from jattn.functional import positions
from jattn.interop.rules import Rule
from jattn.parity.system import Arguments, Arrays, System, constructor, without_parameters

Array = jax.Array


def rotate(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Row 20: the rotation by an offset, applied to x, and the encodings before and after it."""
    features, offset, where = arguments["features"], arguments["offset"], inputs["positions"]
    rotation = positions.sinusoidal_rotation(offset, features)
    return {
        "rotation": rotation,
        "rotated": jnp.einsum("...d, ed -> ...e", inputs["x"], rotation),
        "encoding": positions.sinusoidal_encoding(where, features),
        "shifted": positions.sinusoidal_encoding(where + offset, features),
    }


def add_positions(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Rows 19 and 21."""
    return {"output": module(inputs["x"])}


SYSTEMS = (
    System(
        19,
        "sinusoidal positions",
        functions=("jattn.positions.sinusoidal_encoding",),
        modules=("jattn.nn.SinusoidalPositions",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="positions.SinusoidalPositions",
        build=without_parameters(nn.SinusoidalPositions),
        call=add_positions,
    ),
    System(
        20,
        "relative property of sinusoidal positions",
        functions=("jattn.positions.sinusoidal_rotation",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="positions.RelativeRotation",
        call=rotate,
    ),
    System(
        21,
        "learned absolute positions",
        functions=(),
        modules=("jattn.nn.LearnedPositions",),
        paper="Gehring et al. 2017",
        link="https://arxiv.org/abs/1705.03122",
        reference="positions.LearnedPositions",
        build=constructor(nn.LearnedPositions),
        call=add_positions,
        rules=(Rule("table.weight", "embedding"),),
    ),
)
