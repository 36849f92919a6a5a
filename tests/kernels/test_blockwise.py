"""What is particular to the blockwise kernel.

Its grid, its memory, and that it lowers for every platform.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers
from jattn.functional.block import EMPTY, FULL, PARTIAL
from jattn.kernels.blockwise import sizes
from jattn.kernels.blockwise.sizes import block_size
from jattn.kernels.grid import Grid
from jattn.request import Request


def request(query, key, value, score=jattn.scores.scaled_dot_product):
    return Request.of(query, key, value, score=score)


def grid_of(T, S, rows, columns):
    return Grid((), 1, T, S, rows, columns, examples=None)


@pytest.mark.parametrize(
    ("length", "largest"), [(1, 512), (509, 512), (513, 512), (1031, 512), (37, 4), (65536, 512)]
)
def test_blocks_cover_an_axis_with_none_to_spare(length, largest):
    size = block_size(length, largest)
    assert size <= min(length, largest) and -(-length // size) == -(-length // largest)


def test_every_entry_is_fresh_in_exactly_one_block():
    grid = grid_of(13, 17, 5, 4)
    seen = np.zeros((13, 17), int)
    for i in range(grid.num_rows):
        for j in range(grid.num_columns):
            fresh = np.asarray(grid.allowed(None, None, 0, i, j, 0))[0]
            seen[int(grid.row_start(i)) :, int(grid.column_start(j)) :][:5, :4] += fresh
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (masks.causal(), [[1, 0, 0], [2, 1, 0], [2, 2, 1]]),
        (masks.sliding_window(4), [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        (masks.padding(np.array(6)), [[2, 1, 0], [2, 1, 0], [2, 1, 0]]),
        (masks.segments(np.repeat([0, 1], [4, 8])), [[2, 0, 0], [0, 2, 2], [0, 2, 2]]),
        (~masks.causal(-1), [[1, 2, 2], [0, 1, 2], [0, 0, 1]]),
        (None, [[2, 2, 2]] * 3),
    ],
    ids=repr,
)
def test_rows_of_blocks_are_classified(mask, expected):
    grid = grid_of(12, 12, 4, 4)
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)
    came = [np.asarray(grid.classes(mask, None, 0, i, 0)).tolist() for i in range(3)]
    assert came == expected


def test_two_parts_of_two_examples_are_the_batch(monkeypatch, rng, x64):
    """Every kind of captured array, with gradients.

    Biases per example, lengths, positions, dropout, a user's mask.
    """
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, 2, length, 3, 5))) for length in (7, 11, 11)
    )
    bias, lengths = (
        jnp.asarray(rng.standard_normal((2, 2, 3, 1, 11))),
        jnp.asarray([[2, 11], [0, 7]]),
    )
    positions = (
        jnp.asarray(rng.integers(0, 9, (2, 2, 7))),
        jnp.asarray(rng.integers(0, 9, (2, 2, 11))),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def results(kernel, *arrays):
        def attend(query, key, value, bias, slopes):
            mask = masks.padding(lengths) & masks.mask_mod(
                lambda b, h, q_idx, k_idx: (b + h + q_idx + k_idx) % 5 > 0
            )
            modifier = (modifiers.bias(bias), modifiers.alibi(slopes))
            options = {
                "positions": positions,
                "dropout_rate": 0.3,
                "dropout_key": jax.random.key(1),
            }
            return jattn.attend(
                query, key, value, mask=mask, modifier=modifier, implementation=kernel, **options
            )

        output, pull = jax.vjp(attend, *arrays)
        return output, *pull(
            jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape)
        )

    monkeypatch.setattr(sizes, "one_cpu_device", lambda: True)
    monkeypatch.setattr(sizes, "SCORES", 2 * 3 * 7 * 11)
    arrays = query, key, value, bias, jnp.asarray([0.5, 0.25, 0.125])
    for came, truth in zip(results("blockwise", *arrays), results("dense", *arrays), strict=True):
        np.testing.assert_allclose(came, truth, rtol=1e-10, atol=1e-12)
    grid, *_ = sizes.choose_grid(request(query, key, value))
    assert (grid.num_parts, grid.block_batch) == (2, (2,))


def test_blocks_stay_within_bounds_whatever_the_batch_and_the_score(monkeypatch):
    monkeypatch.setattr(sizes, "one_cpu_device", lambda: True)

    def scores_of_a_block(B, T, score=jattn.scores.scaled_dot_product, N=8, H=64):
        grids = []

        def choose(x):
            grids.append(sizes.choose_grid(request(x, x, x, score))[0])

        jax.eval_shape(choose, jax.ShapeDtypeStruct((B, T, N, H), jnp.float32))
        return grids[0].examples * N * grids[0].rows * grids[0].columns

    scores = [scores_of_a_block(B, T) for B in (1, 32, 1021, 1024) for T in (64, 512, 4096)]
    assert max(scores) <= 4 * sizes.SCORES
    additive = functools.partial(jattn.scores.additive, weight=np.ones(64, np.float32))
    for score in (additive, jax.checkpoint(additive)):  # it looks inside
        assert scores_of_a_block(1, 2048, score) * 64 * 4 <= sizes.BLOCK_BYTES


def test_every_platform_can_lower_forward_and_backward():
    def loss(query, key, value, lengths, table, slopes):
        mask = masks.causal() & masks.padding(lengths)
        options = {
            "modifier": (modifiers.alibi(slopes), modifiers.relative_bias(table)),
            "implementation": "blockwise",
        }
        return jattn.attend(query, key, value, mask=mask, **options).sum()

    shapes = [(2, 1031, 4, 16), (2, 1031, 2, 16), (2, 1031, 2, 16), (2,), (4, 2061), (4,)]
    dtypes = [jnp.bfloat16] * 3 + [jnp.int32, jnp.float32, jnp.float32]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 4, 5)))
    exported = jax.export.export(gradient, platforms=["cpu", "cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")


MEMORY = """
import re, sys
import jax, jax.numpy as jnp
import jattn

implementation, length = sys.argv[1], int(sys.argv[2])
shape = (1, length, 2, 16)

@jax.jit
def gradients(*operands):
    def loss(*operands):
        bias = jattn.modifiers.bias(jnp.zeros((1, 1, 1)))
        options = dict(modifier=bias, implementation=implementation)
        return jattn.attend(*operands, mask=jattn.masks.causal(), **options).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(*operands)

def peak():  # of this process alone: what getrusage tells begins with the peak of its parent
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

operands = [jnp.ones(shape) for _ in range(3)]
compiled = gradients.lower(*operands).compile()
before = peak()
jax.block_until_ready(compiled(*operands))
print(peak() - before)
"""


def growth(implementation: str, length: int) -> int:
    """KiB by which the peak grows in one forward and backward pass."""
    command = [sys.executable, "-c", MEMORY, implementation, str(length)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_memory_grows_linearly_with_length_and_the_dense_kernel_fails_this():
    """Four times the length.

    Four times the memory if linear, sixteen times if not; eight lies between.
    """
    assert growth("blockwise", 16384) < 8 * max(growth("blockwise", 4096), 8192)
    assert growth("dense", 4096) > 8 * growth("dense", 1024)
