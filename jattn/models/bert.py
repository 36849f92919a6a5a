"""BERT: an encoder that reads both ways, its pre-training, and classifiers on top of it.

Paper: Devlin et al. 2019, https://arxiv.org/abs/1810.04805
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers

from jattn.attention import attend
from jattn.functional import checks, masks
from jattn.models.encoder_decoder import nan_where_lengths_are_wrong
from jattn.models.tokens import embed
from jattn.nn._shared import Linear, dropout, joined_masks, normalized, promoted, times
from jattn.nn.embedding import Embedding
from jattn.nn.multi_head import MultiHeadAttention
from jattn.nn.positions import LearnedPositions, RelativePositions
from jattn.nn.transformer_layers import Activation, FeedForward, activation_of, layer_norm
from jattn.request import MaskLike

Array = jax.Array
INIT = initializers.normal(0.02)  # of every matrix, as the paper's authors have it
linear = functools.partial(Linear, kernel_init=INIT)
POSITIONS = "absolute", "relative_key", "relative_key_query"


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a BERT and its form.

    Attributes:
      vocabulary: C, number of token ids.
      features: D.
      num_layers: number of layers.
      num_heads: N.
      mlp_features: the width inside a layer's feed-forward network.
      max_length: of a sequence.
      num_types: of tokens: those of a first text, and those of a second.
      positions: "absolute" adds a learned row for each position to the embeddings; "relative_key"
        and "relative_key_query" are those of `jattn.nn.RelativePositions`, in every layer.
      activation: "relu", "gelu" (by the error function), or a function.
      epsilon: of the norms.
      dropout_rate: of the embeddings, and after attention and network of every layer.
      attention_dropout_rate: of the attention weights.
      classifier_dropout_rate: before the Linear of a classifier; None: `dropout_rate`.
      tied: whether the table of embeddings is also the kernel of the words' logits.
      pad: id whose embedding begins as zeros and learns nothing from its lookups; None: none.
      classes: of a classifier.
      labels: their names; None: they have none.

    Raises:
      ValueError: a size, a rate, an id or a name does not fit.

    Example:
      >>> Config.preset("bert-base-uncased").features
      768
    """

    vocabulary: int
    features: int = 256
    num_layers: int = 4
    num_heads: int = 4
    mlp_features: int = 1024
    max_length: int = 512
    num_types: int = 2
    positions: str = "absolute"
    activation: Activation = "gelu"
    epsilon: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    classifier_dropout_rate: float | None = None
    tied: bool = True
    pad: int | None = 0
    classes: int = 2
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        widths = "features", "mlp_features", "num_heads", "num_layers"
        counts = "vocabulary", "max_length", "num_types", "classes"
        checks.assert_positive(**{name: getattr(self, name) for name in (*widths, *counts)})
        checks.assert_divisible(features=(self.features, "num_heads", self.num_heads))
        checks.assert_probability(
            dropout_rate=self.dropout_rate, attention_dropout_rate=self.attention_dropout_rate,
            classifier_dropout_rate=self.classifier_dropout_rate or 0.0,
        )  # fmt: skip
        checks.assert_bool(tied=self.tied)
        activation_of(self.activation)
        if self.labels is not None and len(self.labels) != self.classes:
            raise ValueError(f"labels must name {self.classes} classes, got {self.labels}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        if self.pad is not None and self.pad not in range(self.vocabulary):
            raise ValueError(f"pad must be an id below {self.vocabulary}, got {self.pad!r}")

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
    """A layer: attention and a network of two Linears, each added and normalised.

        y = norm₁(x + attention(x)),   output = norm₂(y + mlp(y))

    Args:
      config: sizes and form.
      attend, dtype, param_dtype, rngs: as `Bert` takes them.

    Example:
      >>> block = Block(Config(11, 8, 1, 2, 16), rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 5, 8)), deterministic=True).shape
      (2, 5, 8)
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
        D, N = config.features, config.num_heads
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if config.positions != "absolute":
            attend = RelativePositions(
                config.max_length, D // N, with_key=config.positions == "relative_key_query",
                attend=attend, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip
        self.attention = MultiHeadAttention(
            N, D, dropout_rate=config.attention_dropout_rate, attend=attend, kernel_init=INIT,
            **options,
        )  # fmt: skip
        self.mlp = FeedForward(
            D, config.mlp_features, activation=config.activation, kernel_init=INIT, **options
        )
        self.norm1, self.norm2 = (layer_norm(D, config.epsilon, options) for _ in range(2))
        self.dropout = dropout(config.dropout_rate, rngs)

    def __call__(
        self,
        x: Array,
        *,
        mask: MaskLike = None,
        positions: tuple[Array, Array] | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """The layer's output for x `[..., T, D]`; mask and positions are those of `attend`."""
        options: dict[str, Any] = {"deterministic": deterministic}
        attended = self.attention(x, mask=mask, positions=positions, **options)
        x = normalized(self.norm1, x + self.dropout(attended, **options))
        return normalized(self.norm2, x + self.dropout(self.mlp(x), **options))


class Bert(nnx.Module):
    """A vector for every token, which has seen all others; and one for the whole sequence.

        x₀ = dropout(norm(W[tokens] + T[types] + P[positions])),   x_l = block_l(x_{l−1})
        pooled = tanh(W_p x_L[0] + b_p)

    Args:
      config: sizes and form.
      pooler: whether there are W_p and b_p.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Attributes:
      embedding, types: the tables W and T, each a `jattn.nn.Embedding`.
      positions: P, a `LearnedPositions`; None where positions are relative.
      norm: of the embeddings.
      layers: the blocks.
      pooler: the Linear, or None.

    Example:
      >>> model = Bert(Config(11, 8, 2, 2, 16), rngs=nnx.Rngs(0))
      >>> tokens, lengths = jnp.array([[2, 5, 3, 7, 3], [2, 6, 3, 0, 0]]), jnp.array([5, 3])
      >>> hidden = model(tokens, lengths=lengths, deterministic=True)
      >>> hidden.shape, model.pool(hidden).shape
      ((2, 5, 8), (2, 8))
    """

    def __init__(
        self,
        config: Config,
        *,
        pooler: bool = True,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_bool(pooler=pooler)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config, C, D = config, config.vocabulary, config.features
        self.embedding = Embedding(C, D, padding_idx=config.pad, embedding_init=INIT, **options)
        self.types = Embedding(config.num_types, D, embedding_init=INIT, **options)
        self.positions = nnx.data(None)
        if config.positions == "absolute":
            self.positions = LearnedPositions(config.max_length, D, **options)
        self.norm = layer_norm(D, config.epsilon, options)
        self.layers = nnx.List(
            [Block(config, attend=attend, **options) for _ in range(config.num_layers)]
        )
        self.pooler = nnx.data(linear(D, D, **options) if pooler else None)
        self.dropout = dropout(config.dropout_rate, rngs)

    def __call__(
        self,
        tokens: Array,
        *,
        types: Array | None = None,
        lengths: Array | None = None,
        mask: MaskLike = None,
        positions: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Encode.

        Args:
          tokens: ids `[..., T]`.
          types: of the tokens `[..., T]`, integers; None: all are of type 0.
          lengths: integers `[...]` from 0 to T, how many tokens of each sequence, the first ones,
            are real; the others are not seen. None: all.
          mask: as `jattn.attend` takes it; joined to the padding of `lengths`.
          positions: `[T]` or `[..., T]`, integers; None: 0 … T − 1. (Where the padding comes first,
            pass its mask, and positions that begin at the first real token.)
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          `[..., T, D]`. Those of padding mean nothing.

        Raises:
          ValueError: a shape does not fit, the sequence is longer than `max_length`, or an id, a
            type, a position or a length lies outside its range (under jit, where values cannot be
            seen: NaN).
          TypeError: ids, types, positions or lengths are not integers.
        """
        T = checks.assert_shapes(tokens=(tokens, "... T"))["T"]
        if lengths is not None:
            checks.assert_shapes(tokens=(tokens, "... T"), lengths=(lengths, "..."))
            checks.assert_integers(lengths=lengths)
            checks.assert_in_range("lengths", lengths, 0, T, "T, the number of tokens")
            mask = joined_masks(masks.padding(lengths), mask)
        x = embed("tokens", tokens, self.embedding)
        if types is None:
            types = jnp.zeros_like(jnp.asarray(tokens))
        checks.assert_shapes(tokens=(tokens, "... T"), types=(types, "... T"))
        types = checks.validated_tokens("types", types, self.config.num_types, "the last type")
        x = x + self.types(types)
        x = x if self.positions is None else self.positions(x, positions=positions)
        x = self.dropout(normalized(self.norm, x), deterministic=deterministic)
        of_both = None if positions is None else (positions, positions)
        for layer in self.layers:
            x = layer(x, mask=mask, positions=of_both, deterministic=deterministic)
        return nan_where_lengths_are_wrong(x, lengths, 0)

    def pool(self, hidden: Array) -> Array:
        """The vector `[..., D]` of each sequence, from the outputs `[..., T, D]` of a call.

        Raises:
          ValueError: there is no pooler, or a shape does not fit.
        """
        if self.pooler is None:
            raise ValueError("this Bert has no pooler: pooler=True makes one")
        checks.assert_shapes(hidden=(hidden, "... T D"), pooler=(self.pooler.kernel, "D D"))
        if hidden.shape[-2] == 0:
            raise ValueError(f"hidden has no token, got shape {hidden.shape}")
        return jnp.tanh(self.pooler(hidden[..., 0, :]))


class WordHead(nnx.Module):
    """Logits of the word at each place.

        logits = W norm(activation(A x + a)) + b,   W the table of embeddings, or one of its own

    Args:
      config: sizes and form.
      dtype, param_dtype, rngs: as `Bert` takes them.

    Attributes:
      transform: A and a, a Linear.
      norm: a LayerNorm.
      bias: b, `[C]`.
      out: a Linear without bias; None where it is tied to the embeddings.

    Example:
      >>> config = Config(11, 8, 2, 2, 16)
      >>> rngs = nnx.Rngs(0)
      >>> WordHead(config, rngs=rngs)(jnp.ones((5, 8)), jnp.ones((11, 8))).shape
      (5, 11)
    """

    def __init__(
        self, config: Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype, C, D = dtype, config.vocabulary, config.features
        self.transform = linear(D, D, **options)
        self.activation = activation_of(config.activation)
        self.norm = layer_norm(D, config.epsilon, options)
        self.bias = nnx.Param(jnp.zeros((C,), param_dtype))
        self.out = nnx.data(None if config.tied else linear(D, C, use_bias=False, **options))

    def __call__(self, x: Array, table: Array) -> Array:
        """Logits `[..., C]` of x `[..., D]`, with the table `[C, D]` that they may be tied to."""
        x = normalized(self.norm, self.activation(self.transform(x)))
        x, table, bias = promoted(self.dtype, x, table, self.bias[...])
        logits = times(x, table.T) if self.out is None else self.out(x)
        # A product with ones, for on a CPU XLA is slow to sum over the rows of so many words
        return logits + times(jnp.ones_like(x[..., :1]), bias[None], jax.lax.Precision.HIGHEST)


class BertForMaskedLM(nnx.Module):
    """Predict the words that a mask hides.

        word logits = words(bert(tokens))

    Args:
      config: sizes and form.
      attend, dtype, param_dtype, rngs: as `Bert` takes them.

    Attributes:
      bert: a `Bert` without a pooler.
      words: a `WordHead`.

    Example:
      >>> model = BertForMaskedLM(Config(11, 8, 2, 2, 16), rngs=nnx.Rngs(0))
      >>> model(jnp.array([[2, 5, 4, 3]]), deterministic=True).shape
      (1, 4, 11)
    """

    pooler = False

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
        self.config = config
        self.bert = Bert(config, pooler=self.pooler, attend=attend, **options)
        self.words = WordHead(config, **options)

    def __call__(self, tokens: Array, *, places: Array | None = None, **options: Any) -> Any:
        """Word logits.

        Args:
          tokens: ids `[..., T]`.
          places: integers `[..., M]`: at which tokens to predict words, such as those that
            `pretraining.places_of` finds; None: at all.
          **options: `types`, `lengths`, `mask`, `positions` and `deterministic`, as `Bert` takes
            them.

        Returns:
          Logits `[..., T, C]`, or `[..., M, C]`.

        Raises:
          ValueError, TypeError: as of `Bert`; places beyond T − 1 give NaN under jit.
        """
        return self._words(self.bert(tokens, **options), places)

    def _words(self, hidden: Array, places: Array | None) -> Array:
        if places is not None:
            checks.assert_shapes(hidden=(hidden, "... T D"), places=(places, "... M"))
            places = checks.validated_tokens("places", places, hidden.shape[-2], "the last token")
            fill: Any = {"mode": "fill", "fill_value": jnp.nan}
            hidden = jnp.take_along_axis(hidden, places[..., None], axis=-2, **fill)
        return self.words(hidden, self.bert.embedding.embedding[...])


class BertForPreTraining(BertForMaskedLM):
    """Predict the words that a mask hides, and whether the second text follows the first.

        word logits = words(bert(tokens)),   next logits = W_n pooled + b_n

    Its arguments are those of `BertForMaskedLM`.

    Attributes:
      bert: a `Bert`.
      words: a `WordHead`.
      next: W_n and b_n, a Linear.

    Example:
      >>> model = BertForPreTraining(Config(11, 8, 2, 2, 16), rngs=nnx.Rngs(0))
      >>> words, follows = model(jnp.array([[2, 5, 3, 4, 3]]), deterministic=True)
      >>> words.shape, follows.shape
      ((1, 5, 11), (1, 2))
    """

    pooler = True

    def __init__(self, config: Config, **options: Any):
        super().__init__(config, **options)
        options.pop("attend", None)
        self.next = linear(config.features, 2, **options)

    def __call__(
        self, tokens: Array, *, places: Array | None = None, **options: Any
    ) -> tuple[Array, Array]:
        """Word logits, as of `BertForMaskedLM`, and next logits `[..., 2]`.

        Class 0 of the latter says that the second text follows the first.
        """
        hidden = self.bert(tokens, **options)
        return self._words(hidden, places), self.next(self.bert.pool(hidden))


class BertForSequenceClassification(nnx.Module):
    """Logits of the whole sequence: W dropout(pooled) + b.

    Args:
      config: sizes and form; `classes` is C.
      attend, dtype, param_dtype, rngs: as `Bert` takes them.

    Attributes:
      bert: a `Bert`.
      out: W and b, a Linear.

    Example:
      >>> config = Config(11, 8, 2, 2, 16, classes=3)
      >>> model = BertForSequenceClassification(config, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[2, 5, 3]]), deterministic=True).shape
      (1, 3)
    """

    pooler = True

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
        rate, self.config = config.classifier_dropout_rate, config
        self.bert = Bert(config, pooler=self.pooler, attend=attend, **options)
        self.dropout = dropout(config.dropout_rate if rate is None else rate, rngs)
        self.out = linear(config.features, config.classes, **options)

    def __call__(
        self, tokens: Array, *, deterministic: bool | None = None, **options: Any
    ) -> Array:
        """Logits of tokens `[..., T]`: `[..., C]`, or of each token `[..., T, C]`.

        Arguments are those of `Bert`; there is dropout before the Linear, too.
        """
        hidden = self.bert(tokens, deterministic=deterministic, **options)
        found = self.bert.pool(hidden) if self.pooler else hidden
        return self.out(self.dropout(found, deterministic=deterministic))


class BertForTokenClassification(BertForSequenceClassification):
    """Logits of every token: W dropout(hidden) + b.

    Its arguments are those of `BertForSequenceClassification`; its `bert` has no pooler.

    Example:
      >>> model = BertForTokenClassification(Config(11, 8, 2, 2, 16, classes=5), rngs=nnx.Rngs(0))
      >>> model(jnp.array([[2, 5, 3]]), deterministic=True).shape
      (1, 3, 5)
    """

    pooler = False


PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "bert-base-uncased": Config(30522, 768, 12, 12, 3072),
        "bert-base-cased": Config(28996, 768, 12, 12, 3072),
        "bert-large-uncased": Config(30522, 1024, 24, 16, 4096),
        "all-MiniLM-L6-v2": Config(30522, 384, 6, 12, 1536),
    }
)
"""The shapes of published models by name; their weights are loaded, not these."""
