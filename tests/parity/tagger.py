"""What the ports of the recorded tagger share, of NNX and of Linen."""

import pathlib

import jax
import jax.numpy as jnp

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "ports" / "tagger" / "whole.safetensors"
N, H = 2, 4
D = N * H


def run_lstm(x, gates):
    """Hidden states [B, T, D] of an LSTM; `gates(x, h)` gives input, forget, cell and output."""

    def step(state, x):
        h, c = state
        i, f, g, o = gates(x, h)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((len(x), D), x.dtype)
    return jax.lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def turn(x, *, neighbours=False):
    """Rotary positions of halves, or of neighbours."""
    angles = jnp.arange(x.shape[-2])[:, None] * 100.0 ** (-jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if neighbours:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
