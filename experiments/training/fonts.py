"""Fonts from Python packages, so that every machine draws pictures with all glyphs."""

from importlib.util import find_spec
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

CJK = ("Noto Sans CJK JP", "notojp_matplotlib", "fonts/NotoSansCJKjp-Regular.otf")


def family() -> list[str]:
    """Font names, preferred first: DejaVu Sans (Matplotlib), Noto Sans CJK (notojp-matplotlib).

    Only the file of the second is registered: an import of its package would change the font of
    every later picture.
    """
    name, package, file = CJK
    known = {font.name for font in font_manager.fontManager.ttflist}
    spec = find_spec(package)
    if name not in known and spec and spec.origin:
        font_manager.fontManager.addfont(Path(spec.origin).parent / file)
        known.add(name)
    return [font for font in ("DejaVu Sans", name) if font in known]


def glyphs() -> set[str]:
    """Every character that `family()` can draw."""
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in family()]
    return {chr(code) for path in paths for code in FT2Font(path).get_charmap()}


def readable(text: str, drawable: set[str]) -> str:
    """The text with every character that has no glyph written as its code point.

    Example:
      >>> readable("aก", {"a"})
      'aU+0E01'
    """
    return "".join(
        character if character in drawable else f"U+{ord(character):04X}" for character in text
    )
