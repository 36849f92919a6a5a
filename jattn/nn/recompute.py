"""Layers that compute again in the backward pass what they would have kept from the forward one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)
Policy = Callable[..., bool]
_ORIGINAL = "_computed_once"  # the class of a layer before it was changed

KEEP_ATTENTION: Policy = jax.checkpoint_policies.save_only_these_names(
    "attend_output", "attend_lse"
)
"""Keep what `jattn.attend` gives, of size T: all that the backward pass of `blockwise` needs of it.

The kernel `dense` computes its scores again."""


def remat(
    module: Module, *layers: type[nnx.Module], policy: Policy | None = KEEP_ATTENTION
) -> Module:
    """A copy of a module that keeps only the inputs of its layers for the backward pass.

    Outputs and gradients are the same, and so are the paths of the parameters. The memory of
    training falls from all that the layers compute to their inputs, what the policy keeps, and the
    inside of one layer; the time grows by about one forward pass. On GPUs and TPUs XLA orders
    operations for memory. On CPUs it may compute again too early: with jaxlib 0.10 always, unless
    `XLA_FLAGS` in the environment say `--xla_cpu_enable_concurrency_optimized_scheduler=false`, and
    for some models, such as BERT, even so.

    Args:
      module: such as a `models.CausalLM`.
      *layers: the classes of the layers, such as `models.causal_lm.Block`, each called with arrays
        and options.
      policy: of `jax.checkpoint`: what else is kept; None: nothing.

    Returns:
      A new module, whose layers are of subclasses of their classes.

    Raises:
      ValueError: the module holds no such layer; or, in a call, a layer adds to its own state.

    Paper: Chen et al. 2016, https://arxiv.org/abs/1604.06174

    Example:
      >>> import jax.numpy as jnp
      >>> from jattn.models import causal_lm
      >>> config = causal_lm.Config(11, features=8, num_layers=2, num_heads=2, mlp_features=16)
      >>> model = remat(causal_lm.CausalLM(config, rngs=nnx.Rngs(0)), causal_lm.Block)
      >>> model(jnp.array([[3, 1, 4]])).shape
      (1, 3, 11)
    """
    module = nnx.clone(module)
    found = [each for _, each in nnx.iter_modules(module) if isinstance(each, layers)]
    if not found:
        names = " or ".join(layer.__name__ for layer in layers)
        raise ValueError(f"a {type(module).__name__} holds no {names or 'layer: name a class'}")
    for each in found:
        each.__class__ = _recomputed(getattr(each, _ORIGINAL, type(each)), policy)
    return module


@functools.cache
def _recomputed(kind: type[nnx.Module], policy: Policy | None) -> Any:
    """The class whose call is one that `jax.checkpoint` knows of."""

    def __call__(self: Any, *arrays: Any, **options: Any) -> Any:
        graph, state = nnx.split(self)
        before, structure = jax.tree.flatten(state)
        changed: list[int] = []

        # Masks, modifiers and flags are no arrays: options reach the call around `jax.checkpoint`
        def call(leaves: list[Any], arrays: Any) -> tuple[Any, list[Any]]:
            layer = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
            output = kind.__call__(layer, *arrays, **options)
            after = jax.tree.leaves(nnx.state(layer))
            if len(after) != len(before):
                raise ValueError(
                    f"a {kind.__name__} whose call adds state to it, as sow does, cannot be"
                    " computed again"
                )
            changed[:] = [i for i, leaf in enumerate(after) if leaf is not leaves[i]]
            return output, [after[i] for i in changed]

        output, new = jax.checkpoint(call, policy=policy)(before, arrays)
        if changed:  # the counts of random streams
            for i, leaf in zip(changed, new, strict=True):
                before[i] = leaf
            nnx.update(self, jax.tree.unflatten(structure, before))
        return output

    names: dict[str, Any] = {_ORIGINAL: kind}
    names |= {"__call__": __call__, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)
