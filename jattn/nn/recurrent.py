"""Recurrent networks with PyTorch's equations, so that their weights carry over in both directions."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jattn.functional import checks

Array = jax.Array


def gru_step(projected: Array, state: Array, hidden_kernel: Array, hidden_bias: Array | None = None) -> Array:
    """One step of a gated recurrent unit, from an input that is projected already.

        r = σ(x_r + U_r h + c_r)
        z = σ(x_z + U_z h + c_z)
        n = tanh(x_n + r ⊙ (U_n h + c_n))
        h' = (1 − z) ⊙ n + z ⊙ h

    The hidden bias c_n lies inside the reset gate, as in PyTorch. Here F is the width of the state, and 3F holds the
    gates r, z, n in this order.

    Args:
      projected: x = W x_t + b, `[..., 3F]`, floating point.
      state: h, `[..., F]`.
      hidden_kernel: U, `[F, 3F]`.
      hidden_bias: c, `[3F]`, or None.

    Returns:
      The next state h', `[..., F]`.

    Raises:
      ValueError: a shape does not fit.
      TypeError: an argument is not floating point.

    Paper: Cho et al. 2014, https://arxiv.org/abs/1406.1078; reset gate after the product, as in its v1

    Example:
      >>> gru_step(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.zeros((1, 3)))  # all gates half open, candidate zero
      Array([[0.5],
             [0.5]], dtype=float32)
    """
    sizes = checks.shapes(
        hidden_kernel=(hidden_kernel, "F gates"), state=(state, "... F"), projected=(projected, "... gates")
    )
    F = sizes["F"]
    if sizes["gates"] != 3 * F:
        raise ValueError(f"hidden_kernel must be [F, 3F], got shape {hidden_kernel.shape}")
    checks.floating(projected=projected, state=state, hidden_kernel=hidden_kernel)
    hidden = state @ hidden_kernel
    if hidden_bias is not None:
        checks.shapes(hidden_kernel=(hidden_kernel, "F gates"), hidden_bias=(hidden_bias, "gates"))
        hidden = hidden + hidden_bias
    gates = jax.nn.sigmoid(projected[..., : 2 * F] + hidden[..., : 2 * F])
    reset, update = gates[..., :F], gates[..., F:]
    candidate = jnp.tanh(projected[..., 2 * F :] + reset * hidden[..., 2 * F :])
    return (1 - update) * candidate + update * state


class GRUCell(nnx.Module):
    """One step of a gated recurrent unit (`gru_step`) with its parameters.

    Parameters: `input_kernel [D, 3F]`, `hidden_kernel [F, 3F]`, and unless `use_bias=False` `input_bias [3F]` and
    `hidden_bias [3F]`; gate order r, z, n. All begin uniform in ±1/√F.

    Args:
      in_features: D.
      hidden_features: F, the width of the state.
      use_bias: whether there are two biases or none.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params`.

    Example:
      >>> cell = GRUCell(3, 5, rngs=nnx.Rngs(0))
      >>> cell(jnp.ones((2, 3)), jnp.zeros((2, 5))).shape
      (2, 5)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.positive(in_features=in_features, hidden_features=hidden_features)
        bound = hidden_features**-0.5

        def uniform(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))

        gates = 3 * hidden_features
        self.input_kernel = uniform(in_features, gates)
        self.hidden_kernel = uniform(hidden_features, gates)
        self.input_bias = uniform(gates) if use_bias else nnx.data(None)
        self.hidden_bias = uniform(gates) if use_bias else nnx.data(None)

    def __call__(self, inputs: Array, state: Array) -> Array:
        """The next state.

        Args:
          inputs: `[..., D]`, floating point.
          state: `[..., F]`.

        Returns:
          `[..., F]`, in the dtype to which inputs, state and parameters promote.
        """
        checks.floating(inputs=inputs, state=state)
        inputs, state = _promoted(inputs, state, self.hidden_kernel[...])
        return self.advance(self.project(inputs), state)

    def project(self, inputs: Array) -> Array:
        """The part of a step that does not depend on the state: `inputs [..., D]` to `W x + b`, `[..., 3F]`."""
        checks.shapes(input_kernel=(self.input_kernel, "D gates"), inputs=(inputs, "... D"))
        projected = inputs @ self.input_kernel.astype(inputs.dtype)
        return projected if self.input_bias is None else projected + self.input_bias.astype(inputs.dtype)

    def advance(self, projected: Array, state: Array) -> Array:
        """The rest of a step: `projected [..., 3F]` and `state [..., F]`, of one dtype, to the next state."""
        bias = None if self.hidden_bias is None else self.hidden_bias.astype(state.dtype)
        return gru_step(projected, state, self.hidden_kernel.astype(state.dtype), bias)

    def run(self, inputs: Array, state: Array) -> Array:
        """The states after every step: `inputs [..., T, D]` and the first `state [..., F]` to `[..., T, F]`."""

        def step(state: Array, projected: Array) -> tuple[Array, Array]:
            state = self.advance(projected, state)
            return state, state

        projected = rearrange(self.project(inputs), "... t gates -> t ... gates")  # one product for all steps
        _, states = jax.lax.scan(step, state, projected)
        return rearrange(states, "t ... f -> ... t f")


class GRU(nnx.Module):
    """A stack of gated recurrent units over a sequence; each layer reads the outputs of the one below.

    Parameters: those of `layers`, a list of L `GRUCell`s.

    Args:
      in_features: D.
      hidden_features: F, the width of every layer's state.
      num_layers: L.
      dropout_rate: of the outputs of every layer but the top one.
      use_bias: whether each layer has two biases or none.
      param_dtype: dtype of the parameters.
      rngs: random streams; uses `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size is not positive or `dropout_rate` lies outside 0 … 1.

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
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.positive(in_features=in_features, hidden_features=hidden_features, num_layers=num_layers)
        checks.probability(dropout_rate=dropout_rate)
        widths = [in_features] + [hidden_features] * (num_layers - 1)
        self.layers = nnx.List(
            GRUCell(width, hidden_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs) for width in widths
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(
        self,
        inputs: Array,
        state: Array | None = None,
        *,
        lengths: Array | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Array, Array]:
        """Run over whole sequences.

        Args:
          inputs: `[..., T, D]`, floating point, T ≥ 1.
          state: of every layer before the first step, `[..., L, F]`; None: zeros.
          lengths: integers `[...]` from 1 to T: only so many steps of each sequence are real. None: all are.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          The top layer's state after every step, `[..., T, F]`, zero past the end of a sequence; and the state of
          every layer at the true end, `[..., L, F]`.

        Raises:
          ValueError: a shape does not fit, or a length lies outside 1 … T. Under jit, where lengths cannot be seen,
            the state of such a sequence is NaN.
          TypeError: inputs or state are not floating point, or lengths are not integers.
        """
        inputs, state, end = self._check(inputs, state, lengths)
        if lengths is not None:
            inside = jnp.arange(inputs.shape[-2], dtype=end.dtype)[:, None] <= end
            inputs = jnp.where(inside, inputs, 0)  # what lies past the end may be anything, NaN included
        outputs, final = inputs, []
        for layer, cell in enumerate(self.layers):
            below = self.dropout(outputs, deterministic=deterministic) if layer else outputs
            outputs = cell.run(below, state[..., layer, :])
            final.append(jnp.take_along_axis(outputs, end, axis=-2, mode="fill"))
        if lengths is not None:
            outputs = jnp.where(inside, outputs, 0)
        return outputs, jnp.concatenate(final, axis=-2)

    def step(self, projected: Array, state: Array, *, deterministic: bool | None = None) -> Array:
        """One step of all layers.

        Args:
          projected: the input as `layers[0].project` leaves it, `[..., 3F]`.
          state: `[..., L, F]`, of the same dtype.
          deterministic: True switches dropout off; None follows `train()` and `eval()`.

        Returns:
          The next state of every layer, `[..., L, F]`.
        """
        checks.shapes(gru=(self._sizes(), "L D F"), state=(state, "... L F"), projected=(projected, "... gates"))
        states: list[Array] = []
        for layer, cell in enumerate(self.layers):
            if layer:
                projected = cell.project(self.dropout(states[-1], deterministic=deterministic))
            states.append(cell.advance(projected, state[..., layer, :]))
        return jnp.stack(states, axis=-2)

    def _check(self, inputs: Array, state: Array | None, lengths: Array | None) -> tuple[Array, Array, Array]:
        own = (self._sizes(), "L D F")
        sizes = checks.shapes(gru=own, inputs=(inputs, "... T D"))
        lead, T, L, F = (sizes[letter] for letter in ("...", "T", "L", "F"))
        checks.floating(inputs=inputs)
        if T == 0:
            raise ValueError(f"inputs must hold at least one step, got shape {jnp.shape(inputs)}")
        if state is None:
            state = jnp.zeros((*lead, L, F), jnp.result_type(inputs))
        checks.shapes(gru=own, inputs=(inputs, "... T D"), state=(state, "... L F"))
        checks.floating(state=state)
        end = jnp.full((*lead, 1, 1), T - 1, jnp.int32)
        if lengths is not None:
            checks.shapes(inputs=(inputs, "... T D"), lengths=(lengths, "..."))
            checks.integers(lengths=lengths)
            checks.in_range("lengths", lengths, 1, T, "T, the number of steps")
            end = jnp.asarray(lengths).astype(jnp.int32)[..., None, None] - 1
            end = jnp.where(end < 0, T, end)  # nowhere, rather than at the last step
        inputs, state = _promoted(inputs, state, self.layers[0].input_kernel[...])
        return inputs, state, end

    def _sizes(self) -> jax.ShapeDtypeStruct:
        D, gates = self.layers[0].input_kernel.shape
        return jax.ShapeDtypeStruct((len(self.layers), D, gates // 3), self.layers[0].input_kernel.dtype)


def _promoted(*arrays: Array) -> list[Array]:
    """All arrays but the last, in the dtype to which all promote."""
    dtype = jnp.result_type(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays[:-1]]
