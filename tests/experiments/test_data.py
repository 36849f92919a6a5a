"""The data of the experiments: dates, territories, the reader of pairs, vocabulary and batches."""

import itertools
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from experiments import BadInput
from experiments.data import dates, pairs, territories
from experiments.data.batches import (
    END,
    PAD,
    START,
    UNKNOWN,
    Batches,
    Vocabulary,
    fixed_batches,
    pad,
)
from experiments.data.pairs import Pair


def test_dates_are_split_by_date_and_deterministic():
    train, test = dates.dates(31, 7, seed=3)
    assert not {pair.target for pair in train} & {pair.target for pair in test}
    assert len({pair.target for pair in train}) == 31 and len({pair.target for pair in test}) == 7
    assert (train, test) == dates.dates(31, 7, seed=3)
    assert train != dates.dates(31, 7, seed=4).train


def test_dates_come_in_many_languages_and_scripts():
    train, _ = dates.dates(97, 1, seed=0)
    scripts = {unicodedata.name(c).split()[0] for pair in train for c in pair.source if c.isalpha()}
    assert {"LATIN", "CYRILLIC", "GREEK", "CJK", "HANGUL"} <= scripts
    assert {pair.label for pair in train} == set(dates.LANGUAGES) and len(dates.LANGUAGES) >= 10
    assert all(re.fullmatch(r"(19|20)\d\d-[01]\d-[0-3]\d", pair.target) for pair in train)


def test_a_source_has_one_meaning():
    train, _ = dates.dates(499, 1, seed=0)
    meanings = {}
    for pair in train:
        assert meanings.setdefault(pair.source, pair.target) == pair.target


def test_territories_command_writes_a_file_that_the_reader_takes(tmp_path):
    path = tmp_path / "territories.tsv"
    command = [sys.executable, "-m", "experiments.data.territories", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = pairs.read_tsv(path)
    assert Pair("Germany", "Allemagne") in rows
    assert len(rows) == len(territories.names()) > 200


def test_other_names_in_other_languages(tmp_path, capsys):
    path = tmp_path / "names.tsv"
    territories.main([str(path), "--all", "--to", "zh"])
    rows = pairs.read_tsv(path)
    assert {
        Pair("Germany", "德国"),
        Pair("Gothic", "哥特语"),
        Pair("Swiss Franc", "瑞士法郎"),
    } <= set(rows)
    assert len(rows) == len(set(rows)) > 1700
    for bad, message in (("xx", "must be a CLDR locale"), ("-", "must be a CLDR locale")):
        with pytest.raises(SystemExit):
            territories.main([str(path), f"--to={bad}"])
        assert message in capsys.readouterr().err
    assert pairs.read_tsv(path) == rows
    with pytest.raises(SystemExit, match="No such file"):
        territories.main([str(tmp_path / "nothing" / "names.tsv")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b" \n\n", "empty file"),
        (b"a\tb\nno tab\nc\td\n", r":2: expected source<TAB>target, got 0 tabs"),
        (b"a\tb\tc\n", r":1: expected source<TAB>target, got 2 tabs"),
        (b"\n \r\n\xe2\x80\xaf\n\n", "empty file"),
        (b"\n \na\tb\nno tab\n", r":4: expected source<TAB>target, got 0 tabs"),
        (b"a\tb\n\t\nc\td\n", r":2: expected a source text, got none"),
        (b"\t\n", r":1: expected a source text, got none"),
        (b"a\tb\nc\t \n", r":2: expected a target text, got none"),
        (b"\tb\n", r":1: expected a source text, got none"),
        (b"a\tb\nc\t\xff\n", r":2: expected UTF-8 text, got byte 0xff"),
        (b"a\t" + b"b" * 501 + b"\n", r":1: expected a target of at most 500 characters, got 501"),
    ],
)
def test_bad_files_are_reported_with_the_line(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        pairs.read_tsv(path)


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"\n \r\na\tb\n\n\xe2\x80\xaf\nc\td\n \n\n")
    assert pairs.read_tsv(path) == [Pair("a", "b"), Pair("c", "d")]


def test_all_bad_lines_are_reported_together(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("good\tline\n" + "bad\n" * 13, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        pairs.read_tsv(path)
    assert [f":{i}:" in str(error.value) for i in (1, 2, 11, 12)] == [False, True, True, False]
    assert "and 3 more" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        pairs.read_tsv(tmp_path / "nothing.tsv")
    with pytest.raises(BadInput, match="directory"):
        pairs.read_tsv(tmp_path)


def test_reader_normalises_line_ends_byte_order_mark_and_accents(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffe\u0301te\u0301\t a\u202f b\r\nc\td".encode())
    assert pairs.read_tsv(path) == [Pair("\u00e9t\u00e9", "a b"), Pair("c", "d")]


def test_split_keeps_a_source_on_one_side():
    rows = [Pair(f"source {i % 41}", f"target {i}") for i in range(97)]
    train, test = pairs.split(rows, fraction=0.1, seed=5)
    assert not {pair.source for pair in train} & {pair.source for pair in test}
    assert sorted(train + test) == sorted(rows)
    assert len({pair.source for pair in test}) == 4
    again = pairs.split(rows[::-1], fraction=0.1, seed=5)
    assert sorted(again.test) == sorted(test)


def test_split_needs_two_sources():
    with pytest.raises(BadInput, match="at least 2 different sources"):
        pairs.split([Pair("a", "b"), Pair("a", "c")])
    assert [len(side) for side in pairs.split([Pair("a", "b"), Pair("c", "d")])] == [1, 1]


def test_vocabulary_round_trip_and_unknown_characters():
    vocabulary = Vocabulary.of(["3 мая", "日"])
    assert len(vocabulary) == 4 + 6
    assert vocabulary.decode(vocabulary.encode("мая 日")) == "мая 日"
    assert vocabulary.encode("x") == [UNKNOWN]
    assert vocabulary.decode([START, *vocabulary.encode("я?"), PAD, END, 5]) == "я\ufffd"


PAIRS = [Pair("x" * (1 + i % 11), "y" * (1 + i % 5) + str(i % 7)) for i in range(73)]


def batches(**options):
    source, target = Vocabulary.of("x"), Vocabulary.of("y0123456")
    return Batches(PAIRS, source, target, **{"batch_size": 13, "seed": 2, **options})


def test_batches_start_anywhere_in_the_same_order():
    whole = list(itertools.islice(batches()(0), 40))
    for step in (1, batches().per_epoch, 17):
        for left, right in zip(whole[step:], batches()(step), strict=False):
            for one, other in zip(left, right, strict=True):
                np.testing.assert_array_equal(one, other)


def test_an_epoch_visits_every_pair_in_few_shapes():
    stream = batches(num_buckets=3)
    epoch = list(itertools.islice(stream(0), stream.per_epoch))
    assert len({(batch.source.shape, batch.target_in.shape) for batch in epoch}) <= 3
    seen = {
        (int(length), tuple(row[:end]))
        for batch in epoch
        for length, row, end in zip(
            batch.source_lengths, batch.target_out, batch.target_lengths, strict=True
        )
    }
    target = Vocabulary.of("y0123456")
    assert seen == {(len(pair.source), (*target.encode(pair.target), END)) for pair in PAIRS}


def test_a_batch_pads_shifts_and_counts():
    batch = next(batches()(0))
    for i, (length, end) in enumerate(zip(batch.source_lengths, batch.target_lengths, strict=True)):
        assert (batch.source[i, :length] != PAD).all() and (batch.source[i, length:] == PAD).all()
        assert batch.target_in[i, 0] == START and batch.target_out[i, end - 1] == END
        np.testing.assert_array_equal(batch.target_in[i, 1:end], batch.target_out[i, : end - 1])
        assert (batch.target_in[i, end:] == PAD).all() and (batch.target_out[i, end:] == PAD).all()


def test_fewer_pairs_than_a_batch():
    stream = Batches(PAIRS[:2], Vocabulary.of("x"), Vocabulary.of("y01"), batch_size=7, seed=0)
    assert next(stream(0)).source.shape[0] == 7


def test_fixed_batches_have_one_shape_and_lose_nothing():
    rows = [list(range(4, 5 + i % 6)) for i in range(23)]
    parts = list(fixed_batches(rows, 7))
    assert {tokens.shape for tokens, _, _ in parts} == {(7, 6)}
    assert [
        list(tokens[i, : lengths[i]]) for tokens, lengths, count in parts for i in range(count)
    ] == rows


def test_pad_to_a_width():
    tokens, lengths = pad([[5], [7, 8]], 3)
    assert tokens.tolist() == [[5, 0, 0], [7, 8, 0]] and lengths.tolist() == [1, 2]
