"""Small folders of models, and changes of what they hold."""

import functools
import json

import numpy as np
import safetensors.numpy
from flax import nnx

from jattn import models
from jattn.interop import save_pretrained, to_torch
from jattn.models.causal_lm import Config

LM = Config(11, 4, 2, 2, 1, 2, 5, stop=(3,))
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def lm():
    return models.CausalLM(LM, rngs=nnx.Rngs(0))


@functools.cache
def tensors():
    return to_torch(lm())


def whole(folder):
    """A folder of one file of weights."""
    save_pretrained(lm(), folder)
    return folder


def sharded(folder):
    """A folder of two files of weights, and their index."""
    save_pretrained(lm(), folder, max_shard_bytes=800)
    return folder


def configured(folder, **changes):
    """Another config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder, **changes):
    """Other weights; None takes one away."""
    held = {k: np.asarray(v) for k, v in (tensors() | changes).items() if v is not None}
    safetensors.numpy.save_file(held, folder / FILE)
