"""English → French names of countries, territories and regions, from the Unicode CLDR data that Babel carries.

Run as `python -m experiments.data.territories territories.tsv`.
"""

import sys
from pathlib import Path

from babel import Locale

NOT_A_PLACE = {"XA", "XB", "ZZ"}  # CLDR's two pseudo-locales and "unknown region"


def territories() -> list[tuple[str, str]]:
    """Every territory of CLDR as (English name, French name), sorted by its code.

    Example:
      >>> ("Germany", "Allemagne") in territories()
      True
    """
    english, french = Locale("en").territories, Locale("fr").territories
    codes = sorted((english.keys() & french.keys()) - NOT_A_PLACE)
    return [(english[code], french[code]) for code in codes]


def main() -> None:
    """Write the tab-separated file that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m experiments.data.territories OUT.tsv")
    path, rows = Path(sys.argv[1]), territories()
    path.write_text("".join(f"{english}\t{french}\n" for english, french in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} pairs, English → French")


if __name__ == "__main__":
    main()
