import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.nn import Embedding

C, D = 11, 3
TOKENS = np.array([[3, 7, 3, 0, 10], [3, 0, 1, 2, 7]])


def build(**options):
    return Embedding(C, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def gradient(embedding, cotangent, tokens=TOKENS):
    """Of the table."""
    pull = nnx.grad(lambda embedding: jnp.sum(embedding(tokens) * cotangent))
    return np.asarray(pull(embedding)["embedding"])


def test_rows_are_looked_up(x64):
    embedding = build()
    np.testing.assert_array_equal(embedding(TOKENS), np.asarray(embedding.embedding)[TOKENS])
    np.testing.assert_array_equal(embedding(7), np.asarray(embedding.embedding)[7])


def test_rows_begin_standard_normal():
    table = np.asarray(Embedding(997, 101, rngs=nnx.Rngs(0)).embedding)
    assert abs(table.mean()) < 5 / np.sqrt(table.size)
    assert abs(table.var() - 1) < 5 * np.sqrt(2 / table.size)


@pytest.mark.parametrize("padding", [3, 3 - C])
def test_the_padding_is_zero_and_stays_so(x64, rng, padding):
    plain, embedding, cotangent = (
        build(),
        build(padding_idx=padding),
        rng.normal(size=(*TOKENS.shape, D)),
    )
    assert (
        not np.asarray(embedding.embedding)[3].any()
        and not np.asarray(embedding(TOKENS))[TOKENS == 3].any()
    )
    expected = np.where(np.arange(C)[:, None] == 3, 0, gradient(plain, cotangent))
    np.testing.assert_array_equal(gradient(embedding, cotangent), expected)


def test_padding_that_was_set_is_looked_up_and_gets_no_gradient(x64):
    embedding = build(padding_idx=3)
    embedding.embedding[...] = jnp.ones((C, D))
    np.testing.assert_array_equal(embedding(TOKENS), np.ones((*TOKENS.shape, D)))
    assert not gradient(embedding, 1.0)[3].any()


def test_gradients_are_divided_by_how_often_an_id_stands_there(x64, rng):
    cotangent = rng.normal(size=(*TOKENS.shape, D))
    counts = np.maximum(np.bincount(TOKENS.ravel(), minlength=C), 1)[:, None]
    expected = gradient(build(), cotangent) / counts
    found = gradient(build(scale_grad_by_freq=True), cotangent)
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(float).eps, atol=1e-16)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, np.inf])
def test_long_rows_are_rescaled_and_the_gradient_is_the_rescaled_row_s(x64, rng, norm_type):
    embedding, cotangent = (
        build(max_norm=1.0, norm_type=norm_type),
        rng.normal(size=(*TOKENS.shape, D)),
    )
    table = np.array(embedding.embedding)
    table[2] /= 100  # short enough
    embedding.embedding[...] = jnp.asarray(table)
    norms = np.array([np.linalg.norm(row, norm_type) for row in table])[:, None]
    expected = np.where(norms > 1, table / (norms + 1e-7), table)
    np.testing.assert_allclose(embedding(TOKENS), expected[TOKENS], rtol=1e-15)
    np.testing.assert_array_equal(embedding(2), table[2])
    np.testing.assert_array_equal(gradient(embedding, cotangent), gradient(build(), cotangent))
    seen = np.isin(np.arange(C), TOKENS)[:, None]
    np.testing.assert_allclose(
        embedding.renormalized(TOKENS), np.where(seen, expected, table), rtol=1e-15
    )


@pytest.mark.torch
def test_training_follows_pytorch_s_rewritten_table(x64):
    import torch

    embedding, rate = build(max_norm=1.0, padding_idx=0), 0.5
    reference = torch.nn.Embedding(C, D, padding_idx=0, max_norm=1.0, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(np.array(embedding.embedding)))
    for _ in range(3):
        pull = torch.autograd.grad(
            (reference(torch.from_numpy(TOKENS)) ** 3).sum(), reference.weight
        )[0]
        with torch.no_grad():
            reference.weight -= rate * pull
        own = nnx.grad(lambda embedding: jnp.sum(embedding(TOKENS) ** 3))(embedding)["embedding"]
        embedding.embedding[...] = embedding.renormalized(TOKENS) - rate * own[...]
    np.testing.assert_allclose(
        embedding.embedding, reference.weight.detach().numpy(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}], ids=str
)
def test_an_id_that_jit_cannot_see_gives_no_number(x64, options):
    embedding, tokens = build(**options), jnp.array([-1, 0, C - 1, C])
    rows = jax.jit(embedding)(tokens)
    assert np.isnan(rows).all(axis=1).tolist() == [True, False, False, True]
    np.testing.assert_array_equal(jax.jit(jax.vmap(embedding))(tokens)[1:3], rows[1:3])
    if "max_norm" in options:
        assert np.isfinite(jax.jit(embedding.renormalized)(tokens)).all()


@pytest.mark.parametrize(
    ("error", "message", "tokens"),
    [
        (
            ValueError,
            r"tokens must lie in 0 … 10 \(the last id of the vocabulary\), got 11",
            np.array([1, 11]),
        ),
        (ValueError, "tokens must lie in 0 … 10", [-1]),
        (TypeError, "tokens must be integers", np.ones(3)),
        (TypeError, "tokens must be integers", np.array([True])),
    ],
)
def test_bad_ids_are_named(x64, error, message, tokens):
    for lookup in (build(), build(max_norm=1.0).renormalized):
        with pytest.raises(error, match=message):
            lookup(tokens)


@pytest.mark.parametrize(
    ("error", "name", "options"),
    [
        (ValueError, "num_embeddings", {"num_embeddings": 0}),
        (ValueError, "features", {"features": -3}),
        (ValueError, "padding_idx must lie in -11 … 10", {"padding_idx": 11}),
        (ValueError, "padding_idx must lie in -11 … 10", {"padding_idx": -12}),
        (TypeError, "padding_idx must be integers", {"padding_idx": 1.0}),
        (ValueError, "max_norm must be positive, got 0.0", {"max_norm": 0.0}),
        (ValueError, "norm_type must be positive, got nan", {"norm_type": float("nan")}),
    ],
)
def test_bad_options_are_named(error, name, options):
    with pytest.raises(error, match=name):
        Embedding(**{"num_embeddings": C, "features": D, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_a_row_that_holds_infinity_keeps_it(options):
    embedding = Embedding(3, 2, rngs=nnx.Rngs(0), **options)
    embedding.embedding[1] = jnp.array([jnp.inf, 1.0])
    np.testing.assert_array_equal(embedding(jnp.array([1])), [[np.inf, 1.0]])
    gradient = nnx.grad(lambda embedding: embedding(jnp.array([2, 1, 2])).sum())(embedding)
    counts = [0.0, 1.0, 1.0 if "scale_grad_by_freq" in options else 2.0]
    np.testing.assert_array_equal(gradient["embedding"][...], np.stack([counts, counts], axis=1))


def test_a_table_and_ids_that_one_axis_of_a_mesh_shards():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    embedding = Embedding(3, 4, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 1], [2, 1]])
    expected = np.asarray(embedding(ids))
    with jax.set_mesh(mesh):
        table = jax.device_put(embedding.embedding[...], NamedSharding(mesh, P(None, "x")))
        embedding.embedding.set_value(table)
        found = jax.jit(lambda ids: embedding(ids))(
            jax.device_put(ids, NamedSharding(mesh, P("x")))
        )
    np.testing.assert_array_equal(found, expected)
