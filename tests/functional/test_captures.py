"""Callables as pure functions: equal where they do the same, and never where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.functional.captures import Captures


def pure(function, *shapes):
    return Captures().hoist(lambda _, *x: function(*x), None, *(shapes or (jnp.ones(3),)))


def with_slope(slope):
    """The identity, by its own account of slope 1, 2 or 3: two such are printed alike."""

    @jax.custom_jvp
    def identity(x):
        return x

    identity.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    return identity


SAME = {
    "a lambda written anew": [lambda x: jnp.sin(x) * 2, lambda y: jnp.sin(y) * 2],
    "inside a jit": [jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 1)],
    "a loop": [lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x) for _ in range(2)],
    "what is captured comes as an operand": [
        lambda x, a=a: x * a for a in (jnp.arange(3.0), jnp.ones(3))
    ],
}
OTHER = {
    "digits that are not printed": [lambda x, c=c: x * c for c in (1.000000001, 1.000000002)],
    "a number of another type": [lambda x: x**2, lambda x: x**2.0],
    "another number": [lambda x: x * 2, lambda x: x * 3],
    "the sign of zero": [lambda x: jnp.maximum(x, 0.0), lambda x: jnp.maximum(x, -0.0)],
    "another order": [lambda x: jnp.sin(jnp.cos(x)), lambda x: jnp.cos(jnp.sin(x))],
    "another operand": [lambda x: x - jnp.sin(x), lambda x: jnp.sin(x) - x],
    "another rule for derivatives": [with_slope(2), with_slope(3)],
    "in a branch": [
        lambda x, k=k: jax.lax.cond(x.sum() > 0, lambda y: y * k, lambda y: y, x) for k in (2, 3)
    ],
    "another axis": [lambda x: x[None] * x[:, None], lambda x: x[:, None] * x[None]],
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_equal(name):
    first, second = map(pure, SAME[name])
    assert first == second and hash(first) == hash(second)


@pytest.mark.parametrize("name", OTHER)
def test_not_equal(name, x64):
    with np.printoptions(precision=2):
        first, second = map(pure, OTHER[name])
        assert first != second


def test_shapes_and_dtypes_count():
    function = lambda x: x * 2  # noqa: E731
    assert pure(function, jnp.ones(3)) != pure(function, jnp.ones(4))
    assert pure(function, jnp.ones(3)) != pure(function, jnp.ones(3, jnp.bfloat16))


def test_two_scores_that_differ_in_their_rule_alone_keep_their_own_gradients():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 1, 4)), jnp.float32)

    def gradient(rule):
        score = lambda q, k: rule(jattn.scores.dot_product(q, k))  # noqa: E731
        return jax.grad(lambda q: jnp.sin(jattn.attend(q, x, x, score=score)).sum())(x)

    np.testing.assert_allclose(gradient(with_slope(3)), 3 * gradient(with_slope(1)), rtol=1e-5)
