"""Recurrent networks and their cells: plain, LSTM and GRU."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.torch_reference.cases import Case, Inputs, cases_of
from experiments.torch_reference.shared import Outputs, run_packed


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's names of the options."""
    names = {
        "use_bias": "bias",
        "dropout_rate": "dropout",
        "proj_features": "proj_size",
        "activation": "nonlinearity",
    }
    return {names.get(name, name): value for name, value in options.items()}


def _outputs(state: Any) -> Outputs:
    """An LSTM's state is a pair."""
    parts = state if isinstance(state, tuple) else (state,)
    return dict(zip(("state", "cell"), parts, strict=False))


class Recurrent(nn.Module):
    """PyTorch's RNN (tanh or relu), LSTM or GRU."""

    def __init__(self, kind: str, in_features: int, hidden_features: int, **options: Any) -> None:
        super().__init__()
        network = getattr(nn, kind)
        options = _arguments(options)
        self.rnn = network(in_features, hidden_features, batch_first=True, **options)

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        cell: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Outputs:
        """x [B, T, D], state and an LSTM's cell [L · directions, B, F], lengths [B]."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            first = state if cell is None else (state, cell)
            output, last = run_packed(self.rnn, x, first, lengths)
        return {"output": output, **_outputs(last)}


class Cell(nn.Module):
    """PyTorch's RNNCell (tanh or relu), LSTMCell or GRUCell."""

    def __init__(self, kind: str, in_features: int, hidden_features: int, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(in_features, hidden_features, **_arguments(options))

    def forward(
        self, x: torch.Tensor, state: torch.Tensor, cell: torch.Tensor | None = None
    ) -> Outputs:
        """x [B, D], state and an LSTM's cell [B, F]."""
        return _outputs(self.rnn(x, state if cell is None else (state, cell)))


def cases() -> list[Case]:
    """Each network alone, two-way over padding, and without biases; each cell."""
    x: Inputs = {"x": (3, 11, 5)}
    padded: Inputs = x | {"lengths": np.array([4, 11, 1])}
    one: dict[str, Any] = {"in_features": 5, "hidden_features": 7}
    stack = one | {"num_layers": 2, "dropout_rate": 0.5}
    two = stack | {"bidirectional": True}
    gru, lstm, proj = {"kind": "GRU"}, {"kind": "LSTM"}, {"proj_features": 2}
    first: Inputs = {"state": (2, 3, 7)}
    pair: Inputs = {"state": (4, 3, 2), "cell": (4, 3, 7)}
    cases = cases_of(
        "recurrent/network",
        Recurrent,
        gru_two_layers=(gru | stack, x | first),
        gru_lengths_state=(gru | stack, padded | first),
        lstm_proj=(lstm | one | proj, x),
        lstm_proj_two_ways=(lstm | two | proj, padded | pair),
    )
    networks: dict[str, dict[str, Any]] = {
        "rnn": {"kind": "RNN"},
        "rnn_relu": {"kind": "RNN", "activation": "relu"},
        "lstm": lstm,
        "gru": gru,
    }
    for name, own in networks.items():
        parts = ["state", "cell"] if own == lstm else ["state"]
        states: Inputs = {part: (4, 3, 7) for part in parts}
        step: Inputs = {"x": (3, 5)} | {part: (3, 7) for part in parts}
        networks_of_kind = {
            name: (own | one, x),
            f"{name}_no_bias": (own | one | {"use_bias": False}, x),
            f"{name}_two_ways": (own | two, padded | states),
        }
        cell = own | one | {"kind": f"{own['kind']}Cell"}
        cases += cases_of("recurrent/network", Recurrent, **networks_of_kind)
        cases += cases_of("recurrent/cell", Cell, **{f"{name}_cell": (cell, step)})
    return cases
