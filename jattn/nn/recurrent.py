"""Recurrent networks with PyTorch's equations; weights carry over to PyTorch and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks
from jattn.functional.recurrence import State
from jattn.nn import recurrent_cells
from jattn.nn._shared import dropout, promoted
from jattn.nn.recurrent_cells import Cell, GRUCell, LSTMCell, RNNCell

Array = jax.Array


class _Network(nnx.Module):
    """Layers of cells over a sequence, which the three networks share; each has its own cell."""

    def __init__(
        self,
        cell: Callable[[int], Cell],
        in_features: int,
        num_layers: int,
        bidirectional: bool,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        checks.assert_positive(in_features=in_features, num_layers=num_layers)
        checks.assert_bool(bidirectional=bidirectional)
        self.dropout = dropout(dropout_rate, rngs)
        self.layers: nnx.List[Cell] = nnx.List()
        self.backward_layers: nnx.List[Cell] = nnx.List()
        width = in_features
        for _ in range(num_layers):
            for cells in (self.layers, self.backward_layers)[: 1 + bidirectional]:
                cells.append(cell(width))
            width = (1 + bidirectional) * self.layers[-1].hidden_kernel.shape[0]

    def __call__(
        self,
        inputs: Array,
        state: Any = None,
        *,
        lengths: Array | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Array, Any]:
        """Run over whole sequences.

        Args:
          inputs: `[..., T, D]`, floating point, T ≥ 1.
          state: of every cell before its first step, `[..., R, F]`. R is the number of layers, or
            twice that with both directions: layer by layer, the forward cell of each first. An
            LSTM has a pair of h `[..., R, P]` and c `[..., R, F]`. None: zeros.
          lengths: integers `[...]` from 1 to T, the number of real steps of each sequence. The
            backward direction begins at the last real step. None: all steps are real.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          The top layer's h after every step, `[..., T, P]`, and the state of every cell after its
          last real step, like `state`. With both directions the outputs stand side by side,
          `[..., T, 2P]`. Past the end of a sequence they are zero.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 1 … T. Under jit, where lengths
            cannot be seen, the state of such a sequence is NaN.
          TypeError: inputs or state are not floating point, or lengths are not integers.
        """
        inputs, parts, valid, possible = self._check(inputs, state, lengths)
        outputs = rearrange(inputs, "... t d -> t ... d")
        if valid is not None:
            # What lies past the end may be anything, NaN included
            outputs = jnp.where(valid, outputs, 0)
        last: list[State] = []
        for layer in range(len(self.layers)):
            below = self.dropout(outputs, deterministic=deterministic) if layer else outputs
            both = []
            for reverse, cell in enumerate(self._cells(layer)):
                first = tuple(part[..., len(last), :] for part in parts)
                states, final = cell.run(below, first, valid=valid, reverse=bool(reverse))
                both.append(states)
                last.append(final)
            outputs = jnp.concatenate(both, axis=-1)
        if valid is not None and possible is not None:
            outputs = jnp.where(valid, outputs, 0)
            last = [tuple(jnp.where(possible, part, jnp.nan) for part in final) for final in last]
        return rearrange(outputs, "t ... f -> ... t f"), self._stack(last)

    def step(self, projected: Array, state: Any, *, deterministic: bool | None = None) -> Any:
        """One step of all layers, of a network of one direction.

        Args:
          projected: the input as `layers[0].project` leaves it, `[..., gates · F]`.
          state: as in a call.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          The next state of every layer, like `state`.

        Raises:
          ValueError: a shape does not fit, or the network has both directions: the backward one
            begins at the end.
        """
        if self.backward_layers:
            raise ValueError("a network with bidirectional=True has no single step")
        first = self.layers[0]
        parts = first.unpack(state)
        checks.assert_shapes(
            network=(recurrent_cells.sizes(first, len(self.layers)), "R D P F"),
            **recurrent_cells.patterns(first, parts, "... R"),
            projected=(projected, "... gates"),
        )
        checks.assert_floating(projected=projected, **recurrent_cells.names(parts))
        projected, *same = promoted(first.dtype, projected, *parts)
        parts = tuple(same)
        after: list[State] = []
        for layer, cell in enumerate(self.layers):
            if layer:
                projected = cell.project(self.dropout(after[-1][0], deterministic=deterministic))
            after.append(cell.advance(projected, tuple(part[..., layer, :] for part in parts)))
        return self._stack(after)

    def _cells(self, layer: int) -> list[Cell]:
        return [cells[layer] for cells in (self.layers, self.backward_layers) if cells]

    def _stack(self, states: list[State]) -> Any:
        return self.layers[0].pack(
            tuple(jnp.stack(part, axis=-2) for part in zip(*states, strict=True))
        )

    def _check(
        self, inputs: Array, state: Any, lengths: Array | None
    ) -> tuple[Array, State, Array | None, Array | None]:
        """Inputs and state in one dtype; which steps are real; which lengths are possible.

        The real steps are `[T, ..., 1]`, the possible lengths `[..., 1]`.
        """
        first = self.layers[0]
        own = (
            recurrent_cells.sizes(first, len(self.layers) + len(self.backward_layers)),
            "R D P F",
        )
        sizes = checks.assert_shapes(network=own, inputs=(inputs, "... T D"))
        T = sizes["T"]
        checks.assert_floating(inputs=inputs)
        if T == 0:
            raise ValueError(f"inputs must hold at least one step, got shape {jnp.shape(inputs)}")
        if state is None:
            shapes = [(*sizes["..."], sizes["R"], sizes[letter]) for letter in first.letters]
            state = first.pack(tuple(jnp.zeros(shape, jnp.result_type(inputs)) for shape in shapes))
        parts = first.unpack(state)
        checks.assert_shapes(
            network=own,
            inputs=(inputs, "... T D"),
            **recurrent_cells.patterns(first, parts, "... R"),
        )
        checks.assert_floating(**recurrent_cells.names(parts))
        inputs, *same, _ = promoted(first.dtype, inputs, *parts, first.input_kernel[...])
        if lengths is None:
            return inputs, tuple(same), None, None
        checks.assert_shapes(inputs=(inputs, "... T D"), lengths=(lengths, "..."))
        checks.assert_integers(lengths=lengths)
        checks.assert_in_range("lengths", lengths, 1, T, "T, the number of steps")
        lengths = jnp.asarray(lengths, jnp.int32)[..., None]
        steps = jnp.arange(T, dtype=jnp.int32).reshape(T, *(1 for _ in lengths.shape))
        return inputs, tuple(same), steps < lengths[None], (lengths > 0) & (lengths <= T)


class RNN(_Network):
    """Plain recurrent layers over a sequence: h_t = f(W x_t + b + U h_{t−1} + d); `torch.nn.RNN`.

    Each layer reads the outputs of the one below. Parameters: those of `layers`, a list of L
    `RNNCell`s, and of `backward_layers`, as many or none.

    Args:
      in_features: D.
      hidden_features: F, the width of every state.
      num_layers: L.
      bidirectional: whether each layer also runs from the end; its outputs stand side by side.
      dropout_rate: of the outputs of every layer but the top one.
      activation: f, `jax.lax.tanh` (the default) or `jax.nn.relu` as in PyTorch, or any other.
      use_bias: whether each cell has two biases (the default) or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size is not positive or `dropout_rate` lies outside 0 … 1.

    Paper: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1

    Example:
      >>> rnn = RNN(3, 5, num_layers=2, activation=jax.nn.relu, rngs=nnx.Rngs(0))
      >>> outputs, state = rnn(jnp.ones((4, 7, 3)))
      >>> outputs.shape, state.shape
      ((4, 7, 5), (4, 2, 5))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        activation: Callable[[Array], Array] = jax.lax.tanh,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def cell(width: int) -> RNNCell:
            return RNNCell(
                width, hidden_features, activation=activation, use_bias=use_bias,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        super().__init__(cell, in_features, num_layers, bidirectional, dropout_rate, rngs)


class LSTM(_Network):
    """Long short-term memory over a sequence (`lstm_step`); `torch.nn.LSTM`.

    Each layer reads the outputs of the one below. Parameters: those of `layers`, a list of L
    `LSTMCell`s, and of `backward_layers`, as many or none. The state is an `LSTMState`:
    h `[..., R, P]` and c `[..., R, F]`.

    Args:
      in_features: D.
      hidden_features: F, the width of every cell's c.
      num_layers: L.
      bidirectional: whether each layer also runs from the end; its outputs stand side by side.
      dropout_rate: of the outputs of every layer but the top one.
      proj_features: P, the width of every h where it is projected; None: F, and no projection.
      use_bias: whether each cell has two biases (the default) or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size is not positive or `dropout_rate` lies outside 0 … 1.

    Papers: Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735;
    with a projection, Sak et al. 2014, https://arxiv.org/abs/1402.1128

    Example:
      >>> lstm = LSTM(3, 5, bidirectional=True, rngs=nnx.Rngs(0))
      >>> outputs, (h, c) = lstm(jnp.ones((4, 7, 3)), lengths=jnp.array([1, 7, 2, 3]))
      >>> outputs.shape, h.shape, c.shape
      ((4, 7, 10), (4, 2, 5), (4, 2, 5))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        proj_features: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def cell(width: int) -> LSTMCell:
            return LSTMCell(
                width, hidden_features, proj_features=proj_features, use_bias=use_bias,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        super().__init__(cell, in_features, num_layers, bidirectional, dropout_rate, rngs)


class GRU(_Network):
    """Gated recurrent units over a sequence (`gru_step`); `torch.nn.GRU`.

    Each layer reads the outputs of the one below. Parameters: those of `layers`, a list of L
    `GRUCell`s, and of `backward_layers`, as many or none.

    Args:
      in_features: D.
      hidden_features: F, the width of every state.
      num_layers: L.
      bidirectional: whether each layer also runs from the end; its outputs stand side by side.
      dropout_rate: of the outputs of every layer but the top one.
      use_bias: whether each cell has two biases (the default) or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size is not positive or `dropout_rate` lies outside 0 … 1.

    Paper: Cho et al. 2014, https://arxiv.org/abs/1406.1078

    Example:
      >>> gru = GRU(3, 5, num_layers=2, rngs=nnx.Rngs(0))
      >>> outputs, state = gru(jnp.ones((4, 7, 3)), lengths=jnp.array([1, 7, 2, 3]))
      >>> outputs.shape, state.shape
      ((4, 7, 5), (4, 2, 5))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def cell(width: int) -> GRUCell:
            return GRUCell(
                width, hidden_features, use_bias=use_bias,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        super().__init__(cell, in_features, num_layers, bidirectional, dropout_rate, rngs)
