"""The claim, and that a run can be continued."""

import json
import shutil

import numpy as np
import pytest

from experiments import kernel_regression
from experiments.training.runs import Run

SETTINGS = ["--steps", "230", "--seed", "5"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "curve"
    kernel_regression.main(["--run-dir", str(folder), *SETTINGS])
    return Run(folder)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    return Run(tmp_path / "copy")


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        kernel_regression.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


def test_the_learned_kernel_errs_least(finished_run):
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    mean, fixed, learned = scores["errors"].values()
    assert scores["weight"] > 2
    for error in ("held_out", "leave_one_out"):
        assert learned[error] < fixed[error] / 2 < fixed[error] < mean[error]
    assert (finished_run.folder / "fits.png").read_bytes().startswith(b"\x89PNG")


def test_narrower_weights_fit_less_smoothly():
    pool, score = kernel_regression.pool_with, kernel_regression.scores.gaussian
    pools = {"wide": pool(score), "narrow": pool(lambda query, key: score(query, key, 4.0))}
    _, (wide, narrow) = kernel_regression.compare(
        pools, kernel_regression.draw(kernel_regression.Settings())
    )
    for panel in (wide, narrow):
        np.testing.assert_allclose(panel.weights.sum(axis=1), 1, rtol=1e-5)
    assert narrow.weights.max() > 2 * wide.weights.max()
    assert (
        np.square(np.diff(narrow.prediction, 2)).sum()
        > 2 * np.square(np.diff(wide.prediction, 2)).sum()
    )


def test_errors_are_those_of_a_loop():
    samples = kernel_regression.draw(kernel_regression.Settings(samples=7))
    errors, _ = kernel_regression.compare(
        {"it": kernel_regression.pool_with(kernel_regression.scores.gaussian)}, samples
    )
    x, y = samples.x[:, 0].astype(np.float64), samples.y[:, 0].astype(np.float64)

    def predict(at, x, y):
        kernel = np.exp(-((at - x) ** 2) / 2)
        return (kernel * y).sum() / kernel.sum()

    others = [predict(x[i], np.delete(x, i), np.delete(y, i)) - y[i] for i in range(7)]
    grid = [predict(at, x, y) - (2 * np.sin(at) + at**0.8) for at in np.arange(101) / 20]
    assert errors["it"].leave_one_out == pytest.approx(np.mean(np.square(others)), rel=1e-4)
    assert errors["it"].held_out == pytest.approx(np.mean(np.square(grid)), rel=1e-4)


def test_resumed_run_ends_in_the_same_bits(finished_run, copied_run):
    shutil.rmtree(copied_run.checkpoints.folder / "230")
    kernel_regression.main(["--resume", "--run-dir", str(copied_run.folder)])
    (one, other) = (run.checkpoints.newest() for run in (finished_run, copied_run))
    assert one.step == other.step == 230
    assert {path: array.tobytes() for path, array in one.arrays.items()} == {
        path: array.tobytes() for path, array in other.arrays.items()
    }
    assert copied_run.metrics.read() == finished_run.metrics.read()


def test_other_settings_than_the_checkpoints(finished_run, capsys):
    for option, value, own in (("seed", 4, 5), ("samples", 31, 50), ("noise", 0.1, 0.5)):
        message = fails(capsys, "--resume", "--run-dir", finished_run.folder, f"--{option}", value)
        assert f"--{option} {value} differs from the checkpoint's, {own}" in message


def test_a_run_of_another_experiment(copied_run, capsys):
    arrays = kernel_regression.nnx.state(
        kernel_regression.nn.NadarayaWatson(rngs=kernel_regression.nnx.Rngs(0))
    )
    copied_run.checkpoints.save(300, arrays, {"experiment": "other"})
    assert "is not a run of this experiment" in fails(
        capsys, "--resume", "--run-dir", copied_run.folder
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--samples", "1", "must be at least 2, got 1"),
        ("--noise", "nan", "must be finite and not negative, got nan"),
        ("--learning-rate", "0", "must be finite and positive, got 0.0"),
        ("--seed", "-2", "must be at least 0, got -2"),
    ],
)
def test_bad_options(capsys, option, value, message):
    shown = " ".join(fails(capsys, f"{option}={value}").replace("│", " ").split())
    assert message in shown and option in shown
