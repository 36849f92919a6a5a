"""A run end to end, on a language in which counts of neighbours do not tell a hidden word."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import pretrain_bert
from experiments.training.runs import Run
from jattn.models.pretraining import IGNORED

SETTINGS = "--steps 600 --features 32 --layers 2 --heads 2 --length 48 --vocabulary 120 --seed 3"
SETTINGS += " --learning-rate 0.003 --dropout 0 --batch-size 32"


def sentence(words, draw):
    """Four words, and the same again: the other half tells what is hidden."""
    half = " ".join(draw.choices(words, k=4))
    return f"{half.capitalize()} then {half}."


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Each section is about one of five subjects, so that a sentence tells what may follow."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("data") / "text.txt"
    subjects = [[a + b + c for b in "aeiou" for c in "lm"] for a in "bdfgk"]
    sections = [" ".join(sentence(subjects[i % 5], draw) for _ in range(45)) for i in range(40)]
    path.write_text("\n\n".join(sections), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bert"
    pretrain_bert.main(["--data", str(text), "--run-dir", str(folder), *SETTINGS.split()])
    return Run(folder)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        pretrain_bert.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.mark.slow
def test_it_guesses_more_than_counts_and_tells_what_follows(finished_run):
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert scores["words"] > scores["neighbours"] + 0.1 > scores["most_frequent"] + 0.1
    assert scores["next"] > scores["same_answer"] + 0.1
    rows = finished_run.metrics.read()
    assert [row["step"] for row in rows if "validation" in row] == [200, 400, 600]
    assert (finished_run.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_checkpoint_fills_in_a_hidden_word(finished_run, capsys):
    run = ["--run-dir", str(finished_run.folder)]
    pretrain_bert.main(["--fill", "Bal bem bil bol then bal [MASK] bil bol.", *run])
    first = capsys.readouterr().out.splitlines()[0].split("\t")
    assert first[:2] == ["1", "bem"] and float(first[2]) > 0.5
    assert "expected a text with [MASK] in it" in fails(capsys, "--fill", "bal", *run)
    assert "48 are the most" in fails(capsys, "--fill", "[MASK]" + " bal" * 60, *run)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(finished_run, tmp_path):
    copy = Run(tmp_path / "copy")
    shutil.copytree(finished_run.folder, copy.folder)
    shutil.rmtree(copy.checkpoints.folder / "600")
    pretrain_bert.main(["--resume", "--run-dir", str(copy.folder)])
    one, other = finished_run.checkpoints.newest(), copy.checkpoints.newest()
    assert all(
        array.tobytes() == other.arrays[path].tobytes() for path, array in one.arrays.items()
    )
    assert copy.metrics.read() == finished_run.metrics.read()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--bfloat16", "--accumulate 4 --remat"])
def test_it_learns_in_half_precision_and_in_parts(text, tmp_path, options):
    arguments = ["--data", str(text), "--run-dir", str(tmp_path / "run"), *SETTINGS.split()]
    pretrain_bert.main([*arguments, *options.split(), "--steps", "200"])
    rows = Run(tmp_path / "run").metrics.read()
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


SENTENCES = [[[7, 8, 9], [8, 9], [9, 7, 8, 10]], [[10, 7], [11, 12, 7, 8]], [[8] * 30, [9] * 30]]
SMALL = pretrain_bert.Settings(length=16, batch_size=4, heads=2, features=8)


def test_batches_of_a_step_are_the_same_wherever_one_begins():
    batches = pretrain_bert.Batches(SENTENCES, SMALL, 13)
    whole = [next(stream) for stream in [batches(0)] for _ in range(5)]
    for step in range(5):
        again = next(batches(step))
        assert all(np.array_equal(a, b) for a, b in zip(whole[step], again, strict=True))
    assert not np.array_equal(whole[0].words, whole[1].words)


def test_hidden_words_are_those_that_stood_there():
    batches = pretrain_bert.Batches(SENTENCES, SMALL, 13)
    pairs = [([7, 8, 9], [10, 11])]
    batch = batches.hidden(pairs, np.array([1], np.int32), jax.random.key(0))
    packed = [2, 7, 8, 9, 3, 10, 11, 3]
    for place, word in zip(batch.places[0], batch.words[0], strict=True):
        if word != IGNORED:
            assert packed[place] == word
            packed[place] = batch.tokens[0, place]
    assert batch.tokens[0, :8].tolist() == packed
    assert batch.types[0, :8].tolist() == [0] * 5 + [1] * 3


def test_what_is_evaluated_does_not_depend_on_the_batches_of_training(monkeypatch):
    other = dataclasses.replace(SMALL, batch_size=3)
    one, two = (pretrain_bert.Batches(SENTENCES, each, 13).evaluation() for each in (SMALL, other))
    ((batch, count),) = one
    assert count == 3 * 4 and len(batch.tokens) == 32  # three drawings of four pairs
    assert all(np.array_equal(a, b) for a, b in zip(batch, two[0][0], strict=True))
    monkeypatch.setattr(pretrain_bert, "EVALUATION_BATCH", 5)
    parts = pretrain_bert.Batches(SENTENCES, SMALL, 13).evaluation()
    assert [count for _, count in parts] == [5, 5, 2]


def test_a_count_guesses_the_word_that_stood_between_the_same_two():
    train = [[[5, 6, 7], [5, 8, 9], [10, 6, 7], [6, 11]]]
    tokens = np.array([[2, 5, 4, 7, 3, 4, 6, 3], [2, 4, 11, 6, 3, 6, 9, 3]], np.int32)
    places, words = np.array([[2, 5], [1, 3]]), np.array([[6, 5], [6, 6]])  # one left as it was
    follows, types = np.array([0, 1]), np.array([[0] * 5 + [1] * 3] * 2)
    batch = pretrain_bert.Batch(tokens, types, np.array([8, 8]), follows, places, words)
    found = pretrain_bert.baselines(train, [(batch, 2)], [(batch, 2)])
    assert pretrain_bert.masked(batch, 2).tolist() == [[True, True], [True, False]]
    assert pretrain_bert.masked(batch, 1).tolist() == [[True, True], [False, False]]
    assert found["neighbours"] == 1.0
    assert found["most_frequent"] == pytest.approx(2 / 3)
    assert found["same_answer"] == 0.5


def test_words_in_common_tell_what_follows_where_they_do():
    tokens = np.array([[2, 5, 6, 3, 6, 5, 3, 0], [2, 5, 6, 3, 7, 8, 3, 0]], np.int32)
    types, follows = np.array([[0, 0, 0, 0, 1, 1, 1, 0]] * 2), np.array([0, 1])
    none = np.full((2, 1), IGNORED)
    batch = pretrain_bert.Batch(tokens, types, np.array([7, 7]), follows, none * 0, none)
    common, found = pretrain_bert.in_common([(batch, 2)])
    assert common.tolist() == [2, 0] and found.tolist() == [0, 1]


def test_a_text_without_sentences(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join([word] * 400) for word in ("some", "more", "words")))
    message = fails(capsys, "--data", path, "--run-dir", tmp_path / "run")
    assert "expected sections of several passages of 16 tokens" in message
    assert not (tmp_path / "run").exists()


def test_a_run_of_several_stages_is_of_another_experiment(capsys, tmp_path):
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    run = Run(tmp_path / "multi-head")
    run.checkpoints.save(3, state, {"experiment": "language_model"})
    message = fails(capsys, "--resume", "--run-dir", tmp_path)
    assert "is not a run of this experiment, pretrain_bert" in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--hide 0", "--hide must be more than 0"),
        ("--dropout 1", "--dropout must lie in [0, 1), got 1.0"),
        ("--features 30", "--features must be an even multiple of --heads 4, got 30"),
        ("--accumulate 5", "--accumulate 5 must divide --batch-size 32"),
        ("--length 7", "--length must be at least 8, got 7"),
        ("--fill x --resume", "give --resume or --fill, not both"),
        ("--data no.txt", "no.txt: No such file"),
        ("--fill \udcff", "--fill must be UTF-8 text"),
        ("--fill a[mask]", "expected a text with [MASK] in it, got 'a[mask]'"),
    ],
)
def test_bad_options(capsys, tmp_path, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *option.split())
    assert not list(tmp_path.iterdir())
