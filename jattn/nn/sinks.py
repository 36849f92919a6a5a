"""Attention with a learned sink for each head."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend_with_sink
from jattn.functional import checks
from jattn.nn._shared import Attend

Array = jax.Array


class AttentionSink(nnx.Module):
    """`jattn.attend_with_sink` with its sinks as parameters: the `attend=` of another module.

    Args:
      num_heads: N, the number of query heads.
      attend: `jattn.attend_with_sink`, or a `functools.partial` of it that sets a kernel, mask or
        modifier.
      param_dtype: dtype of the sinks.
      sink_init: their first values; 0 is softmax-off-by-one.
      rngs: for initialisation.

    Attributes:
      sink: `[N]`.

    Raises:
      ValueError: num_heads is not positive.

    Paper: OpenAI 2025, https://arxiv.org/abs/2508.10925

    Example:
      >>> from jattn import nn
      >>> rngs = nnx.Rngs(0)
      >>> attention = nn.MultiHeadAttention(2, 6, attend=AttentionSink(2, rngs=rngs), rngs=rngs)
      >>> attention(jnp.ones((5, 6))).shape, attention.attend.sink.shape
      ((5, 6), (2,))
    """

    def __init__(
        self,
        num_heads: int,
        *,
        attend: Callable[..., Any] = attend_with_sink,
        param_dtype: Any = jnp.float32,
        sink_init: Callable[..., Any] = initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(num_heads=num_heads)
        self.sink = nnx.Param(sink_init(rngs.params(), (num_heads,), param_dtype))
        self.attend = Attend(attend)

    @property
    def given(self) -> Mapping[str, Any]:
        """What the inner `attend` gives by itself."""
        return self.attend.given

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        """Attend; arguments and results are those of `jattn.attend_with_sink`."""
        return self.attend(query, key, value, sink=self.sink[...], **options)
