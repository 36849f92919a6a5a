"""The contenders in JAX: each turns a case into a function and its arguments.

A contender that cannot do the work raises `LeftOut`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from experiments.benchmarks.cases import CAP, Case, allowed, documents, lengths
from experiments.benchmarks.timing import Run


class LeftOut(Exception):
    """A contender cannot do the work; the message says why."""


class Work(NamedTuple):
    """A function `(query, key, value, *others, extras)`; the extras have no gradients."""

    function: Callable[..., jax.Array]
    # Masks and biases are arguments, not constants, since every batch brings its own
    extras: dict[str, Any]


def operands(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays to differentiate (query, key, value, …) and the output's cotangent, in float32."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [
        (case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)
    ]
    if case.kind == "additive":
        shapes.append((case.H,))
    query, key, value, cotangent, *others = (
        rng.standard_normal(shape, np.float32) for shape in shapes
    )
    return [query, key, value, *others], cotangent


def kernel(case: Case, name: str) -> Work:
    """`jattn.attend` with one of its kernels."""
    causal, mask, modifier = jattn.masks.causal(), None, None
    match case.kind:
        case "causal":
            mask = causal
        case "window":
            mask = jattn.masks.sliding_window(case.window)
        case "soft cap":
            mask, modifier = causal, jattn.modifiers.soft_cap(CAP)
        case "ALiBi":
            mask, modifier = (
                causal,
                jattn.modifiers.alibi(jnp.asarray(jattn.modifiers.alibi_slopes(case.N))),
            )
        case "documents":
            mask = causal & jattn.masks.segments(
                jnp.broadcast_to(documents(case), (case.B, case.T))
            )
        case "padding":
            mask = jattn.masks.padding(jnp.asarray(lengths(case)))
        case "additive":
            return Work(functools.partial(_additive, implementation=name), {})
    return Work(
        functools.partial(jattn.attend, implementation=name), {"mask": mask, "modifier": modifier}
    )


def _additive(query: Any, key: Any, value: Any, weight: Any, *, implementation: Any) -> Any:
    score = functools.partial(jattn.scores.additive, weight=weight)
    return jattn.attend(query, key, value, score=score, implementation=implementation)


def dense(case: Case) -> Work:
    """The kernel `dense`, which holds all scores."""
    _check_room(case)
    return kernel(case, "dense")


def jax_nn(case: Case) -> Work:
    """`jax.nn.dot_product_attention`."""
    _check_room(case)
    if case.kind == "soft cap":
        raise LeftOut("it has no soft cap")
    return _signature_of_jax(case, jax.nn.dot_product_attention)


def tokamax(case: Case) -> Work:
    """`tokamax.dot_product_attention`, in its implementation for every machine in linear memory."""
    try:
        attend = importlib.import_module("tokamax").dot_product_attention
    except ImportError:
        raise LeftOut("it is not installed") from None
    static = {"logits_soft_cap": CAP} if case.kind == "soft cap" else {}
    return _signature_of_jax(
        case, functools.partial(attend, implementation="xla_chunked", **static)
    )


def _signature_of_jax(case: Case, attend: Callable[..., jax.Array]) -> Work:
    static: dict[str, Any] = {
        "is_causal": case.kind in ("causal", "soft cap", "ALiBi", "documents")
    }
    extras: dict[str, Any] = {}
    match case.kind:
        case "window":
            static["local_window_size"] = (case.window, 0)
        case "ALiBi":
            extras["bias"] = alibi_bias(case)[None]
        case "documents":
            extras["mask"] = allowed(case)
        case "padding":
            extras["key_value_seq_lengths"] = lengths(case)
    return Work(functools.partial(attend, **static), extras)


def alibi_bias(case: Case) -> np.ndarray:
    """ALiBi as an array `[N, T, T]`, for contenders that accept no function."""
    positions = np.arange(case.T, dtype=np.float32)
    return -jattn.modifiers.alibi_slopes(case.N)[:, None, None] * np.abs(
        positions[:, None] - positions
    )


def _check_room(case: Case) -> None:
    if case.too_large:
        raise LeftOut("it would hold too many scores")


IN_JAX: dict[str, Callable[[Case], Work]] = {
    "blockwise": functools.partial(kernel, name="blockwise"),
    "float32": lambda case: kernel(case, "blockwise"),
    "dense": dense,
    "jax.nn": jax_nn,
    "tokamax": tokamax,
}


def run_in_jax(name: str, case: Case) -> Run:
    """A function that runs the case to its end, or that compiles it anew."""
    if name == "float32":
        case = dataclasses.replace(case, dtype="float32")
    work = IN_JAX[name](case)
    inputs, cotangent = operands(case)
    arrays = [jnp.asarray(array, case.dtype) for array in inputs]
    arguments = jax.tree.map(jnp.asarray, (arrays, jnp.asarray(cotangent, case.dtype), work.extras))
    if case.what == "compile":
        return lambda: compiled(work, arguments, backward=True)
    run = compiled(work, arguments, case.backward)
    return lambda: jax.block_until_ready(run(*arguments))


def compiled(work: Work, arguments: Any, backward: bool) -> Callable[..., Any]:
    """Compile a function that returns the output and, with `backward`, all gradients."""

    def whole(arrays: Any, cotangent: Any, extras: Any) -> Any:
        if not backward:
            return work.function(*arrays, **extras)
        output, pull_back = jax.vjp(lambda *arrays: work.function(*arrays, **extras), *arrays)
        return output, pull_back(cotangent)

    return jax.jit(whole).lower(*arguments).compile()
