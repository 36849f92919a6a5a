"""What is said of weights that do not fit."""

from collections.abc import Sequence


class ConversionError(ValueError):
    """Weights that do not fit: lists all that is missing, unused, ambiguous or unfit.

    Args:
      missing: targets that nothing fills, or parts that a rule still needs.
      unused: source tensors that no rule takes, or whose target does not exist.
      ambiguous: source tensors that several rules take, and targets that several rules fill.
      unfit: tensors whose shape, dtype or storage does not fit.
      hint: what may help.

    Example:
      >>> print(ConversionError(missing=["out.kernel"]))
      the weights do not fit
        missing: out.kernel
    """

    def __init__(
        self,
        *,
        missing: Sequence[str] = (),
        unused: Sequence[str] = (),
        ambiguous: Sequence[str] = (),
        unfit: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.missing, self.unused = tuple(missing), tuple(unused)
        self.ambiguous, self.unfit = tuple(ambiguous), tuple(unfit)
        self.hint = hint
        kinds = ("missing", "unused", "ambiguous", "unfit")
        lines = [f"  {kind}: {item}" for kind in kinds for item in getattr(self, kind)]
        lines += [f"  {hint}"] if hint else []
        super().__init__("\n".join(["the weights do not fit", *lines]))
