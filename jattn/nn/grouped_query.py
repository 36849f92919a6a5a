"""Multi-head attention of a trained model to grouped-query attention."""

import dataclasses
from typing import Any, TypeVar

from einops import rearrange
from flax import nnx

from jattn.functional import checks
from jattn.functional.heads import pool_heads
from jattn.nn.multi_head import MultiHeadAttention

Module = TypeVar("Module", bound=nnx.Module)


def to_grouped_query(module: Module, num_kv_heads: int) -> Module:
    """A copy of a module whose multi-head attentions are grouped-query attentions with K heads.

    Each key/value head is the mean of the heads that it replaces, which is where the paper's
    further training begins. Where the heads of a group are equal, the outputs are too.

    Args:
      module: a `MultiHeadAttention`, or a module that holds some, such as a `models.CausalLM`; its
        parameters may be traced. A config of it that says `num_kv_heads` will say K.
      num_kv_heads: K, which divides the number of key/value heads of each.

    Returns:
      A new module of the same class.

    Raises:
      ValueError: the module holds no `MultiHeadAttention`, or K does not divide its heads.

    Paper: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245

    Example:
      >>> import jax.numpy as jnp
      >>> attention = to_grouped_query(MultiHeadAttention(6, 12, rngs=nnx.Rngs(0)), 2)
      >>> attention.num_kv_heads, attention.key.kernel.shape, attention(jnp.ones((5, 12))).shape
      (2, (12, 4), (5, 12))
    """
    checks.assert_positive(num_kv_heads=num_kv_heads)
    module = nnx.clone(module)
    inner = [each for _, each in nnx.iter_modules(module)]
    attentions = [each for each in inner if isinstance(each, MultiHeadAttention)]
    if not attentions:
        raise ValueError(f"a {type(module).__name__} holds no MultiHeadAttention")
    for each in attentions:
        N = each.num_kv_heads
        checks.assert_divisible(**{"key/value heads": (N, "num_kv_heads", num_kv_heads)})
        for linear in (each.key, each.value):
            if type(linear) is not nnx.Linear:
                raise TypeError(f"key and value must be Linears, got {type(linear).__name__}")
    linears = [linear for each in attentions for linear in (each.key, each.value)]
    if len(set(map(id, linears))) < len(linears):
        raise ValueError("attentions, or key and value, share a Linear: pool its heads by hand")
    for each in attentions:
        for linear in (each.key, each.value):
            for parameter in (linear.kernel, linear.bias):
                if parameter is not None:
                    heads = rearrange(parameter[...], "... (N H) -> ... N H", N=each.num_kv_heads)
                    pooled = pool_heads(heads, num_kv_heads)
                    parameter.set_value(rearrange(pooled, "... K H -> ... (K H)"))
            linear.out_features = num_kv_heads * each.head_features
        each.num_kv_heads = num_kv_heads
    for holder in inner:
        config: Any = getattr(holder, "config", None)
        if dataclasses.is_dataclass(config) and hasattr(config, "num_kv_heads"):
            changed: Any = config
            vars(holder)["config"] = dataclasses.replace(changed, num_kv_heads=num_kv_heads)
    return module
