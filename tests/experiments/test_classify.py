"""A run end to end, on texts whose label no n-gram determines.

Then the reader, the split and the baseline.
"""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest

from experiments import BadInput, classify
from experiments.data import labelled, names
from experiments.data.labelled import Text
from experiments.data.ngrams import NaiveBayes
from experiments.training import class_pictures
from experiments.training.runs import Run

SETTINGS = [
    "--steps",
    "230",
    "--features",
    "16",
    "--batch-size",
    "61",
    "--learning-rate",
    "0.03",
    "--seed",
    "3",
    "--dropout",
    "0",
]
COLUMNS = ["--text-column", "word", "--label-column", "ends"]


def ends(word):
    """Whether the first and the last character are equal; only both together determine it."""
    return "alike" if word[0] == word[-1] else "different"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "words.csv"
    words = ["".join(word) for word in itertools.product("ηж", "12", "丁,5", "34", "12", "ηж")]
    words += [word[0] + "6" + word[1:] for word in words]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ends", "number", "word"])
        rows.writerows((ends(word), 3, word) for word in words)
    return path


@pytest.fixture(scope="module")
def finished_run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ends"
    classify.main(["--data", str(table), *COLUMNS, "--run-dir", str(folder), *SETTINGS])
    return Run(folder)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    return Run(tmp_path / "copy")


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        classify.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


def restored(run, table):
    checkpoint = run.checkpoints.newest()
    settings = classify.Settings.of(checkpoint.metadata)
    assert settings.data == table
    reader = classify.Reader.build(settings, checkpoint.metadata["known"])
    classify.restore(reader.model, checkpoint)
    return reader, classify.load(settings)


def test_attention_learns_what_the_baseline_cannot(finished_run):
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert scores["texts"] == 19
    assert scores["accuracy"] >= 0.94
    assert scores["naive_bayes"] <= 0.75 and scores["most_common"] <= 0.75
    for name in ("attention", "confusion", "curve"):
        assert (finished_run.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_held_out_texts(finished_run, table):
    reader, data = restored(finished_run, table)
    assert not {text.text for text in data.train} & {text.text for text in data.test}
    probabilities, weights = reader([text.text for text in data.test], batch_size=7)
    right = [
        reader.labels.names[p.argmax()] == ends(text.text)
        for p, text in zip(probabilities, data.test, strict=True)
    ]
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    for text, weight in zip(data.test, weights, strict=True):
        assert weight.shape == (len(text.text),)
        assert weight.sum() == pytest.approx(1, rel=1e-5)


def test_classify_with_the_checkpoint(finished_run, capsys):
    classify.main(["--classify", " ж1丁31η ", "--run-dir", str(finished_run.folder)])
    best, other = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (best[0], other[0]) == ("different", "alike") and float(best[1]) > float(other[1])


def test_classify_accepts_a_relative_path_of_the_same_file(
    finished_run, table, capsys, monkeypatch
):
    monkeypatch.chdir(table.parent)
    run = ("--run-dir", str(finished_run.folder))
    classify.main(["--classify", "ж1", "--data", table.name, *run])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert "--data other.csv differs" in fails(
        capsys, "--classify", "ж1", "--data", "other.csv", *run
    )


def test_classify_says_what_it_never_saw(finished_run, capsys):
    classify.main(["--classify", "ж1Ω", "--run-dir", str(finished_run.folder)])
    assert "never seen in training: Ω" in capsys.readouterr().err


def test_resumed_run_ends_in_the_same_bits(finished_run, copied_run):
    shutil.rmtree(copied_run.checkpoints.folder / "230")
    classify.main(["--resume", "--run-dir", str(copied_run.folder)])
    one, other = (run.checkpoints.newest() for run in (finished_run, copied_run))
    assert one.step == other.step == 230
    assert {path: array.tobytes() for path, array in one.arrays.items()} == {
        path: array.tobytes() for path, array in other.arrays.items()
    }
    assert copied_run.metrics.read() == finished_run.metrics.read()


def test_other_settings_or_data_than_the_checkpoints(finished_run, table, tmp_path, capsys):
    resume = ("--resume", "--run-dir", finished_run.folder)
    for option, value, own in (
        ("features", 31, 16),
        ("seed", 4, 3),
        ("text-column", "number", "word"),
    ):
        message = fails(capsys, *resume, f"--{option}", value)
        assert f"--{option} {value} differs from the checkpoint's, {own}" in message
    other = tmp_path / "other.csv"
    other.write_text(table.read_text(encoding="utf-8") + "alike,3,ж7ж\n", encoding="utf-8")
    assert "--data gives other texts" in fails(capsys, *resume, "--data", other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a header and lines of texts with labels, got no such line"),
        ("text,label\n", "expected a header and lines of texts with labels, got no such line"),
        ("txt,label\na,b\n", "there is no column 'text' (--text-column), only txt, label"),
        ("text,lang\na,b\n", "there is no column 'label' (--label-column), only text, lang"),
        ("text,label\na,b\nc\n", ":3: expected a text and a label, got no label"),
        ("text,label\na, b,c\n", ":2: expected as many columns as the header has, got more"),
        ("text,label\n , b\nc,d\n", ":2: expected a text and a label, got no text"),
        (f"text,label\n{'a' * 501},b\n", ":2: expected a text of at most 500 characters, got 501"),
        ('text,label\n"a,b\n', "unexpected end of data"),
        ("text,label\na,b\n", "expected at least 2 different texts (one to hold out), got 1"),
        ("text,label\na,b\nc,b\n", "expected texts of at least 2 labels to train on, got 1"),
        (
            "text,label\na,b\na,c\nd,b\nd,c\n",
            "expected texts of at least 2 labels to train on, got 0",
        ),
    ],
)
def test_nothing_is_made_of_a_bad_file(tmp_path, capsys, content, message):
    path, folder = tmp_path / "bad.csv", tmp_path / "run"
    path.write_text(content, encoding="utf-8")
    assert message in fails(capsys, "--data", path, "--run-dir", folder)
    assert not folder.exists()


def test_unreadable_files(tmp_path, capsys):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"text,label\n\xff,b\n")
    assert "expected UTF-8 text, got byte 0xff" in fails(capsys, "--data", binary)
    assert "No such file" in fails(capsys, "--data", tmp_path / "nothing.csv")
    assert "Is a directory" in fails(capsys, "--data", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--learning-rate", "inf", "must be finite and positive, got inf"),
        ("--dropout", "1", "must lie in [0, 1), got 1.0"),
        ("--seed", "-2", "must be at least 0, got -2"),
        ("--classify", "", "must be a text of 1 to 500 characters, got 0"),
    ],
)
def test_bad_options(finished_run, capsys, option, value, message):
    run = ["--run-dir", finished_run.folder] if option == "--classify" else []
    shown = " ".join(fails(capsys, f"{option}={value}", *run).replace("│", " ").split())
    assert message in shown and option in shown


def test_a_tab_separated_file_has_no_quotes(tmp_path):
    path = tmp_path / "quotes.tsv"
    path.write_text('\ufefflabel\ttext\nx\t"a,\u00a0b\ny\tc\n', encoding="utf-8")
    assert labelled.read_table(path, text_column="text", label_column="label") == [
        Text('"a, b', "x", '"a, b'),
        Text("c", "y", "c"),
    ]


def test_a_label_that_is_only_held_out():
    texts = [Text(word, "x" if word < "g" else "y", word) for word in "abcdefgh"] + [
        Text("z", "once", "z")
    ]
    with pytest.raises(BadInput, match="only held-out texts have the label 'once'"):
        for seed in range(100):
            labelled.split(texts, fraction=0.2, seed=seed)


def test_names_are_split_by_what_they_name():
    texts = names.names()
    train, test, ambiguous = labelled.split(texts, fraction=0.1, seed=0)
    assert {text.label for text in train} == {text.label for text in test} == set(names.LANGUAGES)
    assert not {text.group for text in train} & {text.group for text in test}
    assert not {text.text for text in train} & {text.text for text in test}
    labels = {}
    for text in texts:
        labels.setdefault(text.text, set()).add(text.label)
    both = {text.text for text in [*train, *test]}
    assert all(labels[text.text] == {text.label} for text in [*train, *test])
    assert {name for name in labels if name not in both} == {
        name for name in labels if len(labels[name]) > 1
    }
    assert len(labels) == len(both) + ambiguous
    assert (train, test, ambiguous) == labelled.split(texts[::-1], fraction=0.1, seed=0)


def test_names_come_in_many_scripts_and_in_close_languages():
    texts = names.names()
    scripts = {
        unicodedata.name(character).split()[0] for text in texts for character in text.text[:1]
    }
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "CJK", "HANGUL", "KATAKANA"} <= scripts
    assert min(Counter(text.label for text in texts).values()) > 900 and len(names.LANGUAGES) >= 20


def test_names_command_writes_a_file_that_the_reader_takes(tmp_path):
    path = tmp_path / "names.tsv"
    subprocess.run(
        [sys.executable, "-m", "experiments.data.names", str(path)], check=True, capture_output=True
    )
    rows = labelled.read_table(path, text_column="text", label_column="label")
    assert [row[:2] for row in rows] == [row[:2] for row in names.names()]


def test_naive_bayes_is_that_of_a_loop():
    train = [Text("aba", "x", ""), Text("bb", "x", ""), Text("bca", "y", "")]
    baseline = NaiveBayes(train, longest=2, smoothing=0.5)

    def grams(text):
        return [*text, *(a + b for a, b in itertools.pairwise(text))]

    counts = {
        label: Counter(g for t in train if t.label == label for g in grams(f"\n{t.text}\n"))
        for label in "xy"
    }
    known = set(counts["x"]) | set(counts["y"])
    for text in ("ab", "cb", "da", ""):
        scores = []
        for label, share in (("x", 2 / 3), ("y", 1 / 3)):
            total = sum(counts[label].values()) + 0.5 * len(known)
            likelihoods = [
                (counts[label][gram] + 0.5) / total
                for gram in grams(f"\n{text}\n")
                if gram in known
            ]
            scores.append(np.log(share) + np.log(likelihoods).sum())
        np.testing.assert_allclose(baseline._scores(text), scores, rtol=1e-12)
        assert baseline([text]) == ["xy"[np.argmax(scores)]]


def test_examples_are_one_of_each_label():
    test = [Text("a" * length, label, "") for label in "xyz" for length in (1, 5, 31)]
    assert sorted(classify.examples(test, 0)) == [1, 4, 7]


def test_pictures_of_many_labels_and_strange_texts(tmp_path):
    counts = np.diag(np.arange(50.0))
    class_pictures.confusion(
        counts, [f"$label$ {i} क" for i in range(50)], tmp_path / "confusion.png"
    )
    rows = [
        class_pictures.Strip(f"$x${text[0]}", text, np.full(len(text), 1 / len(text)))
        for text in ("$a क", "ابج")
    ]
    class_pictures.strips(rows, tmp_path / "strips.png")
    class_pictures.strips([], tmp_path / "none.png")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "strips.png"}
