"""A causal language model: Llama 2 and 3, Mistral, Qwen2 and Qwen3 are values of its config.

Papers: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783; Jiang et al. 2023, https://arxiv.org/abs/2310.06825; Yang et al.
2024, https://arxiv.org/abs/2407.10671; Yang et al. 2025, https://arxiv.org/abs/2505.09388
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, masks
from jattn.functional.positions import rotary
from jattn.functional.ropes import Llama3, Rope
from jattn.models import generation
from jattn.models.decoding import Decoded
from jattn.models.tokens import embed
from jattn.nn._shared import Linear, joined_masks
from jattn.nn.cache import Cache, KeyValueCache, of_layers
from jattn.nn.embedding import Embedding
from jattn.nn.multi_head import MultiHeadAttention
from jattn.nn.norms import RMSNorm
from jattn.nn.transformer_layers import GatedFeedForward
from jattn.request import MaskLike

Array = jax.Array
Caches = tuple[Cache, ...]
INIT = initializers.normal(0.02)  # of every matrix, as the papers' authors have it


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `CausalLM` and its form.

    Attributes:
      vocabulary: C, number of token ids.
      features: D.
      num_layers: number of layers.
      num_heads: N.
      num_kv_heads: K; None: N.
      head_features: H; None: D / N.
      mlp_features: the width inside a layer's feed-forward network.
      rope: of the rotary positions, a value of `jattn.ropes`.
      window: W, how many tokens a token sees, itself included; None: all before it. Or a tuple with
        one of these for each layer.
      qkv_bias, out_bias, mlp_bias: whether the projections to query, key and value, that of the
        attention's output, and those of the feed-forward network have biases.
      normalize_qk: whether every head of query and key is normalised (RMSNorm) before its rotation.
      epsilon: of the norms.
      tied: whether the table of embeddings is also the kernel of the logits.
      max_length: of the sequences of training; longer ones are not refused.
      stop: ids each of which ends a generated text; one may be given as it is.
      pad: id that fills the places after that; None: the first of `stop`, or 0.

    Raises:
      ValueError: a size does not fit, or an id is not in the vocabulary.

    Example:
      >>> Config.preset("qwen3-0.6b").head_features
      128
    """

    vocabulary: int
    features: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_features: int | None = None
    mlp_features: int = 1536
    rope: Rope = Rope()  # noqa: RUF009
    window: int | tuple[int | None, ...] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    normalize_qk: bool = False
    epsilon: float = 1e-6
    tied: bool = False
    max_length: int = 2048
    stop: tuple[int, ...] = ()
    pad: int | None = None

    def __post_init__(self) -> None:
        sizes = "vocabulary", "features", "num_layers", "num_heads", "mlp_features", "max_length"
        checks.assert_positive(**{name: getattr(self, name) for name in sizes})
        flags = "qkv_bias", "out_bias", "mlp_bias", "normalize_qk", "tied"
        checks.assert_bool(**{name: getattr(self, name) for name in flags})
        if self.head_features is None:
            checks.assert_divisible(features=(self.features, "num_heads", self.num_heads))
        checks.assert_divisible(
            num_heads=(self.num_heads, "num_kv_heads", self.num_kv_heads or self.num_heads)
        )
        width = self.head_features or self.features // self.num_heads
        if width % 2:
            raise ValueError(f"the width of a head must be even, for pairs are turned, got {width}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon!r}")
        stop = (self.stop,) if isinstance(self.stop, int) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)  # a list could not be hashed
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        if not isinstance(self.rope, Rope):
            raise TypeError(f"rope must be a value of jattn.ropes, got {self.rope!r}")
        for window in self.windows:
            if window is not None:
                checks.assert_positive(window=window)
        for name, token in [("pad", self.pad), *(("stop", token) for token in self.stop)]:
            checks.assert_in_range(name, token or 0, 0, self.vocabulary - 1, "the last token id")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        if not isinstance(self.window, tuple):
            return (self.window,) * self.num_layers
        if len(self.window) != self.num_layers:
            must = f"window must have one entry for each layer, {self.num_layers}"
            raise ValueError(f"{must}, got {len(self.window)}")
        return self.window

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Config":
        """The config of a published model, with changes.

        Raises:
          ValueError: no preset has this name; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


class Block(nnx.Module):
    """A layer: attention and a gated network, each normalised before and added after.

        y = x + attention(norm₁(x)),   output = y + mlp(norm₂(y))

    Args:
      config: sizes and form.
      window: W of this layer, or None.
      attend, dtype, param_dtype, rngs: as `CausalLM` takes them.

    Example:
      >>> block = Block(Config(11, features=8, num_heads=2, mlp_features=16), rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 5, 8)))[0].shape
      (2, 5, 8)
    """

    def __init__(
        self,
        config: Config,
        window: int | None = None,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(RMSNorm, epsilon=config.epsilon)
        self.window = window
        self.attention = MultiHeadAttention(
            config.num_heads, config.features, num_kv_heads=config.num_kv_heads,
            head_features=config.head_features, use_bias=config.qkv_bias,
            use_out_bias=config.out_bias, normalize_qk=norm if config.normalize_qk else False,
            rotary=functools.partial(rotary, rope=config.rope), attend=attend, kernel_init=INIT,
            **options,
        )  # fmt: skip
        self.mlp = GatedFeedForward(
            config.features, config.mlp_features, use_bias=config.mlp_bias, kernel_init=INIT,
            **options,
        )  # fmt: skip
        self.norm1, self.norm2 = (norm(config.features, **options) for _ in range(2))

    def __call__(
        self,
        x: Array,
        *,
        mask: MaskLike = None,
        cache: Cache | None = None,
        **options: Any,
    ) -> tuple[Array, Cache | None]:
        """The layer's output for x `[..., T, D]`, and the new cache if there is one.

        `mask` is joined to the causal mask or the window; `options` are those of
        `MultiHeadAttention`.
        """
        own = masks.causal() if self.window is None else masks.sliding_window(self.window - 1)
        attended = self.attention(
            self.norm1(x), mask=joined_masks(own, mask), cache=cache, **options
        )
        attended, cache = (attended, None) if cache is None else attended
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class CausalLM(nnx.Module):
    """Predict every token from those before it.

        x₀ = E[tokens],   x_l = block_l(x_{l−1}),   logits = W norm(x_L)

    Args:
      config: sizes and form.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Attributes:
      embedding: E, `[C, D]`.
      layers: the blocks.
      norm: the last RMSNorm.
      out: the Linear to the logits; None where it is tied to E.

    Raises:
      ValueError, TypeError: a size does not fit.

    Example:
      >>> config = Config(11, features=8, num_layers=2, num_heads=2, mlp_features=16)
      >>> model = CausalLM(config, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[3, 1, 4], [1, 5, 9]])).shape
      (2, 3, 11)
      >>> model.generate(jnp.array([[3, 1, 4]]), max_new_tokens=5).tokens.shape
      (1, 5)
    """

    def __init__(
        self,
        config: Config,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, C, D = config, config.vocabulary, config.features
        self.embedding = Embedding(C, D, embedding_init=INIT, **options)
        self.layers = nnx.List(
            [Block(config, window, attend=attend, **options) for window in config.windows]
        )
        self.norm = RMSNorm(D, epsilon=config.epsilon, **options)
        self.out = nnx.data(None)
        if not config.tied:
            self.out = Linear(D, C, use_bias=False, kernel_init=INIT, **options)

    def empty_cache(
        self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None
    ) -> Caches:
        """A cache for each layer, for up to `capacity` tokens an example.

        A layer with a window keeps no more tokens than it sees.

        Args:
          batch: the number of examples, or several leading axes.
          capacity: the greatest number of tokens.
          dtype: of keys and values; None: that to compute in, or of the kernels.
        """
        return tuple(
            layer.attention.empty_cache(batch, capacity, window=layer.window, dtype=dtype)
            for layer in self.layers
        )

    def __call__(
        self,
        tokens: Array,
        *,
        mask: MaskLike = None,
        positions: Array | None = None,
        lengths: Array | None = None,
        cache: Caches | None = None,
        rope_length: int | Array | None = None,
    ) -> Any:
        """Logits of what follows each token.

        Args:
          tokens: ids `[..., T]`.
          mask: joined to the causal mask, such as `masks.segments(ids)` for packed documents.
          positions: `[T]` or `[..., T]`, integers; None: 0 … T − 1, or what follows the cache. With
            a cache without windows they may be others, as the depths of a tree of drafts.
          lengths: integers `[...]`, how many tokens of each example, the first ones, are real; a
            cache forgets the others. None: all.
          cache: earlier tokens, from `empty_cache` or an earlier call; the numbers are those of one
            call with all tokens.
          rope_length: the length by which a rope that depends on it chooses its frequencies, an
            integer or integers `[...]`; None: that of the call. With a cache it must be given, the
            same in every call, for the keys in the cache keep their rotation: the length that the
            text may reach.

        Returns:
          Logits `[..., T, C]`, or a tuple of them and the new cache if there is one. Those after
          the last real token mean nothing.

        Raises:
          ValueError: a shape does not fit, the cache has no room, an id is unknown (under jit,
            where values cannot be seen: NaN), or there is a cache and no `rope_length` for a rope
            that needs one.
          TypeError: tokens or lengths are not integers.
        """
        T = checks.assert_shapes(tokens=(tokens, "... T"))["T"]
        if lengths is not None:
            checks.assert_shapes(tokens=(tokens, "... T"), lengths=(lengths, "..."))
            checks.assert_integers(lengths=lengths)
            checks.assert_in_range("lengths", lengths, 0, T, "T, the number of tokens")
        caches = self._caches(cache, tokens)
        x = embed("tokens", tokens, self.embedding)
        options: dict[str, Any] = {"mask": mask}
        if cache is not None:
            options["lengths"] = lengths
        if positions is not None:
            options["positions"] = positions, positions
        if self.config.rope.depends_on_length:
            ends = lengths if positions is None else None
            options["rotary"] = self._rotary(rope_length, ends, cache)
        new: list[Any] = []
        for layer, of_layer in zip(self.layers, caches, strict=True):
            x, of_layer = layer(x, cache=of_layer, **options)
            new.append(of_layer)
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.out is None else self.out(x)
        return logits if cache is None else (logits, tuple(new))

    def step(
        self, tokens: Array, cache: Caches, rope_length: int | Array | None = None
    ) -> tuple[Caches, Array]:
        """One more token `[B]` for each example: the next cache, and logits `[B, C]`."""
        checks.assert_shapes(tokens=(tokens, "B"))
        logits, cache = self(jnp.asarray(tokens)[:, None], cache=cache, rope_length=rope_length)
        return cache, logits[:, 0]

    def generate(self, tokens: Array, **options: Any) -> Decoded:
        """Continue prompts; `models.generation.generate` documents the options."""
        return generation.generate(self, tokens, **options)

    def stream(self, tokens: Array, **options: Any) -> Iterator[np.ndarray]:
        """Continue prompts and yield tokens as they come; see `models.generation.stream`."""
        return generation.stream(self, tokens, **options)

    def _rotary(self, rope_length: Any, lengths: Any, cache: Any) -> Callable[..., Array]:
        if rope_length is None:
            if cache is not None:
                rope = type(self.config.rope).__name__
                raise ValueError(
                    f"the frequencies of {rope} depend on the length: with a cache, pass "
                    "rope_length, the length that the text may reach"
                )
            rope_length = lengths
        return functools.partial(rotary, rope=self.config.rope, length=rope_length)

    def _caches(self, cache: Any, tokens: Array) -> Sequence[Cache | None]:
        caches = of_layers(cache, len(self.layers))
        if cache is None:
            return caches
        *batch, T = np.shape(tokens)
        for each in cache:
            if each.length.shape != tuple(batch):
                must = f"cache is of {each.length.shape} examples"
                raise ValueError(f"{must}, got tokens of shape {np.shape(tokens)}")
            if isinstance(each, KeyValueCache):
                each.check_room(T)
        lengths = [checks.concrete(each.length) for each in cache]
        if any(each is not None and (each != lengths[0]).any() for each in lengths):
            raise ValueError(f"the caches of all layers must have one length, got {lengths}")
        # Of equal lengths XLA makes masks and rotations once, not for each layer
        return [each._replace(length=cache[0].length) for each in cache]


_LLAMA_3 = Config(
    128256, 4096, 32, 32, 8, mlp_features=14336, rope=Rope(500000.0), epsilon=1e-5,
    max_length=8192, stop=(128001,),
)  # fmt: skip
_QWEN2 = Config(
    152064, 3584, 28, 28, 4, mlp_features=18944, rope=Rope(1e6), qkv_bias=True, max_length=131072,
    stop=(151643,),
)  # fmt: skip
_QWEN3 = Config(
    151936, 4096, 36, 32, 8, 128, 12288, rope=Rope(1e6), normalize_qk=True, max_length=40960,
    stop=(151645,),
)  # fmt: skip
PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "llama-2-7b": Config(
            32000, 4096, 32, 32, mlp_features=11008, epsilon=1e-5, max_length=4096, stop=(2,)
        ),
        "llama-3-8b": _LLAMA_3,
        "llama-3.1-8b": dataclasses.replace(_LLAMA_3, rope=Llama3(5e5), max_length=131072),
        "llama-3.2-1b": dataclasses.replace(
            _LLAMA_3, features=2048, num_layers=16, mlp_features=8192,
            rope=Llama3(5e5, factor=32.0), tied=True, max_length=131072,
        ),
        "mistral-7b": Config(
            32000, 4096, 32, 32, 8, mlp_features=14336, window=4096, epsilon=1e-5,
            max_length=32768, stop=(2,),
        ),
        "qwen2-0.5b": dataclasses.replace(
            _QWEN2, vocabulary=151936, features=896, num_layers=24, num_heads=14, num_kv_heads=2,
            mlp_features=4864, tied=True,
        ),
        "qwen2-7b": _QWEN2,
        "qwen3-0.6b": dataclasses.replace(
            _QWEN3, features=1024, num_layers=28, num_heads=16, mlp_features=3072, tied=True
        ),
        "qwen3-8b": _QWEN3,
        "smollm2-135m": Config(
            49152, 576, 30, 9, 3, mlp_features=1536, rope=Rope(1e5), epsilon=1e-5, tied=True,
            max_length=8192, stop=(0,),
        ),
    }
)  # fmt: skip
"""The shapes of published models by name; their weights are loaded, not these."""
