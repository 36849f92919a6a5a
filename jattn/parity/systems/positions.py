"""Positions: sinusoidal with their relative property, learned, and rotary."""

from typing import Any

import jax
import jax.numpy as jnp

from jattn import nn
from jattn.functional import positions
from jattn.parity.system import (
    Arguments,
    Arrays,
    System,
    constructor,
    rope_of,
    without_parameters,
)

Array = jax.Array


def rotate(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The rotation by an offset, applied to x, and the encodings before and after it."""
    features, offset, where = arguments["features"], arguments["offset"], inputs["positions"]
    rotation = positions.sinusoidal_rotation(offset, features)
    return {
        "rotation": rotation,
        "rotated": jnp.einsum("...d, ed -> ...e", inputs["x"], rotation),
        "encoding": positions.sinusoidal_encoding(where, features),
        "shifted": positions.sinusoidal_encoding(where + offset, features),
    }


def add_positions(module: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """The sequence with its positions added."""
    return {"output": module(inputs["x"])}


def rotary(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Heads turned by their positions, or by rows and columns."""
    places: Any = inputs.get("positions")
    if "rows" in inputs:
        places = inputs["rows"], inputs["columns"]
    options = {name: value for name, value in arguments.items() if name != "rope"}
    rope = rope_of(arguments["rope"])
    return {"output": positions.rotary(inputs["x"], places, rope=rope, **options)}


SYSTEMS = (
    System(
        "positions/sinusoidal",
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
        "positions/rotation",
        20,
        "relative property of sinusoidal positions",
        functions=("jattn.positions.sinusoidal_rotation",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="positions.RelativeRotation",
        call=rotate,
    ),
    System(
        "positions/learned",
        21,
        "learned absolute positions",
        functions=(),
        modules=("jattn.nn.LearnedPositions",),
        paper="Gehring et al. 2017",
        link="https://arxiv.org/abs/1705.03122",
        reference="positions.LearnedPositions",
        build=constructor(nn.LearnedPositions),
        call=add_positions,
    ),
    System(
        "positions/rotary",
        23,
        "rotary positions",
        functions=(
            "jattn.positions.rotary",
            "jattn.ropes.Rope",
            "jattn.ropes.Linear",
            "jattn.ropes.Dynamic",
            "jattn.ropes.Llama3",
            "jattn.ropes.Yarn",
            "jattn.ropes.LongRope",
        ),
        paper="Su et al. 2021",
        link="https://arxiv.org/abs/2104.09864",
        reference="positions.Rotary",
        call=rotary,
        note="frequencies and angles are float32 numbers, as in published models",
    ),
)
