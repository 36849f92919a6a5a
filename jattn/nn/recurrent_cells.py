"""One step of each recurrent network, with its parameters."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.functional import checks
from jattn.functional.pytree import named_tuple
from jattn.functional.recurrence import (
    Gates,
    State,
    Weights,
    added,
    advance,
    gru_step,
    lstm_step,
    recur,
)
from jattn.nn._shared import promoted

Array = jax.Array


@named_tuple
class LSTMState(NamedTuple):
    """What a long short-term memory keeps from step to step."""

    h: Array  # the output, [..., P]
    c: Array  # the cell, [..., F]


class Cell(nnx.Module):
    """What the three cells share; each has a number of gates and a step of its own.

    Args:
      in_features: D.
      hidden_features: F.
      proj_features: P, the width of the output where it is projected; None: F, and no projection.
      use_bias: whether there are two biases or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.
    """

    gates: ClassVar[int]
    # Whether a step takes the products of input and state as a pair, not as their sum
    separate: ClassVar[bool] = False
    letters: ClassVar[tuple[str, ...]] = ("F",)  # the width of each part of the state

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        proj_features: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        state_features = hidden_features if proj_features is None else proj_features
        checks.assert_positive(
            in_features=in_features, hidden_features=hidden_features, proj_features=state_features
        )
        checks.assert_bool(use_bias=use_bias)
        self.dtype = dtype
        bound = hidden_features**-0.5

        def uniform(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))

        gates = self.gates * hidden_features
        self.input_kernel = uniform(in_features, gates)
        self.hidden_kernel = uniform(state_features, gates)
        self.input_bias = uniform(gates) if use_bias else nnx.data(None)
        self.hidden_bias = uniform(gates) if use_bias else nnx.data(None)
        self.proj_kernel = (
            nnx.data(None) if proj_features is None else uniform(hidden_features, proj_features)
        )

    def __call__(self, inputs: Array, state: Any) -> Any:
        """The next state.

        Args:
          inputs: `[..., D]`, floating point.
          state: h `[..., F]`; of an LSTM an `LSTMState`, h `[..., P]` and c `[..., F]`.

        Returns:
          Like `state`, in the dtype to which inputs, state and parameters promote.

        Raises:
          ValueError: a shape does not fit.
          TypeError: inputs or state are not floating point.
        """
        parts = self.unpack(state)
        checks.assert_shapes(
            cell=(sizes(self), "D P F"), inputs=(inputs, "... D"), **patterns(self, parts, "...")
        )
        checks.assert_floating(inputs=inputs, **names(parts))
        inputs, *same, _ = promoted(self.dtype, inputs, *parts, self.hidden_kernel[...])
        return self.pack(self.advance(self.project(inputs), tuple(same)))

    def project(self, inputs: Array, *, first: int | None = None, use_bias: bool = True) -> Array:
        """The part of a step without the state: `inputs [..., D]` to `W x + b`, `[..., G · F]`.

        The product of inputs that lie side by side is the sum of their products. So a part
        `[..., D']` that is known earlier may be projected earlier: `first` is the place in D at
        which it begins, and all parts but one have `use_bias=False`.

        Raises:
          ValueError: the width is not D, or a part does not lie within D.
          TypeError: inputs are not floating point.

        Example:
          >>> cell, x = RNNCell(3, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
          >>> early = cell.project(x[:, 1:], first=1, use_bias=False)
          >>> bool(jnp.allclose(cell.project(x), early + cell.project(x[:, :1], first=0)))
          True
        """
        checks.assert_floating(inputs=inputs)
        D, width = self.input_kernel.shape[0], jnp.shape(inputs)[-1]
        begin = first or 0
        if begin < 0 or begin + width > D or (first is None and width < D):
            part = "" if first is None else f" from feature {first} on"
            raise ValueError(
                f"inputs must be [..., D] with D = {D}{part}, got shape {jnp.shape(inputs)}"
            )
        inputs, _ = promoted(self.dtype, inputs, self.input_kernel[...])
        weights = self.weights(inputs.dtype)
        projected = inputs @ weights.input_kernel[begin : begin + width]
        return added(projected, weights.input_bias if use_bias else None)

    def advance(self, projected: Array, state: State) -> State:
        """The rest of a step: `projected [..., G · F]` and the state's parts to the next parts.

        All are of one dtype.
        """
        return advance(
            self.step, projected, state, self.weights(projected.dtype), separate=self.separate
        )

    def run(
        self, inputs: Array, state: State, *, valid: Array | None = None, reverse: bool = False
    ) -> tuple[Array, State]:
        """All steps, time first: `inputs [T, ..., D]` to h `[T, ..., P]` and the last state.

        See `recur`.
        """
        weights = self.weights(inputs.dtype)
        return recur(
            self.step, inputs, state, weights, separate=self.separate, valid=valid, reverse=reverse
        )

    def step(self, gates: Gates, state: State) -> State:
        """The gates: what is left of a step once the products are made."""
        raise NotImplementedError

    def weights(self, dtype: Any) -> Weights:
        """The parameters in a dtype."""
        own: list[Any] = [getattr(self, name) for name in Weights._fields]
        cast: list[Any] = [
            None if parameter is None else parameter.astype(dtype) for parameter in own
        ]
        return Weights(*cast)

    def unpack(self, state: Any) -> State:
        """The parts of a state as a caller gives it."""
        if len(self.letters) == 1:
            return (state,)
        pair = isinstance(state, (tuple, list))
        if not pair or len(state) != len(self.letters):
            got = f"a {type(state).__name__} of {len(state)}" if pair else type(state).__name__
            raise ValueError(f"state must be a pair of h and c, got {got}")
        return tuple(state)

    def pack(self, parts: State) -> Any:
        """A state as a caller gets it: the inverse of `unpack`."""
        return parts[0] if len(parts) == 1 else LSTMState(*parts)


# Functions, not methods: `nnx.tabulate` runs every public method and needs arrays from it.


def names(parts: State) -> dict[str, Array]:
    """The parts of a state under the names that errors give them."""
    if len(parts) == 1:
        return {"state": parts[0]}
    return {f"state[{n}]": part for n, part in enumerate(parts)}


def patterns(cell: Cell, parts: State, batch: str) -> dict[str, Any]:
    """The parts with the patterns of their shapes, for `checks.assert_shapes`."""
    letters = zip(names(parts).items(), cell.letters, strict=True)
    return {name: (part, f"{batch} {letter}") for (name, part), letter in letters}


def sizes(cell: Cell, *batch: int) -> jax.ShapeDtypeStruct:
    """An array of shape `[*batch, D, P, F]`, for `checks.assert_shapes`."""
    D, gates = cell.input_kernel.shape
    shape = (*batch, D, cell.hidden_kernel.shape[0], gates // cell.gates)
    return jax.ShapeDtypeStruct(shape, cell.input_kernel.dtype)


class RNNCell(Cell):
    """One step of a plain recurrent network with its parameters.

        h' = f(W x + b + U h + d)

    Parameters: `input_kernel [D, F]`, `hidden_kernel [F, F]`, and unless `use_bias=False`
    `input_bias [F]` and `hidden_bias [F]`. All begin uniform in ±1/√F.

    Args:
      in_features: D.
      hidden_features: F, the width of the state.
      activation: f, `jax.lax.tanh` or `jax.nn.relu` as in PyTorch, or any other.
      use_bias: whether there are two biases or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Raises:
      ValueError: a size is not positive.

    Paper: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1

    Example:
      >>> cell = RNNCell(3, 5, activation=jax.nn.relu, rngs=nnx.Rngs(0))
      >>> cell(jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
      (2, 5)
    """

    gates = 1

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: Callable[[Array], Array] = jax.lax.tanh,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, hidden_features, use_bias=use_bias, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.activation = activation

    def step(self, gates: Gates, state: State) -> State:
        """The activation."""
        return (self.activation(gates[0]).astype(gates[0].dtype),)


class LSTMCell(Cell):
    """One step of a long short-term memory (`lstm_step`) with its parameters.

        i, f, g, o = W x + b + U h + d
        c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)
        h' = σ(o) ⊙ tanh(c'),   and with `proj_features` the product of it and `proj_kernel`

    Parameters: `input_kernel [D, 4F]`, `hidden_kernel [P, 4F]`, unless `use_bias=False`
    `input_bias [4F]` and `hidden_bias [4F]`, and with `proj_features` `proj_kernel [F, P]`; gate
    order i, f, g, o. All begin uniform in ±1/√F. The state is an `LSTMState`: h `[..., P]` and c
    `[..., F]`.

    Args:
      in_features: D.
      hidden_features: F, the width of the cell c.
      proj_features: P, the width of h where it is projected; None: F, and no projection.
      use_bias: whether there are two biases or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Raises:
      ValueError: a size is not positive.

    Papers: Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735;
    with a projection, Sak et al. 2014, https://arxiv.org/abs/1402.1128

    Example:
      >>> cell = LSTMCell(3, 5, rngs=nnx.Rngs(0))
      >>> h, c = cell(jnp.ones((2, 3)), (jnp.zeros((2, 5)), jnp.zeros((2, 5))))
      >>> h.shape, c.shape
      ((2, 5), (2, 5))
    """

    gates = 4
    letters = ("P", "F")

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        proj_features: int | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, hidden_features, proj_features=proj_features, use_bias=use_bias,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def step(self, gates: Gates, state: State) -> State:
        """`lstm_step`."""
        return lstm_step(gates[0], state[1])


class GRUCell(Cell):
    """One step of a gated recurrent unit (`gru_step`) with its parameters.

        r, z = σ(W_rz x + b_rz + U_rz h + d_rz)
        n = tanh(W_n x + b_n + r ⊙ (U_n h + d_n))
        h' = (1 − z) ⊙ n + z ⊙ h

    Parameters: `input_kernel [D, 3F]`, `hidden_kernel [F, 3F]`, and unless `use_bias=False`
    `input_bias [3F]` and `hidden_bias [3F]`; gate order r, z, n. All begin uniform in ±1/√F.

    Args:
      in_features: D.
      hidden_features: F, the width of the state.
      use_bias: whether there are two biases or none.
      dtype: to compute in; None: the one to which inputs, state and parameters promote.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Raises:
      ValueError: a size is not positive.

    Paper: Cho et al. 2014, https://arxiv.org/abs/1406.1078

    Example:
      >>> cell = GRUCell(3, 5, rngs=nnx.Rngs(0))
      >>> cell(jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
      (2, 5)
    """

    gates = 3
    separate = True  # the reset gate stands between the two products

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, hidden_features, use_bias=use_bias, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def step(self, gates: Gates, state: State) -> State:
        """`gru_step`."""
        return (gru_step(gates[0], gates[1], state[0]),)
