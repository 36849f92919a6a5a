"""What is said of weights that do not fit, and of files that cannot be read."""

from collections.abc import Sequence


class FileError(ValueError):
    """A file that is broken, hostile or not of its kind: names it, and says what is wrong.

    Example:
      >>> raise FileError("model.safetensors is no safetensors file")
      Traceback (most recent call last):
      jattn.interop.errors.FileError: model.safetensors is no safetensors file
    """


class ConversionError(ValueError):
    """Weights that do not fit: lists all that is missing, unused, ambiguous or unfit.

    Args:
      missing: targets that nothing fills, or parts that a rule still needs.
      unused: source tensors that no rule takes, or whose target does not exist.
      ambiguous: source tensors that several rules take, and targets that several rules fill.
      unfit: tensors whose shape, dtype or storage does not fit.
      suggestions: of names that are near, and of layouts that would fit; a few, or none.
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
        suggestions: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        self.missing, self.unused = tuple(missing), tuple(unused)
        self.ambiguous, self.unfit = tuple(ambiguous), tuple(unfit)
        self.suggestions, self.hint = tuple(suggestions), hint
        kinds = ("missing", "unused", "ambiguous", "unfit")
        lines = [f"  {kind}: {item}" for kind in kinds for item in getattr(self, kind)]
        lines += [f"  perhaps: {item}" for item in self.suggestions]
        lines += [f"  {hint}"] if hint else []
        super().__init__("\n".join(["the weights do not fit", *lines]))
