"""The contract on derivatives: of every kind and order, in every kernel, in linear memory.

Oracles: central differences of the gradient, for the specification; the specification, for every
other kernel. One named pairing at a time, never the full product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, modifiers, scores
from tests import oracle
from tests.cases import (
    BIAS,
    LENGTHS,
    PER_QUERY,
    SLOPES,
    TABLE,
    B,
    H,
    S,
    T,
    V,
    loose,
    operands,
    some,
)

pytestmark = pytest.mark.usefixtures("no_rank_promotion", "x64")

DROPOUT = {"dropout_rate": 0.3, "dropout_key": jax.random.key(1)}
# What goes together in one request: parameter -> options of attend; heads; which weights are shared
PAIRINGS = {
    "nothing": lambda p: {},
    "causal and ALiBi": lambda p: {"mask": masks.causal(), "modifier": modifiers.alibi(p * SLOPES)},
    "padding and a bias": lambda p: {
        "mask": masks.padding(LENGTHS),
        "modifier": modifiers.bias(p[None, :, None, None] * BIAS),
    },
    "empty rows": lambda p: {"mask": masks.padding(PER_QUERY)},
    "an example that sees nothing, and a modifier": lambda p: {
        "mask": masks.padding(np.array([0, 5])),
        "modifier": loose(lambda x, b, h, i, j: x * p[h]),
    },
    "window and a table under a cap": lambda p: {
        "mask": masks.sliding_window(2, 1),
        "modifier": (modifiers.relative_bias(p[:, None] * TABLE), modifiers.soft_cap(2.0)),
    },
    "singular at forbidden entries": lambda p: {
        "mask": masks.causal(),
        "modifier": loose(lambda x, b, h, i, j: x - p[h] * jnp.log(1.0 + (i - j))),
    },
    "dropout": lambda p: DROPOUT,
    "dropout, a mask and a modifier": lambda p: {
        **DROPOUT,
        "mask": masks.causal(1),
        "modifier": loose(lambda x, b, h, i, j: x * p[h]),
    },
    "additive score": lambda p: {"score": functools.partial(scores.additive, weight=p[:H])},
    "gaussian score a head, and no self": lambda p: {
        "score": functools.partial(scores.gaussian, weight=jnp.stack([p] * H, 1)),
        "mask": masks.no_self(),
    },
    "a score that captures": lambda p: {
        "score": lambda q, k: jnp.einsum("...th,...sh,h->...ts", q, k, p[:H]),
    },
    "positions": lambda p: {
        "mask": masks.causal(),
        "positions": (np.arange(T)[::-1].copy(), np.arange(S)),
        "modifier": modifiers.alibi(p * SLOPES),
    },
}


FEW = [
    "causal and ALiBi",
    "padding and a bias",
    "an example that sees nothing, and a modifier",
    "dropout, a mask and a modifier",
    "gaussian score a head, and no self",
    "a score that captures",
]


def loss_of(name, kernel):
    """A scalar function of query, key, value and a parameter, through output and log-sum-exp."""

    def loss(query, key, value, parameter):
        options = PAIRINGS[name](parameter)
        output, lse = jattn.attend(
            query, key, value, implementation=kernel, return_lse=True, **options
        )
        return jnp.sin(output).sum() + jnp.sin(jnp.where(jnp.isneginf(lse), 0, lse)).sum()

    return loss


def arguments(rng, N=6, K=2, **sizes):
    return *map(jnp.asarray, operands(rng, N, K, **sizes)), jnp.asarray(rng.uniform(0.5, 1.5, N))


def forward_over_reverse(loss, point, direction):
    return jax.jvp(jax.grad(loss, (0, 1, 2, 3)), point, direction)[1]


def reverse_over_forward(loss, point, direction):
    return jax.grad(lambda *x: jax.jvp(loss, x, direction)[1], (0, 1, 2, 3))(*point)


def reverse_over_reverse(loss, point, direction):
    def slope(*x):
        gradients = jax.grad(loss, (0, 1, 2, 3))(*x)
        return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))

    return jax.grad(slope, (0, 1, 2, 3))(*point)


def assert_close(came, expected, rtol=1e-10, atol=1e-12):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), came, expected
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def two_derivatives(name, kernel, point, direction):
    loss = loss_of(name, kernel)
    return jax.jvp(loss, point, direction), forward_over_reverse(loss, point, direction)


@pytest.mark.parametrize("name", some(PAIRINGS, FEW))
def test_first_and_second_derivatives_are_those_of_the_specification(kernel, name, rng):
    if kernel == "dense":
        pytest.skip("the specification is held to differences of its gradient")
    point, direction = arguments(rng), arguments(rng)
    came, expected = (two_derivatives(name, which, point, direction) for which in (kernel, "dense"))
    assert_close(came, expected)


@pytest.mark.parametrize("way", [reverse_over_forward, reverse_over_reverse])
@pytest.mark.parametrize(
    "name", some(["empty rows", "dropout, a mask and a modifier"], ["empty rows"])
)
def test_every_way_to_a_second_derivative_gives_the_same(kernel, name, way, rng):
    point, direction = arguments(rng), arguments(rng)
    came = jax.jit(functools.partial(way, loss_of(name, kernel)))(point, direction)
    assert_close(came, two_derivatives(name, kernel, point, direction)[1])


@pytest.mark.parametrize("name", some(PAIRINGS, ["causal and ALiBi"]))
def test_derivatives_are_the_slopes_of_gradients(kernel, name, rng):
    """Along one direction, by central differences of the gradient and of the loss."""
    point, direction = arguments(rng), arguments(rng)
    loss = loss_of(name, kernel)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))

    def along(function):
        def slope(step):
            ends = [
                function(*(x + s * step * d for x, d in zip(point, direction, strict=True)))
                for s in (1, -1)
            ]
            return jax.tree.map(lambda a, b: (a - b) / (2 * step), *ends)

        half, whole = slope(5e-4), slope(1e-3)
        return jax.tree.map(lambda a, b: (4 * a - b) / 3, half, whole)

    hessian_vector = jax.jit(functools.partial(forward_over_reverse, loss))(point, direction)
    assert_close(hessian_vector, along(gradient), rtol=1e-8, atol=1e-9)
    slope = jax.jit(functools.partial(jax.jvp, loss))(point, direction)[1]
    assert_close(slope, along(jax.jit(loss)), rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_third_derivative(kernel, rng):
    point, direction = arguments(rng, N=2, K=1), arguments(rng, N=2, K=1)

    def third(kernel):
        def second(*x):
            loss = loss_of("nothing", kernel)
            return jax.jvp(lambda *y: jax.jvp(loss, y, direction)[1], x, direction)[1]

        return jax.jit(jax.grad(second, (0, 1, 2)))(*point)

    assert_close(third(kernel), third("dense"), rtol=1e-9, atol=1e-11)


def test_jacobians_linearize_and_its_transpose(kernel, rng):
    query, key, value, _ = arguments(rng, N=2, K=1, B=1, V=3)

    def attend(query):
        return jattn.attend(query, key, value, mask=masks.causal(1), implementation=kernel)

    forward, reverse = jax.jit(jax.jacfwd(attend))(query), jax.jit(jax.jacrev(attend))(query)
    assert_close(forward, reverse)
    output, push = jax.linearize(attend, query)
    pull = jax.linear_transpose(push, query)
    tangent, cotangent = jnp.cos(query), jnp.sin(output)
    assert_close(push(tangent), jnp.tensordot(forward, tangent, 4))
    assert_close(pull(cotangent)[0], jnp.tensordot(cotangent, reverse, 4))


TRANSFORMED = {
    "eager": lambda f: f,
    "vmap": lambda f: lambda *x: jax.vmap(f)(*jax.tree.map(lambda a: a[None], x)),
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, y: (c, f(*y)), 0, x_of_one(x))[1],
    "remat": lambda f: jax.checkpoint(f),
    "cond": lambda f: lambda *x: jax.lax.cond(x[0][0].sum() < 1e9, f, f, *x),
}


def x_of_one(arguments):
    return jax.tree.map(lambda array: array[None], arguments)


@pytest.mark.parametrize("transformed", some(TRANSFORMED, ["remat"]))
def test_hessian_vector_products_under(kernel, transformed, rng):
    point, direction = arguments(rng), arguments(rng)
    loss = loss_of("dropout, a mask and a modifier", kernel)
    product = functools.partial(forward_over_reverse, loss)
    came = TRANSFORMED[transformed](product)(point, direction)
    expected = jax.jit(product)(point, direction)
    assert_close(jax.tree.map(lambda a, b: a.reshape(b.shape), came, expected), expected)


@pytest.mark.parametrize("mapped", some(range(4), [1]), ids=["query", "key", "value", "parameter"])
def test_hessian_vector_products_under_vmap_over_one_operand(kernel, mapped, rng):
    point, direction = arguments(rng), arguments(rng)
    loss = loss_of("causal and ALiBi", kernel)
    stacked = jnp.stack([point[mapped], point[mapped] + 1, point[mapped] - 1])

    def product(moved, direction):
        return forward_over_reverse(loss, (*point[:mapped], moved, *point[mapped + 1 :]), direction)

    came = jax.jit(jax.vmap(product, (0, None)))(stacked, direction)
    one = jax.jit(product)
    for index in range(3):
        expected = one(stacked[index], direction)
        assert_close(jax.tree.map(lambda array, i=index: array[i], came), expected)


def test_a_score_with_a_rule_of_its_own_keeps_it(kernel, rng):
    """`custom_jvp` in a score holds in every direction, `custom_vjp` in reverse."""

    @jax.custom_jvp
    def twice(x):
        return x

    twice.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

    @jax.custom_vjp
    def thrice(x):
        return x

    thrice.defvjp(lambda x: (x, None), lambda _, cotangent: (3 * cotangent,))
    query, key, value, _ = arguments(rng)

    def gradient(rule):
        def loss(query):
            score = lambda q, k: rule(scores.scaled_dot_product(q, k))  # noqa: E731
            return jnp.sin(
                jattn.attend(query, key, value, score=score, implementation=kernel)
            ).sum()

        return jax.jit(jax.grad(loss))(query)

    plain = gradient(lambda x: x)
    assert_close(gradient(twice), 2 * plain)
    assert_close(gradient(thrice), 3 * plain)


# Memory


LONG = jax.ShapeDtypeStruct((1, 8192, 1, 16), jnp.float32)
QUADRATIC = 4 * 8192**2  # bytes of the scores


def laplacian(attend, query, key, value):
    """Of the sum of the outputs with respect to the query, along one direction of each row."""

    def slope(query):
        return jax.jvp(lambda q: attend(q, key, value).sum(), (query,), (jnp.ones_like(query),))[1]

    return jax.jvp(slope, (query,), (jnp.ones_like(query),))[1]


KINDS = {
    "forward": lambda f, *x: f(*x),
    "gradient": lambda f, *x: jax.grad(lambda *y: f(*y).sum(), (0, 1, 2))(*x),
    "jvp": lambda f, *x: jax.jvp(f, x, x)[1],
    "forward over reverse": lambda f, *x: jax.jvp(
        jax.grad(lambda *y: jnp.sin(f(*y)).sum(), (0, 1, 2)), x, x
    )[1],
    "reverse over reverse": lambda f, *x: jax.grad(
        lambda *y: sum((g**2).sum() for g in jax.grad(lambda *z: f(*z).sum(), (0, 1, 2))(*y)),
        (0, 1, 2),
    )(*x),
    "Laplacian": laplacian,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_derivative_needs_an_array_of_t_by_s(kind):
    """What the compiled program asks for, at T = S = 8192: a tenth of one array of scores."""
    attend = functools.partial(jattn.attend, mask=masks.causal(), implementation="blockwise")
    with jax.enable_x64(False):
        function = jax.jit(functools.partial(KINDS[kind], attend))
        memory = function.lower(LONG, LONG, LONG).compile().memory_analysis()
    assert memory.temp_size_in_bytes < QUADRATIC / 10


def test_the_specification_would_fail_this():
    with jax.enable_x64(False):
        function = jax.jit(functools.partial(jattn.attend, implementation="dense"))
        memory = function.lower(LONG, LONG, LONG).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= QUADRATIC


def test_a_modifier_of_one_entry_is_differentiated_like_the_loop(kernel, rng):
    """The gradient of what a modifier captures, against differences of the loop."""
    query, key, value, parameter = arguments(rng, N=2, K=1)
    cotangent = rng.standard_normal((B, T, 2, V))

    def total(parameter):
        modifier = loose(lambda x, b, h, i, j: jnp.tanh(x * parameter[h]))
        output = jattn.attend(query, key, value, modifier=modifier, implementation=kernel)
        return (output * cotangent).sum()

    def truth(parameter):
        output, *_ = oracle.attend(
            query, key, value, score=oracle.scaled_dot_product,
            modify=lambda x, b, h, t, s: np.tanh(x * parameter[h]),
        )  # fmt: skip
        return (output * cotangent).sum()

    slopes = oracle.numerical_gradient(truth, parameter)
    assert_close(jax.jit(jax.grad(total))(parameter), slopes, rtol=1e-9, atol=1e-10)
