"""Classify a sequence by where a recurrent network ends, or by attention to all of its steps.

Papers: Dai and Le 2015, https://arxiv.org/abs/1511.01432; with attention,
Zhou et al. 2016, https://aclanthology.org/P16-2034
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks
from jattn.nn._shared import Linear, dropout, is_real, sequence
from jattn.nn.embedding import Embedding
from jattn.nn.recurrent import GRU, LSTM, RNN
from jattn.nn.sequence_pooling import LearnedQueryPooling

Array = jax.Array


class LastStep(nnx.Module):
    """The last real step of a sequence: `outputs[:, -1]` of widely copied PyTorch code.

    In a network of both directions, the backward half of this step has read the last token alone. A
    `Classifier` whose `Config` has no pooling takes the final state of each direction instead. With
    one direction the two are the same.

    Args:
      features: D.
      dtype: of the result; None: that of the input.
      param_dtype, rngs: as for other poolings; this one has no parameters.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 3, 2)
      >>> LastStep(2, rngs=nnx.Rngs(0))(x, lengths=jnp.array([2]), return_weights=True)
      (Array([[2., 3.]], dtype=float32), Array([[0., 1., 0.]], dtype=float32))
    """

    def __init__(
        self,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        checks.assert_positive(features=features)
        self.features, self.dtype = features, dtype

    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: Literal[False] = False
    ) -> Array: ...
    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: Literal[True]
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: bool
    ) -> Array | tuple[Array, Array]: ...
    def __call__(
        self, x: Array, *, lengths: Array | None = None, return_weights: bool = False
    ) -> Array | tuple[Array, Array]:
        """Take the last step of x `[..., S, D]`.

        Args:
          x: `[..., S, D]`, floating point.
          lengths: integers `[...]` from 1 to S; None: the last step is the one at S, padding or
            not.
          return_weights: also return the weights: 1 for that step, 0 for the others.

        Returns:
          `[..., D]`, or a tuple of it and the weights `[..., S]`. Zeros for traced lengths outside
          1 … S.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 1 … S.
          TypeError: x is not floating point, or lengths are not integers.
        """
        x = sequence(x, self.features)
        x = x if self.dtype is None else x.astype(self.dtype)
        S = x.shape[-2]
        lengths = jnp.full_like(x[..., 0, 0], S, jnp.int32) if lengths is None else lengths
        checks.assert_shapes(x=(x, "... S D"), lengths=(lengths, "..."))
        checks.assert_integers(lengths=lengths)
        checks.assert_in_range("lengths", lengths, 1, S, "S, the number of steps")
        last = is_real(lengths, S) & ~is_real(jnp.asarray(lengths) - 1, S)
        context = jnp.sum(x, axis=-2, where=last[..., None])
        return (context, last.astype(context.dtype)) if return_weights else context


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `Classifier` and the parts that it is composed of.

    Attributes:
      vocabulary: number of token ids.
      classes: C.
      embedding_features: width of the embedding.
      hidden_features: F, width of every recurrent layer in each direction.
      num_layers: L, recurrent layers.
      bidirectional: whether each layer also runs from the end.
      dropout_rate: of the embedded tokens, of the outputs of every recurrent layer but the top one,
        and of the vector that is classified.
      network: the recurrent network: `jattn.nn.RNN`, `jattn.nn.LSTM` or `jattn.nn.GRU`.
      pooling: makes one vector of the top layer's steps: `jattn.nn.FeaturePooling`,
        `jattn.nn.LearnedQueryPooling`, `LastStep`, or any `(features, *, dtype, param_dtype,
        rngs)` → module that is called as they are. None: the final state of each direction, after
        its last real step; with both directions the two side by side.
      padding_idx: an id whose embedding begins as zeros and learns nothing; None: there is none.

    Raises:
      ValueError: a size is not positive, the rate lies outside 0 … 1, or `padding_idx` is no id.

    Example:
      >>> Config.attention(100, 5).pooling.__name__
      'LearnedQueryPooling'
    """

    vocabulary: int
    classes: int
    embedding_features: int = 64
    hidden_features: int = 128
    num_layers: int = 1
    bidirectional: bool = False
    dropout_rate: float = 0.0
    network: type[RNN] | type[LSTM] | type[GRU] = LSTM
    pooling: Callable[..., Any] | None = None
    padding_idx: int | None = 0

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "classes", "embedding_features", "hidden_features", "num_layers")
        checks.assert_positive(**{name: getattr(self, name) for name in sizes})
        checks.assert_probability(dropout_rate=self.dropout_rate)
        if self.padding_idx is not None:
            checks.assert_integers(padding_idx=self.padding_idx)
            checks.assert_in_range(
                "padding_idx",
                self.padding_idx,
                0,
                self.vocabulary - 1,
                "the last id of the vocabulary",
            )

    @classmethod
    def plain(cls, vocabulary: int, classes: int) -> "Config":
        """The textbook's first: one layer of a plain recurrent network, and its last state."""
        return cls(vocabulary, classes, 32, 32, network=RNN)

    @classmethod
    def attention(cls, vocabulary: int, classes: int) -> "Config":
        """Two layers of long short-term memory in both directions, pooled by a learned query."""
        return cls(
            vocabulary,
            classes,
            num_layers=2,
            bidirectional=True,
            dropout_rate=0.2,
            pooling=LearnedQueryPooling,
        )


class Classifier(nnx.Module):
    """Embedding, recurrent network, one vector of all its steps, and a Linear.

        h_1 … h_T = network(embedding(tokens)),   logits = W pooling(h_1 … h_T) + b

    Args:
      config: sizes and parts.
      attend: for the pooling: `jattn.attend`, or a `functools.partial` of it that sets a kernel,
        mask or modifier. The pooling must take it. None: the pooling's own.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Raises:
      ValueError: `attend` is given, and the config has no pooling that takes it.

    Attributes:
      embedding: a `jattn.nn.Embedding`; one with `max_norm` or other options may take its place.
      network, pooling: as `config` has them.
      out: W and b, a Linear `[F, C]`, or with both directions `[2F, C]`.

    Example:
      >>> model = Classifier(Config.attention(11, 3), rngs=nnx.Rngs(0))
      >>> tokens, lengths = jnp.array([[3, 4, 5], [6, 7, 0]]), jnp.array([3, 2])
      >>> logits, weights = model(tokens, lengths=lengths, return_weights=True, deterministic=True)
      >>> logits.shape, weights.shape
      ((2, 3), (2, 3))
    """

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, F = config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if attend is not None:
            if config.pooling is None:
                raise ValueError(
                    "attend needs a pooling in the config; without one nothing attends"
                )
            if not _takes_attend(config.pooling):
                raise ValueError(f"attend needs a pooling that takes it, got {config.pooling}")
        self.config = config
        self.embedding = Embedding(config.vocabulary, D, padding_idx=config.padding_idx, **options)
        self.network = config.network(
            D, F,
            num_layers=config.num_layers, bidirectional=config.bidirectional,
            dropout_rate=config.dropout_rate,
            **options,
        )  # fmt: skip
        width = (1 + config.bidirectional) * F
        own = {} if attend is None else {"attend": attend}
        self.pooling = nnx.data(config.pooling and config.pooling(width, **own, **options))
        self.out = Linear(width, config.classes, **options)
        self.dropout = dropout(config.dropout_rate, rngs)

    @overload
    def __call__(
        self, tokens: Array, *, lengths: Array | None = None,
        return_weights: Literal[False] = False, deterministic: bool | None = None,
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, tokens: Array, *, lengths: Array | None = None,
        return_weights: Literal[True], deterministic: bool | None = None,
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, tokens: Array, *, lengths: Array | None = None,
        return_weights: bool, deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]: ...  # fmt: skip
    def __call__(
        self,
        tokens: Array,
        *,
        lengths: Array | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Classify.

        Args:
          tokens: ids `[..., T]`, T ≥ 1.
          lengths: integers `[...]` from 1 to T, the number of real tokens of each sequence; the
            others change nothing. None: all are real, padding included.
          return_weights: also return the weights of the pooling.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          Logits `[..., C]`, or a tuple of them and the weights: `[..., T]`, or of a
          `FeaturePooling` `[..., T, F]` (with both directions 2F).

        Raises:
          ValueError: a shape does not fit, an id is unknown, a length lies outside 1 … T (under
            jit: NaN), or `return_weights` is true without a pooling.
          TypeError: ids or lengths are not integers.
        """
        if return_weights and self.pooling is None:
            raise ValueError(
                "return_weights needs a config with a pooling; without one there are no weights"
            )
        T = checks.assert_shapes(tokens=(tokens, "... T"))["T"]
        embedded = self.dropout(self.embedding(tokens), deterministic=deterministic)
        outputs, state = self.network(embedded, lengths=lengths, deterministic=deterministic)
        found: Any = self._final(state)
        if self.pooling is not None:
            found = self.pooling(outputs, lengths=lengths, return_weights=return_weights)
        context = found[0] if return_weights else found
        checks.assert_shapes(
            tokens=(tokens, "... T"), out=(self.out.kernel, "F C"), context=(context, "... F")
        )
        logits = self.out(self.dropout(context, deterministic=deterministic))
        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)[..., None]
            logits = jnp.where((lengths > 0) & (lengths <= T), logits, jnp.nan)
        return (logits, found[1]) if return_weights else logits

    def _final(self, state: Any) -> Array:
        """The top layer's last state h in each direction, side by side."""
        h = state[0] if isinstance(state, tuple) else state
        return rearrange(
            h[..., -1 - self.config.bidirectional :, :], "... directions f -> ... (directions f)"
        )


def _takes_attend(pooling: Callable[..., Any]) -> bool:
    if isinstance(pooling, functools.partial):
        return _takes_attend(pooling.func)
    # Flax hides the arguments of its classes
    function = vars(pooling).get("__init__", pooling) if isinstance(pooling, type) else pooling
    parameters = inspect.signature(function).parameters
    return "attend" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
