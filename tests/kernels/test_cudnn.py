"""Which requests go to cuDNN, and how.

Its hardware is played by jax.nn's own code for other platforms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores

B, T, S, N, K, H = 2, 7, 11, 6, 3, 8


@pytest.fixture
def asked(monkeypatch):
    """What cuDNN was asked for, on a machine that says it has a GPU."""
    calls, original = [], jax.nn.dot_product_attention

    def record(query, key, value, *, implementation, **options):
        calls.append({"implementation": implementation, **options})
        with jax.numpy_dtype_promotion("standard"):
            return original(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


def operands(rng, S=S, dtype=jnp.bfloat16, V=H):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("S", "options", "expected"),
    [
        (S, {}, {"scale": H**-0.5, "is_causal": False}),
        (T, {"mask": masks.causal()}, {"scale": H**-0.5, "is_causal": True}),
        (
            S,
            {"score": functools.partial(scores.scaled_dot_product, scale=2.0)},
            {"scale": 2.0, "is_causal": False},
        ),
    ],
)
def test_what_cudnn_honours_exactly_is_its(asked, rng, S, options, expected):
    arrays = operands(rng, S)
    came = jattn.attend(*arrays, implementation="cudnn", **options)
    assert asked == [{"implementation": "cudnn", **expected}]
    truth = jattn.attend(
        *(array.astype(jnp.float32) for array in arrays), implementation="dense", **options
    )
    assert came.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits
    np.testing.assert_allclose(came.astype(jnp.float32), truth, rtol=2**-7, atol=2**-7)


REFUSED = {
    "not float32": {"dtype": jnp.float32},
    "not causal": {"mask": masks.causal()},  # T differs from S: some keys are seen by none
    "not sliding_window": {"mask": masks.sliding_window(3)},
    "score": {"score": scores.dot_product},
    "constant scale": {"score": functools.partial(scores.scaled_dot_product, scale=jnp.ones(N))},
    "modifier": {"modifier": modifiers.soft_cap(2.0)},
    "dropout": {"dropout_rate": 0.5, "dropout_key": jax.random.key},
    "return_lse": {"return_lse": True},
    "return_weights": {"return_weights": True},
    "width of its keys": {"V": 5},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_everything_else_is_refused_by_name(asked, rng, reason):
    options = dict(REFUSED[reason])
    arrays = operands(rng, dtype=options.pop("dtype", jnp.bfloat16), V=options.pop("V", H))
    if "dropout_key" in options:
        options["dropout_key"] = options["dropout_key"](0)
    with pytest.raises(NotImplementedError, match=f"cudnn: .*{reason}"):
        jattn.attend(*arrays, implementation="cudnn", **options)
    assert asked == []


def test_it_is_taken_by_name_alone(asked, rng):
    assert jattn.attend(*operands(rng)).shape == (B, T, N, H)
    assert asked == []


def test_elsewhere_it_says_which_platform_it_lacks(rng):
    with pytest.raises(NotImplementedError, match="cudnn: it runs on NVIDIA GPUs, not on cpu"):
        jattn.attend(*operands(rng), implementation="cudnn")


def test_of_several_kernels_the_first_that_can_runs(rng):
    arrays = operands(rng)
    came = jattn.attend(*arrays, implementation=("cudnn", "blockwise"))
    np.testing.assert_array_equal(came, jattn.attend(*arrays, implementation="blockwise"))


def test_a_gpu_without_cudnn_is_told(monkeypatch, rng):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # jax.nn itself finds none here
    with pytest.raises(RuntimeError, match="cuDNN"):
        jattn.attend(*operands(rng), implementation="cudnn")
