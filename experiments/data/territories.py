"""English names and their translations into another language, from Babel's Unicode CLDR data.

Run as `python -m experiments.data.territories territories.tsv`; `--help` lists other kinds of names
and how to choose the language.
"""

import argparse
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel import Locale, UnknownLocaleError

from experiments import exits_on_bad_input
from experiments.data.pairs import write_utf8

KINDS = ("territories", "languages", "scripts", "currencies", "variants", "time_zones")
# Pseudo-locales, and the codes for "unknown"
NOT_NAMED = {"XA", "XB", "ZZ", "XXX", "Zxxx", "Zzzz", "zxx", "und"}
MAX_CHARACTERS = 80


def names(kinds: Sequence[str] = ("territories",), target: str = "fr") -> list[tuple[str, str]]:
    """Pairs of names (English, other language), each pair once, sorted by code within a kind.

    Args:
      kinds: some of `KINDS`.
      target: a CLDR locale name.

    Raises:
      ValueError: an unknown kind or locale.

    Example:
      >>> ("Germany", "Allemagne") in names()
      True
      >>> pairs = names(["scripts", "time_zones"], "de")
      >>> [pair for pair in pairs if pair[0].startswith(("Cyrillic", "Acre Stand"))]
      [('Cyrillic', 'Kyrillisch'), ('Acre Standard Time', 'Acre-Normalzeit')]
    """
    try:
        english, other = Locale("en"), Locale.parse(target)
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(f"target must be a CLDR locale such as fr or zh_Hant: {error}") from None
    pairs = []
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {kind}")
        one, two = _of(english, kind), _of(other, kind)
        pairs += [(one[code], two[code]) for code in sorted((one.keys() & two.keys()) - NOT_NAMED)]
    return [
        pair
        for pair in dict.fromkeys(pairs)
        if all(0 < len(name) <= MAX_CHARACTERS for name in pair)
    ]


def _of(locale: Locale, kind: str) -> Mapping[str, str]:
    """Code → name. A time zone has up to three: for winter, for summer, and for both."""
    if kind != "time_zones":
        return getattr(locale, kind)
    zones: Mapping[str, Any] = locale.meta_zones
    return {
        f"{zone} {form}": name
        for zone in zones
        for form, name in (zones[zone].get("long") or {}).items()
    }


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tab-separated file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.territories", description=__doc__
    )
    parser.add_argument("file", type=Path, metavar="OUT.tsv")
    parser.add_argument(
        "--of", nargs="+", choices=KINDS, default=["territories"], help="default: territories"
    )
    parser.add_argument("--all", action="store_true", help=f"the same as --of {' '.join(KINDS)}")
    parser.add_argument("--to", default="fr", metavar="LOCALE", help="target language; default: fr")
    given = parser.parse_args(arguments)
    try:
        rows = names(KINDS if given.all else given.of, given.to)
    except ValueError as error:
        parser.error(str(error))
    text = "".join(f"{english}\t{other}\n" for english, other in rows)
    write_utf8(given.file, unicodedata.normalize("NFC", text))
    print(f"{given.file}: {len(rows)} pairs, English → {Locale.parse(given.to).english_name}")


if __name__ == "__main__":
    main()
