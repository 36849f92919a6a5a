"""Character networks that learn to write "ohlol" where they read "hello": one network, three ways.

Paper: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.functional import checks
from jattn.nn._shared import Linear, promoted, rows
from jattn.nn.embedding import Embedding
from jattn.nn.recurrent import RNN
from jattn.nn.recurrent_cells import Cell, RNNCell

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a character network.

    Attributes:
      vocabulary: C, number of characters.
      embedding_features: D, width of the embedding, where there is one.
      hidden_features: F, width of the states behind an embedding; on one-hot input they have width
        C.
      num_layers: L, layers behind an embedding; on one-hot input there is one.

    Raises:
      ValueError: a size is not positive.

    Example:
      >>> Config(4)
      Config(vocabulary=4, embedding_features=10, hidden_features=8, num_layers=2)
    """

    vocabulary: int
    embedding_features: int = 10
    hidden_features: int = 8
    num_layers: int = 2

    def __post_init__(self) -> None:
        checks.assert_positive(**vars(self))


class CharCell(nnx.Module):
    """A recurrent cell in a loop, on one-hot input; its state is the logits.

        logits_t = h_t = tanh(W onehot(x_t) + b + U h_{t−1} + d)

    Logits lie between −1 and 1, so no character has a probability above e² / (e² + C − 1), and the
    loss has a lower bound above zero. The most probable character may still be right every time.

    Args:
      config: sizes.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> CharCell(Config(4), rngs=nnx.Rngs(0))(jnp.array([[1, 0, 2, 2, 3]])).shape
      (1, 5, 4)
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        C = config.vocabulary
        self.cell = RNNCell(C, C, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Predict a character at every step.

        Args:
          tokens: character ids `[B, T]`, T ≥ 1.

        Returns:
          Logits `[B, T, C]`.

        Raises:
          ValueError: a shape does not fit, or an id is unknown (under jit: NaN).
          TypeError: tokens are not integers.
        """
        T = _check(tokens)
        inputs = _one_hot(tokens, self.cell)
        state, states = jnp.zeros_like(inputs[:, 0]), []
        for t in range(T):
            state = self.cell(inputs[:, t], state)
            states.append(state)
        return jnp.stack(states, axis=1)


class CharRNN(nnx.Module):
    """`CharCell` with the loop inside `jattn.nn.RNN`: the same numbers from the same parameters.

    Args:
      config: sizes.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> CharRNN(Config(4), rngs=nnx.Rngs(0))(jnp.array([[1, 0, 2, 2, 3]])).shape
      (1, 5, 4)
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        C = config.vocabulary
        self.rnn = RNN(C, C, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Predict a character at every step: as `CharCell`."""
        _check(tokens)
        return self.rnn(_one_hot(tokens, self.rnn.layers[0]))[0]


class EmbeddedCharRNN(nnx.Module):
    """Embedding, a stack of recurrent layers, and a Linear layer that makes the logits.

        logits_t = W_out (top layer of h_t) + b_out

    Args:
      config: sizes.
      dtype: to compute in; None: that of the parameters.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> EmbeddedCharRNN(Config(4), rngs=nnx.Rngs(0))(jnp.array([[1, 0, 2, 2, 3]])).shape
      (1, 5, 4)
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        C, D, F = config.vocabulary, config.embedding_features, config.hidden_features
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embedding = Embedding(C, D, **options)
        self.rnn = RNN(D, F, num_layers=config.num_layers, **options)
        self.out = Linear(F, C, **options)

    def __call__(self, tokens: Array) -> Array:
        """Predict a character at every step: as `CharCell`."""
        _check(tokens)
        return self.out(self.rnn(self.embedding(tokens))[0])


def _check(tokens: Array) -> Any:
    """T, the number of steps."""
    T = checks.assert_shapes(tokens=(tokens, "B T"))["T"]
    if T == 0:
        raise ValueError(f"tokens must hold at least one step, got shape {jnp.shape(tokens)}")
    return T


def _one_hot(tokens: Array, cell: Cell) -> Array:
    """`[B, T, C]`, where C and the dtype are those of the cell."""
    (kernel,) = promoted(cell.dtype, cell.input_kernel[...])
    C = kernel.shape[0]
    return rows(jnp.eye(C, dtype=kernel.dtype), checks.validated_tokens("tokens", tokens, C))
