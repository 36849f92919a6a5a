"""Dates in eighteen languages, from Babel's Unicode CLDR data, and their ISO form."""

import datetime
import random
from collections.abc import Sequence

from babel.dates import format_date

from experiments.data.pairs import Pair, Split, normalise

LATIN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "pl", "cs", "fi", "tr")
LANGUAGES = (*LATIN, "ru", "uk", "el", "ja", "zh", "ko")
STYLES = ("medium", "long", "full")
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


def dates(
    num_train: int, num_test: int, *, seed: int = 0, languages: Sequence[str] = LANGUAGES
) -> Split:
    """Pairs such as ("mardi 9 mars 2021", "2021-03-09"); no test date is in the training pairs.

    Args:
      num_train: number of dates to train on; each is written in every language and style.
      num_test: number of held-out dates.
      seed: decides the dates, which are uniform over the years 1900 to 2099.
      languages: CLDR locale names; they become the labels of the pairs.

    Returns:
      The split; a pair that two styles of a language share is in it once.
    """
    days = random.Random(seed).sample(range((LAST - FIRST).days + 1), num_train + num_test)
    chosen = [FIRST + datetime.timedelta(days=day) for day in days]
    return Split(_write(chosen[:num_train], languages), _write(chosen[num_train:], languages))


def _write(chosen: list[datetime.date], languages: Sequence[str]) -> list[Pair]:
    written = (
        Pair(normalise(format_date(date, style, locale=language)), date.isoformat(), language)
        for date in chosen
        for language in languages
        for style in STYLES
    )
    return list(dict.fromkeys(written))
