"""An encoder of sequences of feature vectors, and a classifier that reads it.

Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks, masks
from jattn.models.encoder_decoder import nan_where_lengths_are_wrong
from jattn.nn._shared import Linear, is_real, sequence
from jattn.nn.positions import SinusoidalPositions
from jattn.nn.transformer import TransformerEncoder
from jattn.nn.transformer_layers import Activation, TransformerEncoderLayer, layer_norm

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a `FeatureEncoder` and its form.

    Attributes:
      in_features: the width of the input.
      features: D, the width of the layers.
      num_heads: N.
      num_layers: the number of layers.
      mlp_features: the width between the two Linears of a layer.
      dropout_rate: of the embedded input, and in every layer.
      activation: "relu", "gelu" (by the error function), or a function.
      norm_first: whether a layer normalises its input rather than its output; then a LayerNorm ends
        the encoder.
      positions: whether to add the sinusoidal encoding; without it the order of the steps has no
        meaning to the encoder.

    Raises:
      ValueError: a size is not positive, or the rate lies outside 0 … 1.

    Example:
      >>> Config(7).features
      512
    """

    in_features: int
    features: int = 512
    num_heads: int = 8
    num_layers: int = 6
    mlp_features: int = 2048
    dropout_rate: float = 0.1
    activation: Activation = "relu"
    norm_first: bool = False
    positions: bool = True

    def __post_init__(self) -> None:
        sizes = ("in_features", "features", "num_heads", "num_layers", "mlp_features")
        checks.assert_positive(**{name: getattr(self, name) for name in sizes})
        checks.assert_probability(dropout_rate=self.dropout_rate)
        checks.assert_bool(norm_first=self.norm_first, positions=self.positions)


class FeatureEncoder(nnx.Module):
    """A Linear, positions, and the layers of a Transformer's encoder.

        output = encoder(dropout(W x + b + P))

    Args:
      config: sizes and form.
      attend: `jattn.attend`, or a `functools.partial` of it that sets a kernel, mask or modifier.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Attributes:
      embedding: the Linear.
      positions: a `SinusoidalPositions`, or None.
      stack: a `TransformerEncoder`.

    Example:
      >>> encoder = FeatureEncoder(Config(7, 8, 2, 1, 16), rngs=nnx.Rngs(0))
      >>> encoder(jnp.ones((2, 5, 7)), lengths=jnp.array([5, 3]), deterministic=True).shape
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
        D, rate = config.features, config.dropout_rate
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_features = config.in_features
        self.embedding = Linear(config.in_features, D, **options)
        positions = (
            SinusoidalPositions(D, dropout_rate=rate, rngs=rngs) if config.positions else None
        )
        self.positions = nnx.data(positions)
        layers = [
            TransformerEncoderLayer(
                D, config.num_heads, config.mlp_features, dropout_rate=rate,
                activation=config.activation, norm_first=config.norm_first, attend=attend,
                **options,
            )
            for _ in range(config.num_layers)
        ]  # fmt: skip
        norm = layer_norm(D, 1e-5, options) if config.norm_first else None
        self.stack = TransformerEncoder(layers, norm)

    def __call__(
        self, x: Array, *, lengths: Array | None = None, deterministic: bool | None = None
    ) -> Array:
        """Encode x `[..., T, in_features]`.

        Args:
          x: floating point.
          lengths: integers `[...]` from 0 to T, the number of real steps of each sequence, which
            see no others; None: all are real.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          `[..., T, D]`.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 0 … T (under jit: NaN).
          TypeError: x is not floating point, or the lengths are not integers.
        """
        x = sequence(x, self.in_features)
        if lengths is not None:
            T = checks.assert_shapes(x=(x, "... T D"), lengths=(lengths, "..."))["T"]
            checks.assert_integers(lengths=lengths)
            checks.assert_in_range("lengths", lengths, 0, T, "T, the number of steps")
        x = self.embedding(x)
        if self.positions is not None:
            x = self.positions(x, deterministic=deterministic)
        mask = None if lengths is None else masks.padding(lengths)
        outputs = self.stack(x, mask=mask, deterministic=deterministic)
        return nan_where_lengths_are_wrong(outputs, lengths, 0)


class FeatureClassifier(nnx.Module):
    """A Linear of the mean of a `FeatureEncoder`'s outputs at the real steps.

        logits = W (1/n Σ_t output_t) + b

    Args:
      config: of the encoder.
      classes: C.
      attend, dtype, param_dtype, rngs: as `FeatureEncoder` takes them.

    Attributes:
      encoder: the `FeatureEncoder`.
      out: W and b.

    Example:
      >>> model = FeatureClassifier(Config(7, 8, 2, 1, 16), 3, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 5, 7)), lengths=jnp.array([5, 3]), deterministic=True).shape
      (2, 3)
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        *,
        attend: Callable[..., Any] = attend,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(classes=classes)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = FeatureEncoder(config, attend=attend, **options)
        self.out = Linear(config.features, classes, **options)

    def __call__(
        self, x: Array, *, lengths: Array | None = None, deterministic: bool | None = None
    ) -> Array:
        """Logits `[..., C]` of x `[..., T, in_features]`.

        Lengths are integers `[...]` from 1 to T; None: all steps are real. A sequence without a
        real step has the mean 0.

        Raises:
          ValueError, TypeError: as `FeatureEncoder`.
        """
        outputs = self.encoder(x, lengths=lengths, deterministic=deterministic)
        if lengths is None:
            return self.out(outputs.mean(axis=-2))
        real = is_real(lengths, outputs.shape[-2])[..., None]
        number = jnp.maximum(real.sum(axis=-2), 1).astype(outputs.dtype)
        # The encoder makes all steps NaN where a length is wrong, those that are not real, too
        wrong = jnp.isnan(outputs) & (jnp.asarray(lengths) < 0)[..., None, None]
        return self.out(jnp.where(real | wrong, outputs, 0).sum(axis=-2) / number)
