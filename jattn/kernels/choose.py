"""Choose a kernel: the first in an order that does not refuse the request."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from jattn.kernels import blockwise, cudnn, decode, dense
from jattn.request import Request, Result


class Kernel(Protocol):
    """A way to compute a request: a module with these two functions."""

    def refuses(self, request: Request) -> str | None:
        """Why this kernel cannot do what is asked; None if it can."""

    def run(self, request: Request) -> Result:
        """Attention by this kernel; called where it does not refuse."""


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {"dense": dense, "blockwise": blockwise, "decode": decode, "cudnn": cudnn}
)
# blockwise comes first from this number of scores on. On two CPU cores, blockwise takes up to 1.3
# times as long as dense at 2**20 scores; from 2**21 on, dense takes 1.0 to 3.8 times as long
MANY_SCORES = 2**21
# Above this number of scores on a device, 0.5 GiB in float32, dense runs only by name
TOO_MANY_SCORES = 2**27


class Line(NamedTuple):
    """A line of the table: a kernel, and the reason why it cannot run; None: it can."""

    name: str
    refusal: str | None


Implementation = str | Sequence[str] | None


def table(request: Request, implementation: Implementation = None) -> list[Line]:
    """The kernels in the order in which they are asked; the first that does not refuse runs.

    Args:
      request: what is asked for.
      implementation: a kernel's name, an ordered tuple of names, or None for those of jattn alone.

    Raises:
      ValueError: a name that no kernel has.
    """
    if implementation is None:
        many = request.num_scores >= MANY_SCORES and not request.is_symbolic
        names = ["blockwise", "dense"] if many else ["dense", "blockwise"]
        names = ["decode"] * decode.is_fast(request) + names
        return [Line(name, _refusal(name, request, by_name=False)) for name in names]
    names = [implementation] if isinstance(implementation, str) else list(implementation)
    if not names or any(name not in KERNELS for name in names):
        must = f"implementation must be None, or one or several of {sorted(KERNELS)}"
        raise ValueError(f"{must}, got {implementation!r}")
    return [Line(name, _refusal(name, request, by_name=True)) for name in names]


def _refusal(name: str, request: Request, by_name: bool) -> str | None:
    by_default = not by_name and not request.return_weights
    if name in {"dense", "decode"} and by_default and request.num_scores > TOO_MANY_SCORES:
        return (
            f"{request.num_scores:,} scores would be held at once, over 2**27 on a device; if that "
            'is meant, say implementation="dense"'
        )
    return KERNELS[name].refuses(request)


def choose(request: Request, implementation: Implementation = None) -> str:
    """The name of the kernel that runs.

    Raises:
      NotImplementedError: every kernel asked refuses; names each and its reason.
    """
    lines = table(request, implementation)
    for name, refusal in lines:
        if refusal is None:
            return name
    reasons = "; ".join(f"{name}: {refusal}" for name, refusal in lines)
    raise NotImplementedError(f"no kernel can do what is asked. {reasons}")
