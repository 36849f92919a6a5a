"""A table of weights: the rules between a Flax class and one way to name its weights in PyTorch."""

import dataclasses
from collections.abc import Iterable

from jattn.interop.rules import Rule


@dataclasses.dataclass(frozen=True)
class Table:
    """The weights of a Flax class under the names of one PyTorch class, or of one convention.

    Args:
      names: whose names: a class (`"torch.nn.LSTM"`), or the tensors that tell them (`"W_q, W_o"`).
      rules: the weight table.
    """

    names: str
    rules: tuple[Rule, ...]

    def knows(self, names: Iterable[str]) -> int:
        """How many of the names are known to it."""
        return sum(any(rule.takes(name) for rule in self.rules) for name in names)
