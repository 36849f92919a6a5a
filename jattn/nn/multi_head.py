"""Multi-head, grouped-query and multi-query attention as one module."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, masks, modifiers
from jattn.functional.heads import merge_heads, split_heads
from jattn.nn._shared import (
    Linear,
    Options,
    apply,
    attending,
    dropout,
    dropped_weights,
    held,
    joined_masks,
    joined_modifiers,
    normalized,
    sequence,
)
from jattn.nn.cache import Cache, KeyValueCache, WindowCache
from jattn.request import MaskLike, ModifierLike, Precision

Array = jax.Array
Initializer = Callable[..., Any]
Metadata = Mapping[str, Any]
_NONE: Metadata = MappingProxyType({})


class MultiHeadAttention(nnx.Module):
    """Several attentions side by side, each in its own learned subspace.

        head_n = softmax(Q_n K_nᵀ / √H) V_n,   output = Concat(head_1 … head_N) W_o

    With `num_kv_heads` = K < N, groups of N / K query heads share one key/value head (grouped-query
    attention); with K = 1 all share one (multi-query attention). Keys and values are never repeated
    in memory. With `out_features` = H every head is as wide as the output (wide heads).

    Names and defaults are those of `flax.nnx.MultiHeadAttention`. Kernels are `[in, N · H]`, the
    heads side by side.

    Args:
      num_heads: N.
      in_features: width of the query input.
      qkv_features: N · H, the width of the heads together; default `in_features`.
      out_features: width of the output, default `in_features`.
      num_kv_heads: K, default N.
      in_kv_features: width of the key input and the value input, default `in_features`.
      in_value_features: width of the value input where it is not that of the key.
      head_features: H, in the place of `qkv_features`.
      use_bias: whether the projections of query, key and value have biases.
      use_out_bias: whether the output projection has a bias; None: as `use_bias`.
      normalize_qk: normalise every head of query and key: True by a LayerNorm without bias, or a
        class such as `nnx.RMSNorm`.
      rotary: `(x [..., T, N, H], positions) -> x`, applied to the heads of query and key, such as
        `jattn.positions.rotary` or a `functools.partial` of it; None: none.
      dropout_rate: for the weights.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, a score, a mask or
        a modifier; or a module that is called as `jattn.attend`, such as `nn.AttentionSink`.
      dtype: to compute in; None: the one to which inputs and parameters promote.
      param_dtype: dtype of the parameters.
      precision: of all products, as `jax.lax.Precision`.
      kernel_init, bias_init: of all projections.
      out_kernel_init, out_bias_init: of the output projection, where they differ.
      kernel_metadata, bias_metadata, out_kernel_metadata, out_bias_metadata: of the parameters,
        such as `{"out_sharding": (None, "model")}`.
      rngs: for initialisation and dropout.

    Attributes:
      query, key, value, out: the projections, each a Linear.
      query_ln, key_ln: the norms, or None.

    Raises:
      ValueError: the width of the heads is not a multiple of N, or N of K; both `qkv_features` and
        `head_features` are given; in a call, shapes that do not fit.

    Papers: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762;
    Shazeer 2019, https://arxiv.org/abs/1911.02150;
    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245;
    normalised heads: Dehghani et al. 2023, https://arxiv.org/abs/2302.05442

    Example:
      >>> attention = MultiHeadAttention(6, 12, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> attention(jnp.ones((2, 5, 12))).shape
      (2, 5, 12)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        in_value_features: int | None = None,
        head_features: int | None = None,
        use_bias: bool = True,
        use_out_bias: bool | None = None,
        normalize_qk: bool | Callable[..., Any] = False,
        rotary: Callable[..., Array] | None = None,
        dropout_rate: float = 0.0,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
        out_kernel_init: Initializer | None = None,
        out_bias_init: Initializer | None = None,
        kernel_metadata: Metadata = _NONE,
        bias_metadata: Metadata = _NONE,
        out_kernel_metadata: Metadata = _NONE,
        out_bias_metadata: Metadata = _NONE,
        rngs: nnx.Rngs,
    ):
        use_out_bias = use_bias if use_out_bias is None else use_out_bias
        checks.assert_bool(use_bias=use_bias, use_out_bias=use_out_bias)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.in_value_features = (
            self.in_kv_features if in_value_features is None else in_value_features
        )
        self.out_features = in_features if out_features is None else out_features
        self.head_features = self._width_of_a_head(qkv_features, head_features)
        self.attend, self.dtype, self.precision = attending(attend), dtype, precision
        self.rotary = None if rotary is None else held("rotary", rotary)
        linear = functools.partial(
            Linear, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )
        of_heads = functools.partial(
            linear, use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata,
        )  # fmt: skip
        width, kv_width = (
            heads * self.head_features for heads in (self.num_heads, self.num_kv_heads)
        )
        self.query = of_heads(self.in_features, width)
        self.key = of_heads(self.in_kv_features, kv_width)
        self.value = of_heads(self.in_value_features, kv_width)
        self.out = linear(
            width, self.out_features, use_bias=use_out_bias,
            kernel_init=out_kernel_init or kernel_init, bias_init=out_bias_init or bias_init,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )  # fmt: skip
        norm = _norm(normalize_qk)
        if norm is not None:
            norm = functools.partial(
                norm, self.head_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
        self.query_ln = nnx.data(norm and norm())
        self.key_ln = nnx.data(norm and norm())
        self.dropout = dropout(dropout_rate, rngs)

    def _width_of_a_head(self, qkv_features: int | None, head_features: int | None) -> int:
        checks.assert_positive(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            in_features=self.in_features,
            in_kv_features=self.in_kv_features,
            in_value_features=self.in_value_features,
            out_features=self.out_features,
        )
        checks.assert_divisible(num_heads=(self.num_heads, "num_kv_heads", self.num_kv_heads))
        if head_features is not None:
            if qkv_features is not None:
                both = f"qkv_features = {qkv_features} and head_features = {head_features}"
                raise ValueError(f"give one of them: {both}")
            checks.assert_positive(head_features=head_features)
            return head_features
        name = "in_features" if qkv_features is None else "qkv_features"
        features = self.in_features if qkv_features is None else qkv_features
        checks.assert_positive(**{name: features})
        checks.assert_divisible(**{name: (features, "num_heads", self.num_heads)})
        return features // self.num_heads

    @overload
    def __call__(
        self, query: Array, key: Array | None = None, value: Array | None = None, *,
        return_weights: Literal[False] = False, cache: None = None, qkv_sharding: Any = None,
        out_sharding: Any = None, **options: Unpack[Options],
    ) -> Array: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array | None = None, value: Array | None = None, *,
        return_weights: Literal[True], cache: None = None, qkv_sharding: Any = None,
        out_sharding: Any = None, **options: Unpack[Options],
    ) -> tuple[Array, Array]: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array | None = None, value: Array | None = None, *,
        return_weights: Literal[False] = False, cache: Cache, qkv_sharding: Any = None,
        out_sharding: Any = None, **options: Unpack[Options],
    ) -> tuple[Array, Cache]: ...  # fmt: skip
    @overload
    def __call__(
        self, query: Array, key: Array | None = None, value: Array | None = None, *,
        return_weights: bool, cache: Cache | None = None, qkv_sharding: Any = None,
        out_sharding: Any = None, **options: Unpack[Options],
    ) -> Any: ...  # fmt: skip
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        cache: Cache | None = None,
        lengths: Array | None = None,
        rotary: Callable[..., Array] | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
        qkv_sharding: Any = None,
        out_sharding: Any = None,
    ) -> Any:
        """Attend from query to key and value.

        Args:
          query: `[..., T, in_features]`.
          key: `[..., S, in_kv_features]`; None: the query (self-attention).
          value: `[..., S, in_value_features]`; None: the key.
          mask, modifier, positions: as `jattn.attend` takes them. With a cache, positions are those
            of the new tokens, twice, and only where they are not the next ones.
          cache: the keys and values of earlier tokens, from `empty_cache` or an earlier call. Those
            of this call are appended, and the query attends to all of them; pass the same mask as
            without a cache (`masks.causal()`, not an array), for it sees true positions.
          lengths: with a cache, integers `[...]`, how many of the T are tokens; None: all.
          rotary: in the place of the module's own, in this call.
          return_weights: also return the weights `[..., N, T, S]`, before dropout.
          deterministic: switches dropout off; None: as `module.train()`, `module.eval()` or
            `nnx.view` has set it.
          qkv_sharding, out_sharding: on a mesh with explicit axes, of the projected
            `[..., T, N · H]` and of the output.

        Returns:
          `[..., T, out_features]`; or a tuple of it, of the weights if asked for, and of the new
          cache if one is given.

        Raises:
          ValueError: a shape does not fit, a value comes without a key, the cache has no room (NaN
            under jit, where its length is not known), or a mask reads slots of a `WindowCache`.
          TypeError: an argument is not floating point, or is given by `attend=` too.
        """
        if key is None and value is not None:
            raise ValueError(
                "value without key: pass the key too, or leave out both for self-attention"
            )
        query = sequence(query, self.in_features, "query")
        key = query if key is None else key
        rotary = self.rotary if rotary is None else rotary
        given = positions and positions[0]
        if cache is not None:
            newest = _newest(cache, query, key, positions, rotary)
            if isinstance(cache, WindowCache):
                _check_reads_positions(mask, modifier, getattr(self.attend, "given", {}))
            positions = newest, newest
        key, value = self.project(
            key, value, positions=positions and positions[1], rotary=rotary, sharding=qkv_sharding
        )
        if cache is not None:
            cache, seen = cache.extended(key, value, lengths=lengths, positions=given)
            key, value, mask = seen.key, seen.value, joined_masks(mask, seen.mask)
            positions = newest, seen.positions
        elif lengths is not None:
            raise ValueError("lengths go with a cache: without one, pass masks.padding(lengths)")
        result = self.attend_projected(
            query, key, value, mask=mask, modifier=modifier, positions=positions, rotary=rotary,
            return_weights=return_weights, deterministic=deterministic,
            qkv_sharding=qkv_sharding, out_sharding=out_sharding,
        )  # fmt: skip
        if cache is None:
            return result
        # A mask may hide the slots that `append` made NaN: what overflows is NaN all the same
        overflown = cache.overflown

        def poisoned(array: Array) -> Array:
            return jnp.where(
                overflown[(..., *(None,) * (array.ndim - overflown.ndim))], jnp.nan, array
            )

        result = jax.tree.map(poisoned, result)
        return (*result, cache) if return_weights else (result, cache)

    def project(
        self,
        key: Array,
        value: Array | None = None,
        *,
        positions: Array | None = None,
        rotary: Callable[..., Array] | None = None,
        sharding: Any = None,
    ) -> tuple[Array, Array]:
        """The heads of key and value, for `attend_projected` to attend to again and again.

        Args:
          key: `[..., S, in_kv_features]`.
          value: `[..., S, in_value_features]`; None: the key.
          positions: of the keys, for `rotary`.
          rotary: in the place of the module's own.
          sharding: on a mesh with explicit axes, of the projected `[..., S, K · H]`.

        Returns:
          `[..., S, K, H]`, twice.
        """
        value = key if value is None else value
        key = sequence(key, self.in_kv_features, "key")
        value = sequence(value, self.in_value_features, "value")
        key, value = apply(self.key, key, sharding), apply(self.value, value, sharding)
        heads = self._heads(key, self.num_kv_heads, self.key_ln, positions, rotary)
        return heads, split_heads(value, self.num_kv_heads)

    def attend_projected(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: MaskLike = None,
        modifier: ModifierLike = None,
        positions: tuple[Array, Array] | None = None,
        rotary: Callable[..., Array] | None = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
        qkv_sharding: Any = None,
        out_sharding: Any = None,
    ) -> Any:
        """Attend from a query `[..., T, in_features]` to heads of key and value from `project`.

        Everything else is as in a call.
        """
        query = apply(self.query, sequence(query, self.in_features, "query"), qkv_sharding)
        q_positions = positions and positions[0]
        result = self.attend(
            self._heads(query, self.num_heads, self.query_ln, q_positions, rotary),
            key,
            value,
            mask=mask, modifier=modifier, positions=positions, return_weights=return_weights,
            precision=self.precision, **dropped_weights(self.dropout, deterministic),
        )  # fmt: skip
        if not return_weights:
            return apply(self.out, merge_heads(result), out_sharding)
        output, weights = result
        return apply(self.out, merge_heads(output), out_sharding), weights

    def empty_cache(
        self,
        batch: int | tuple[int, ...],
        capacity: int,
        *,
        window: int | None = None,
        dtype: Any = None,
    ) -> Cache:
        """A cache of this module's keys and values for up to `capacity` tokens an example.

        Args:
          batch: the number of examples, or several leading axes.
          capacity: S.
          window: W, where the mask of every call is `sliding_window(W − 1)`: then no more than W
            tokens are kept. None: all are kept.
          dtype: of keys and values; None: that to compute in, or of the kernels.
        """
        dtype = dtype or self.dtype or jax.tree.leaves(nnx.state(self.key, nnx.Param))[0].dtype
        kind: type[Any] = KeyValueCache
        if window is not None:
            checks.assert_positive(window=window)
            if not isinstance(capacity, int) or window < capacity:  # a symbol of `jax.export`
                kind, capacity = WindowCache, window
        return kind.empty(batch, capacity, self.num_kv_heads, self.head_features, dtype=dtype)

    def _heads(
        self, projected: Array, num_heads: int, norm: Any, positions: Any, rotary: Any
    ) -> Array:
        heads = split_heads(projected, num_heads)
        heads = heads if norm is None else normalized(norm, heads)
        rotary = self.rotary if rotary is None else rotary
        return heads if rotary is None else rotary(heads, positions)


def _newest(cache: Any, query: Array, key: Array, positions: Any, rotary: Any) -> Array:
    """The positions of the tokens of this call, after a check of what goes with a cache."""
    if not isinstance(cache, Cache):
        expected = "a KeyValueCache or a WindowCache"
        raise TypeError(f"cache must be {expected}, got {type(cache).__name__}")
    checks.assert_shapes(query=(query, "... T D"), key=(key, "... T E"))
    *batch, T, _ = query.shape
    if cache.length.shape != tuple(batch):
        must = f"the cache is of {cache.length.shape} examples"
        raise ValueError(f"{must}, got a query of shape {query.shape}")
    bound = getattr(getattr(rotary, "function", rotary), "keywords", {})
    if getattr(bound.get("rope"), "depends_on_length", False) and bound.get("length") is None:
        raise ValueError(
            f"the frequencies of {bound['rope']} depend on the length, and a cache keeps keys as "
            "they are turned: bind length= to the length that the text may reach"
        )
    if positions is None:
        return cache.next_positions(T)
    own, others = positions
    if own is not others:
        raise ValueError(
            "with a cache, positions are those of the new tokens, twice: (positions, positions)"
        )
    checks.assert_index(positions=own)
    if np.shape(own) not in {(T,), (*batch, T)}:
        must = f"positions must be [T] or [..., T] for a query of shape {query.shape}"
        raise ValueError(f"{must}, got {np.shape(own)}")
    return jnp.asarray(own)


def _check_reads_positions(
    mask: MaskLike, modifier: ModifierLike, given: Mapping[str, Any]
) -> None:
    """A `WindowCache` moves tokens between slots, so that what reads slots means nothing there."""
    parts = [each for each in (mask, given.get("mask")) if each is not None]
    parts += joined_modifiers(given.get("modifier"), modifier)
    known = masks.Mask, modifiers.Modifier
    slots = [
        each
        for each in parts
        if hasattr(each, "dtype") or (isinstance(each, known) and each.reads_slots())
    ]
    if slots:
        raise ValueError(
            f"{slots[0]!r} reads slots, and a WindowCache moves tokens between them: use a mask of "
            "positions, or a cache without a window"
        )


def _norm(normalize_qk: bool | Callable[..., Any]) -> Callable[..., Any] | None:
    if isinstance(normalize_qk, bool):
        layer_norm = functools.partial(nnx.LayerNorm, use_bias=False, use_fast_variance=False)
        return layer_norm if normalize_qk else None
    if not callable(normalize_qk):
        raise TypeError(
            f"normalize_qk must be True, False or the class of a norm, got {normalize_qk!r}"
        )
    return normalize_qk
