"""Fonts from Python packages, so that every machine draws pictures with all glyphs.

Matplotlib shapes and orders the letters of a whole text. `cells` and `visual_order` do so for a
text with a place for each character.
"""

import functools
import re
import unicodedata
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

CJK = ("Noto Sans CJK JP", "notojp_matplotlib", "fonts/NotoSansCJKjp-Regular.otf")
JOINER, MARK_LEFT, MARK_RIGHT = "\u200d", "\u200e", "\u200f"  # ZWJ, LRM, RLM
EMBED_RIGHT, POP = "\u202b", "\u202c"  # RLE, PDF
# One letter for each class of `unicodedata.bidirectional` that has rules; a space for the others.
CLASSES = {"": "l", "L": "l", "R": "r", "AL": "a", "EN": "e", "AN": "n"} | {
    "ES": "-", "CS": ",", "ET": "%"
}  # fmt: skip
BRACKETS = {"(": ")", "[": "]", "{": "}"}


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


def cells(text: str, drawable: set[str]) -> list[str]:
    """What to draw for each character of a text, each in a place of its own.

    An Arabic letter has the form that it has in its word, a bracket opens in the direction of the
    text, a space is visible, and a character without a glyph is written as its code point.

    Example:
      >>> cells("بد", {"ب", "د"}) == ["ب" + JOINER, JOINER + "د"]  # initial, final
      True
    """
    shown = [readable("␣" if character == " " else character, drawable) for character in text]
    for i, level in enumerate(_levels(text)):
        if level % 2 and unicodedata.mirrored(text[i]) and text[i] in drawable:
            shown[i] = MARK_RIGHT + shown[i]
    letters = [i for i, character in enumerate(text) if not unicodedata.combining(character)]
    for i, j in pairwise(letters):
        if "<initial>" in _forms(text[i]) and "<final>" in _forms(text[j]):
            if text[i] in drawable:
                shown[i] = shown[i] + JOINER
            if text[j] in drawable:
                shown[j] = JOINER + shown[j]
    return shown


@functools.cache
def _forms(character: str) -> set[str]:
    """The forms of a letter: all, `<final>` and `<isolated>`, `<isolated>`, or none.

    Some letters have no forms in Unicode: ڕ, for one, then has those of its base, ر.
    """
    if character in ("ـ", JOINER):
        return {"<initial>", "<final>"}
    letter = unicodedata.normalize("NFD", character)[0]
    name = unicodedata.name(letter, "").partition(" WITH ")[0]
    if letter in _all_forms() or not name.startswith("ARABIC LETTER "):
        return _all_forms().get(letter, set())
    try:
        base = unicodedata.lookup(f"ARABIC LETTER {name.split()[-1]}")
    except KeyError:
        return set()
    return _all_forms().get(base, set())


@functools.cache
def _all_forms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for character in map(chr, range(0xFB50, 0xFF00)):  # Arabic Presentation Forms-A and -B
        form, *letters = unicodedata.decomposition(character).split() or [""]
        if len(letters) == 1:
            found.setdefault(unicodedata.normalize("NFKD", character)[0], set()).add(form)
    return found


def visual_order(text: str) -> list[int]:
    """The places of the characters of one line, as they stand from left to right.

    These are the rules of Unicode (https://www.unicode.org/reports/tr9), those for explicit
    embeddings excepted. The first letter gives the direction of the line.

    Example:
      >>> visual_order("אב 12")
      [3, 4, 2, 1, 0]
    """
    levels = _levels(text)
    order = list(range(len(text)))
    for least in (2, 1):
        order = [
            i
            for high, run in groupby(order, [level >= least for level in levels].__getitem__)
            for i in (reversed(list(run)) if high else run)
        ]
    return order


def is_right_to_left(text: str) -> bool:
    """Whether the first letter is one that is written from right to left.

    Example:
      >>> is_right_to_left("3 במאי"), is_right_to_left("mai 3 במאי"), is_right_to_left("3")
      (True, False, False)
    """
    classes = map(unicodedata.bidirectional, text)
    return next((each for each in classes if each in ("L", "R", "AL")), "L") != "L"


def embedded(text: str) -> str:
    """The text with marks, where it needs them to stand in a line from left to right.

    Example:
      >>> embedded("May 3")
      'May 3'
      >>> [unicodedata.name(mark) for mark in embedded("מאי")[:2]]
      ['LEFT-TO-RIGHT MARK', 'RIGHT-TO-LEFT EMBEDDING']
    """
    if not is_right_to_left(text):
        return text
    return f"{MARK_LEFT}{EMBED_RIGHT}{text}{POP}{MARK_LEFT}"


def _levels(text: str) -> list[int]:
    """The level of each character: odd runs from right to left, within what has a lower level."""
    base = "r" if is_right_to_left(text) else "l"
    kinds = ""
    for kind in map(unicodedata.bidirectional, text):
        belongs = kind in ("NSM", "BN")  # to the character before it
        kinds += (kinds[-1:] or base) if belongs else CLASSES.get(kind, " ")
    kinds = _neutral_resolved(text, _numbers_resolved(kinds, base), base)
    levels = {"l": 0 if base == "l" else 2, "r": 1, "e": 2, "n": 2}
    return [levels[kind] for kind in kinds]


def _numbers_resolved(kinds: str, base: str) -> str:
    """The rules W2 to W7: a number after Arabic is Arabic; one after Latin belongs to it."""
    kinds = re.sub("a[^lr]*", lambda run: run[0].replace("e", "n"), kinds).replace("a", "r")
    kinds = re.sub("(?<=e)[-,](?=e)", "e", kinds)
    kinds = re.sub("(?<=n),(?=n)", "n", kinds)
    kinds = re.sub("%+(?=e)|(?<=e)%+", lambda run: "e" * len(run[0]), kinds)
    kinds = re.sub("[-,%]", " ", kinds)
    start = "^|l" if base == "l" else "l"
    return re.sub(f"(?:{start})[^r]*", lambda run: run[0].replace("e", "l"), kinds)


def _neutral_resolved(text: str, kinds: str, base: str) -> str:
    """The rules N0 to N2: brackets go with what is in them, other signs with what is around."""
    for start, end in _brackets(text):
        sides = kinds.replace("e", "r").replace("n", "r")
        if inside := set(sides[start:end]) - {" "}:
            before = (base + sides[:start]).rstrip()[-1]
            side = base if base in inside else before
            kinds = f"{kinds[:start]}{side}{kinds[start + 1 : end]}{side}{kinds[end + 1 :]}"

    def resolved(run: re.Match[str]) -> str:
        sides = f"{base}{kinds}"[run.start()], f"{kinds}{base}"[run.end()]
        before, after = ("l" if side == "l" else "r" for side in sides)
        return (before if before == after else base) * len(run[0])

    return re.sub(" +", resolved, kinds)


def _brackets(text: str) -> list[tuple[int, int]]:
    """The places of brackets that open, in their order, and of those that close them."""
    opened: list[int] = []
    pairs = []
    for i, character in enumerate(text):
        if character in BRACKETS:
            opened.append(i)
        for start in reversed(opened):
            if BRACKETS[text[start]] == character:
                pairs.append((start, i))
                del opened[opened.index(start) :]
                break
    return sorted(pairs)
