"""What a case is, and the inputs that many cases share.

Sizes are distinct primes where they can be, so that swapped axes cannot pass.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

B, T, S, H, V = 2, 5, 7, 3, 11
Inputs = dict[str, Any]
QUERY_KEY_VALUE: Inputs = {"query": (B, T, H), "key": (B, S, H), "value": (B, S, V)}
LENGTHS = np.array([3, 7])
LENGTHS_PER_QUERY = np.array([[3, 1, 7, 2, 5], [0, 4, 6, 7, 0]])


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference, what it is built with and what it is given.

    Args:
      system: slug of the system, `"family/system"`.
      name: name of the case within the family.
      reference: builds the module from the arguments.
      arguments: what the reference, and the port too, is built with.
      inputs: name → shape of normal numbers to draw, or an array of integers or booleans.
      draw: which draw of weights and inputs; not the first, where that puts the input of a ReLU
        closer to 0 than half precision tells, so that the gradient is a matter of luck.
    """

    system: str
    name: str
    reference: Callable[..., nn.Module]
    arguments: dict[str, Any]
    inputs: Mapping[str, tuple[int, ...] | np.ndarray]
    draw: int = 0

    @property
    def file_name(self) -> str:
        """The fixture's file: a folder for each family."""
        return f"{self.system.split('/')[0]}/{self.name}.safetensors"

    @property
    def seed(self) -> int:
        """A seed of its own, so that adding a case changes no other."""
        return zlib.crc32(self.file_name.encode()) + self.draw


def ids(*lists: list[int]) -> np.ndarray:
    """Token or segment ids [B, T]."""
    return np.array(lists)


def cases_of(
    system: str,
    reference: Callable[..., nn.Module],
    **cases: tuple[Any, ...],
) -> list[Case]:
    """The cases of a system by their names, each with its arguments, inputs and perhaps a draw."""
    return [Case(system, name, reference, *given) for name, given in cases.items()]
