"""A table of weights: the rules between a Flax class and one way to name its weights in PyTorch."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jattn.interop.rules import Rule


@dataclasses.dataclass(frozen=True)
class Table:
    """The weights of a Flax class under the names of one PyTorch class, or of one convention.

    Args:
      names: whose names: a class (`"torch.nn.LSTM"`), or the tensors that tell them (`"W_q, W_o"`).
      rules: the weight table.
      spellings: old endings of names, each with that of today.
      ignored: endings of the names of tensors that hold nothing that is learned.
    """

    names: str
    rules: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def current(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors under the names of today, without those that are ignored."""
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if self.ignored and name.endswith(self.ignored):
                continue
            for old, new in self.spellings:
                if name.endswith(old):
                    name = name.removesuffix(old) + new
            if name in found:
                raise ValueError(f"{name} stands in the tensors in an old spelling, too")
            found[name] = tensor
        return found

    def knows(self, names: Iterable[str]) -> int:
        """How many of the names are known to it."""
        return sum(any(rule.takes(name) for rule in self.rules) for name in names)
