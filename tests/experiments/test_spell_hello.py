"""The claim at full size, and that a run can be continued."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import spell_hello
from experiments.training.runs import Run
from jattn.models.tokens import cross_entropy


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "hello"
    spell_hello.main(["--run-dir", str(folder)])
    return Run(folder)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        spell_hello.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


def test_all_three_learn_to_spell(finished_run):
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert len(scores) == 3
    for score in scores.values():
        assert score["text"] == "ohlol"
        assert 0 < score["right_from"] <= 50
    assert (finished_run.folder / "spelling.png").read_bytes().startswith(b"\x89PNG")


def test_the_loop_and_the_network_learn_alike(finished_run):
    """One network written twice; the floor of its loss is that of logits between −1 and 1."""
    loop, network, embedded = zip(
        *(row["losses"].values() for row in finished_run.metrics.read()), strict=True
    )
    np.testing.assert_allclose(loop, network, rtol=1e-4)
    assert np.log1p(3 * np.exp(-2)) < loop[-1] < 0.5
    assert embedded[-1] < 0.01


def test_every_step_is_recorded_as_the_model_was_after_it(finished_run):
    rows = finished_run.metrics.read()
    assert [row["step"] for row in rows] == list(range(101))
    for before, after in itertools.pairwise(rows):
        np.testing.assert_allclose(after["loss"], sum(before["losses"].values()), rtol=1e-4)
    model = spell_hello.Spellers(0)
    logits = model(spell_hello.numbers("hello"))
    for title, own in zip(spell_hello.NETWORKS, logits, strict=True):
        loss = cross_entropy(own, spell_hello.numbers("ohlol"))
        np.testing.assert_allclose(rows[0]["losses"][title], loss, rtol=1e-5)
        assert rows[0]["texts"][title] == "".join("ehlo"[i] for i in np.argmax(own[0], axis=-1))


def test_one_optimizer_teaches_each_as_if_alone():
    """The gradient of the sum with respect to one network's weights is that of its own loss."""
    model, batch = (
        spell_hello.Spellers(0),
        (spell_hello.numbers("hello"), spell_hello.numbers("ohlol")),
    )
    gradient = lambda loss, model: spell_hello.nnx.jit(spell_hello.nnx.grad(loss))(model)  # noqa: E731
    together = gradient(lambda model: spell_hello.loss(model, batch), model)["embedding"]
    alone = gradient(lambda model: cross_entropy(model(batch[0]), batch[1]), model.embedding)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_changes_are_shown_as_they_come(capsys):
    watch, model = spell_hello.Watch(Console(width=100)), spell_hello.Spellers(0)
    watch(7, model)
    assert "step    7  network" in capsys.readouterr().out
    watch(8, model)
    assert capsys.readouterr().out == ""


def test_resumed_run_ends_in_the_same_bits(finished_run, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    run = Run(tmp_path / "copy")
    shutil.rmtree(run.checkpoints.folder / "100")
    spell_hello.main(["--resume", "--run-dir", str(run.folder)])
    one, other = (each.checkpoints.newest() for each in (finished_run, run))
    assert one.step == other.step == 100
    assert {path: array.tobytes() for path, array in one.arrays.items()} == {
        path: array.tobytes() for path, array in other.arrays.items()
    }
    assert run.metrics.read() == finished_run.metrics.read()


def test_other_settings_than_the_checkpoints(finished_run, capsys):
    message = fails(capsys, "--resume", "--run-dir", finished_run.folder, "--seed", 4)
    assert "--seed 4 differs from the checkpoint's, 0" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--learning-rate", "nan", "must be finite and positive, got nan"),
        ("--seed", "-2", "must be at least 0, got -2"),
    ],
)
def test_bad_options(capsys, option, value, message):
    shown = " ".join(fails(capsys, f"{option}={value}").replace("│", " ").split())
    assert message in shown and option in shown
