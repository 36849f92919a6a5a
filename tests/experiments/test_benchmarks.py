"""The benchmark compares like with like, and shows all that it measured."""

import importlib
import json
import typing

import numpy as np
import pytest
from einops import rearrange

from experiments.benchmarks import attend, cases, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.contenders import LeftOut

KINDS = typing.get_args(cases.Kind)
SIZES = {"B": 2, "T": 41, "N": 6, "K": 6, "H": 5, "window": 7}


def toy(kind, what="forward"):
    return Case(
        **{**SIZES, **({"N": 1, "K": 1} if kind == "additive" else {})}, kind=kind, what=what
    )


def result(name, case):
    """Output and gradients, heads after length, or None where the contender is left out."""
    try:
        found = attend.build(name, case)()
    except LeftOut:
        return None
    output, gradients = found if case.backward else (found, ())
    arrays = [
        np.asarray(array.detach() if name == "PyTorch" else array) for array in (output, *gradients)
    ]
    return [
        rearrange(x, "b n t h -> b t n h") if name == "PyTorch" and x.ndim == 4 else x
        for x in arrays
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_contenders_compute_the_same(kind):
    case = toy(kind, "forward+backward" if kind in ("causal", "additive") else "forward")
    names = {"dense", "PyTorch"} | ({"jax.nn"} if kind != "additive" else set())
    left_out = {"PyTorch", "jax.nn"} if kind == "soft cap" else set()
    expected = result("blockwise", case)
    for name in names:
        found = result(name, case)
        assert (found is None) <= (name in left_out or name == "PyTorch"), name
        for ours, theirs in zip(expected, found or expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"additive"}))
def test_operations_are_those_of_the_scores_that_the_mask_leaves(kind):
    case = toy(kind)
    ids, real = cases.documents(case), cases.lengths(case)
    rules = {
        "full": lambda b, i, j: True,
        "window": lambda b, i, j: i - case.window <= j <= i,
        "documents": lambda b, i, j: j <= i and ids[i] == ids[j],
        "padding": lambda b, i, j: j < real[b],
    }
    rule = rules.get(kind, lambda b, i, j: j <= i)
    scores = sum(
        bool(rule(b, i, j)) for b in range(case.B) for i in range(case.T) for j in range(case.T)
    )
    assert case.operations == 4 * scores * case.N * case.H


@pytest.mark.slow
def test_every_group_is_shown_and_written(tmp_path, monkeypatch, capsys):
    small = {
        name: cases.Group(
            group.title, group.columns, (toy(group.cases[0].kind, group.cases[0].what),), group.ours
        )
        for name, group in cases.GROUPS.items()
        if name != "memory"
    }
    monkeypatch.setattr(cases, "GROUPS", small)
    monkeypatch.setattr(attend, "roofline", lambda pause: 1e9)
    without = {"FlexAttention", "PyTorch", "dense"}
    options = ["--rounds", "1", "--pause", "0", "--markdown", "--without", *without]
    attend.main([*options, "--json", str(tmp_path / "all.json")])
    shown = capsys.readouterr().out
    assert timing.machine() in shown and "GFLOP/s" in shown
    assert "| work | ms | GFLOP/s | of roofline | jax.nn |" in shown
    assert "| work | blockwise | jax.nn |" in shown
    assert shown.count("| geometric mean |") == len(small)
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["groups"].keys() == small.keys()
    for name, group in small.items():
        (row,) = written["groups"][name]
        assert row["work"] in shown
        assert (
            row["seconds"].keys() | row["left_out"].keys() == {group.ours, *group.columns} - without
        )
        assert all(len(seconds) == 1 for seconds in row["seconds"].values())


def test_a_long_sequence_is_measured_alone():
    row = attend.time_alone(toy("causal", "forward+backward"))
    table = attend.linear([row], peak=1e9)
    assert len(table.rows[0]) == len(table.header) and table.rows[0][0] == str(row.case)


def test_a_table_is_markdown():
    table = attend.Printed("title", ["work", "ms"], [["a", "1"]])
    assert table.markdown() == "title\n\n| work | ms |\n| --- | ---: |\n| a | 1 |\n"


@pytest.mark.parametrize(
    ("option", "value", "least"), [("rounds", 0, 1), ("longest", 0, 1), ("pause", -1, 0)]
)
def test_bad_options(option, value, least):
    with pytest.raises(SystemExit, match=f"--{option} must be at least {least}, got {value}"):
        attend.main([f"--{option}={value}"])


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("attend", ["--longest", "5"], "--longest must be at least 1000, the shortest sequence"),
        ("attend", ["--without", "jax"], "--without must be among FlexAttention, PyTorch, dense"),
        ("attend", ["--json", "nothing/all.json"], "--json needs a folder that exists"),
        ("recurrent", ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        ("seq2seq", ["--batch", "0"], "--batch must be at least 1, got 0"),
        ("transformer", ["--features", "100"], "--features must be a multiple of 64, got 100"),
        ("causal_lm", ["--features", "100"], "--features must be a multiple of 64, got 100"),
        ("causal_lm", ["--length", "1"], "--length must be at least 8, got 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(module, arguments, message):
    with pytest.raises(SystemExit, match=message):
        importlib.import_module(f"experiments.benchmarks.{module}").main(arguments)


@pytest.mark.torch
def test_both_translators_find_the_same_and_what_is_timed_runs(monkeypatch):
    from experiments.benchmarks import seq2seq

    monkeypatch.setattr(seq2seq, "LONGEST", 5)
    runs = seq2seq.contenders(seq2seq.Settings(batch=3, config=seq2seq.Config(11, 13, 3, 5)))
    ours, theirs = (runs["beam search"][name]() for name in ("jattn", "PyTorch"))
    np.testing.assert_array_equal(ours.tokens, theirs.numpy()[:, 1:].reshape(3, 4, 5))
    for run in runs["training step"].values():
        run()


@pytest.mark.torch
def test_both_transformers_find_the_same_and_what_is_timed_runs(monkeypatch):
    from experiments.benchmarks import transformer

    monkeypatch.setattr(transformer, "LONGEST", 5)
    settings = transformer.Settings(batch=3, length=4, layers=1, features=64)
    training, search = transformer.contenders(settings).values()
    ours, theirs = (search[name]() for name in ("jattn", "PyTorch"))
    np.testing.assert_array_equal(ours.tokens, theirs.numpy()[:, 1:].reshape(3, 4, 5))
    assert training.keys() == {"jattn", "Flax", "PyTorch"}
    for run in training.values():
        run()


@pytest.mark.torch
def test_both_language_models_say_the_same_and_what_is_timed_runs():
    from experiments.benchmarks import causal_lm

    settings = causal_lm.Settings(batch=2, length=8, layers=1, features=64, slots=256)
    ours, theirs = (run() for run in causal_lm.decoding(settings, 2).values())
    np.testing.assert_array_equal(ours.tokens, theirs.numpy()[:, 4:])
    training = causal_lm.training(settings)
    assert training.keys() == {"jattn", "Flax", "PyTorch"}
    for run in [*training.values(), *(run for run, _ in causal_lm.reading(settings).values())]:
        run()


@pytest.mark.slow
def test_memory_of_a_training_step_is_linear_in_the_length():
    from experiments.benchmarks import causal_lm

    memory = causal_lm.step_memory(causal_lm.Settings(layers=1, features=64))
    short, _, long = memory["jattn"]
    assert long < 5 * short and memory["Flax"][-1] > 10 * memory["Flax"][0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_contenders_run(kind):
    from experiments.benchmarks import recurrent

    runs = recurrent.contenders(recurrent.Case(kind, 2, 3, 5, 7))
    assert {"jattn", "Flax"} <= set(runs)
    for run in runs.values():
        run()
