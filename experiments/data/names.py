"""Names of territories, languages and currencies in many languages, from Babel's CLDR data.

Run as `python -m experiments.data.names names.tsv`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from babel import Locale

from experiments import exits_on_bad_input
from experiments.data.labelled import Text
from experiments.data.pairs import normalise, write_utf8

CLOSE = (
    ("da", "nb", "sv"), ("en", "de", "nl"), ("es", "pt", "gl", "ca"), ("fr", "it"),
    ("cs", "sk", "pl"), ("hr", "sl"),
    ("fi", "et"), ("id", "ms"), ("ru", "uk", "be", "bg", "mk", "sr"), ("ar", "fa"), ("zh", "ja"),
)  # fmt: skip
LANGUAGES = (*(language for group in CLOSE for language in group), "tr", "el", "ko")
"""Close languages are side by side; the last three have none. Pictures can draw every script."""


def names(languages: Sequence[str] = LANGUAGES) -> list[Text]:
    """Every name; its label is its language, its group what it names, such as `territories/DE`.

    Example:
      >>> Text("Saksa", "fi", "territories/DE") in names(["fi"])
      True
    """
    return [
        Text(normalise(name), language, f"{kind}/{code}")
        for language in languages
        for kind in ("territories", "languages", "currencies")
        for code, name in sorted(getattr(Locale(language), kind).items())
    ]


@exits_on_bad_input
def main() -> None:
    """Write the tab-separated file that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m experiments.data.names OUT.tsv")
    path, rows = Path(sys.argv[1]), names()
    lines = ["text\tlabel\tgroup", *("\t".join(row) for row in rows)]
    write_utf8(path, "\n".join(lines) + "\n")
    print(f"{path}: {len(rows)} names in {len(LANGUAGES)} languages")


if __name__ == "__main__":
    main()
