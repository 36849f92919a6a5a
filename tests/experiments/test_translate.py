"""The main job end to end, on pairs so easy that a tiny model learns them in a second or two."""

import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from experiments import translate
from experiments.data import pairs
from experiments.training.runs import Run

SETTINGS = [
    "--steps",
    "240",
    "--features",
    "32",
    "--batch-size",
    "61",
    "--learning-rate",
    "0.02",
    "--seed",
    "3",
]
COMMAND = [sys.executable, "-m", "experiments.translate"]


def spell(digits):
    return "".join("abc丁дзη"[int(digit)] for digit in digits)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    sources = [
        "".join(digits) for count in (2, 3) for digits in itertools.product("0123456", repeat=count)
    ]
    path.write_text("".join(f"{source}\t{spell(source)}\n" for source in sources), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_run(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "easy"
    translate.main(["--data", str(table), "--run-dir", str(folder), *SETTINGS])
    return Run(folder)


@pytest.fixture(scope="module", params=["luong", "transformer"])
def other_run(request, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = ["--data", str(table), "--run-dir", str(folder), "--model", request.param]
    translate.main([*options, *SETTINGS])
    return Run(folder)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    return Run(tmp_path / "copy")


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        translate.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


def assert_same_weights(left, right):
    left, right = left.checkpoints.newest(), right.checkpoints.newest()
    assert left.step == right.step and left.arrays.keys() == right.arrays.keys()
    for path, array in left.arrays.items():
        assert array.tobytes() == right.arrays[path].tobytes(), path


def test_an_easy_language_is_learnt(finished_run):
    rows = finished_run.metrics.read()
    assert rows[-1]["loss"] < 0.1 < 1 < rows[0]["loss"]
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert scores["pairs"] == 39
    assert scores["exact_match"] >= 0.95
    assert scores["copy_exact_match"] == 0
    for name in ("alignment.png", "curve.png"):
        assert (finished_run.folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [[], ["--beam", "3"]])
def test_the_other_models_learn_it_too(other_run, capsys, decoding):
    assert json.loads((other_run.folder / "scores.json").read_text())["exact_match"] >= 0.95
    translate.main(["--translate", "506", "--run-dir", str(other_run.folder), *decoding])
    assert capsys.readouterr().out == spell("506") + "\n"


def test_scores_are_those_of_the_translations(finished_run, table, capsys):
    checkpoint = finished_run.checkpoints.newest()
    settings = translate.Settings(**checkpoint.metadata["settings"], data=table)
    translator = translate.Translator.build(settings, checkpoint.metadata["characters"])
    translate.restore(translator.model, checkpoint)
    test = translate.load(settings).test
    right = [translator([pair.source], batch_size=1)[0][0] == spell(pair.source) for pair in test]
    scores = json.loads((finished_run.folder / "scores.json").read_text())
    assert scores["exact_match"] == pytest.approx(np.mean(right))


def test_weights_are_distributions_over_the_source(finished_run):
    checkpoint = finished_run.checkpoints.newest()
    settings = translate.Settings(**checkpoint.metadata["settings"])
    translator = translate.Translator.build(settings, checkpoint.metadata["characters"])
    translate.restore(translator.model, checkpoint)
    outputs, weights = translator(["12", "345"], batch_size=2)
    for source, output, look in zip(["12", "345"], outputs, weights, strict=True):
        assert output == spell(source)
        np.testing.assert_allclose(look[: len(output), : len(source)].sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("beam", [[], ["--beam", "3"]])
def test_translate_with_the_checkpoint(finished_run, capsys, beam):
    translate.main(["--translate", " 506 ", "--run-dir", str(finished_run.folder), *beam])
    assert capsys.readouterr().out == spell("506") + "\n"


def test_translate_says_what_it_never_saw(finished_run, capsys):
    translate.main(["--translate", "1Ω", "--run-dir", str(finished_run.folder)])
    assert "never seen in training: Ω" in capsys.readouterr().err


def test_resumed_run_ends_in_the_same_bits(finished_run, copied_run):
    shutil.rmtree(copied_run.checkpoints.folder / "240")
    translate.main(["--resume", "--run-dir", str(copied_run.folder)])
    assert_same_weights(finished_run, copied_run)
    assert copied_run.metrics.read() == finished_run.metrics.read()


def test_ctrl_c_leaves_a_checkpoint_that_continues_to_the_same_bits(finished_run, table, tmp_path):
    run = Run(tmp_path / "run")
    command = [*COMMAND, "--data", str(table), "--run-dir", str(run.folder), *SETTINGS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while (
            not run.metrics.path.exists() and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert run.checkpoints.newest().step < 240
    program, *line = shlex.split(output.splitlines()[-1])  # it can be pasted
    assert [program, *line[:2]] == ["python", *COMMAND[1:]]
    translate.main(line[2:])
    assert_same_weights(finished_run, run)


def test_other_settings_than_the_checkpoints(finished_run, capsys):
    before = sorted(finished_run.folder.rglob("*"))
    resume = ("--resume", "--run-dir", finished_run.folder)
    settings = (
        ("model", "luong", "bahdanau"),
        ("features", 31, 32),
        ("seed", 4, 3),
        ("learning-rate", 0.5, 0.02),
    )
    for option, value, own in settings:
        message = fails(capsys, *resume, f"--{option}", value)
        assert f"--{option} {value} differs from the checkpoint's, {own}" in message
    assert sorted(finished_run.folder.rglob("*")) == before


def test_other_data_than_the_checkpoints(finished_run, table, tmp_path, capsys):
    other = tmp_path / "other.tsv"
    other.write_text(table.read_text(encoding="utf-8") + "66666\tx\n", encoding="utf-8")
    message = fails(capsys, "--resume", "--run-dir", finished_run.folder, "--data", other)
    assert "--data gives other pairs" in message


def test_a_run_is_not_overwritten(finished_run, table, capsys):
    message = fails(capsys, "--data", table, "--run-dir", finished_run.folder)
    assert "holds something already" in message


def test_nothing_is_made_of_a_bad_file(tmp_path, capsys):
    bad, folder = tmp_path / "bad.tsv", tmp_path / "run"
    bad.write_text("a\tb\nc d\n", encoding="utf-8")
    assert f"{bad}:2: expected source<TAB>target, got 0 tabs" in fails(
        capsys, "--data", bad, "--run-dir", folder
    )
    assert not folder.exists()


def test_no_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint in runs/translate" in fails(capsys, "--translate", "1")
    assert "no checkpoint in nothing" in fails(capsys, "--resume", "--run-dir", "nothing")
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoint(copied_run, capsys):
    for path in (copied_run.checkpoints.folder / "240").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    translate.main(["--translate", "12", "--run-dir", str(copied_run.folder)])
    message = capsys.readouterr().err
    assert (
        "240 is damaged" in message
        and "half trained: this is the checkpoint of step 200 of 240" in message
    )
    assert copied_run.checkpoints.steps() == [0, 200, 240]


def test_checkpoint_of_another_experiment(copied_run, capsys):
    state = copied_run.checkpoints
    model = translate.bahdanau.BahdanauTranslator(
        translate.bahdanau.Config(5, 5, 2, 3), rngs=translate.nnx.Rngs(0)
    )
    state.save(300, translate.nnx.state(model), {"experiment": "other"})
    assert "is not a run of this experiment" in fails(
        capsys, "--translate", "1", "--run-dir", copied_run.folder
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "must be at least 1, got 0"),
        ("--beam", "-1", "must be at least 1, got -1"),
        ("--learning-rate", "0", "must be finite and positive, got 0.0"),
        ("--dropout", "1", "must lie in [0, 1), got 1.0"),
        ("--seed", "-2", "must be at least 0, got -2"),
        ("--steps", "many", "many"),
    ],
)
def test_bad_options(capsys, option, value, message):
    shown = " ".join(fails(capsys, f"{option}={value}").replace("│", " ").split())
    assert message in shown and option in shown


def test_texts_that_look_like_markup_are_shown_as_they_are(tmp_path, capsys):
    rows = [pairs.Pair(f"[/b]{i}$", f"$x$[bold]{i}") for i in range(7)]

    def echo(texts):
        return [f"$x$[bold]{text[4]}" for text in texts], [
            np.full((10, len(text)), 0.1) for text in texts
        ]

    run = Run.create(tmp_path / "[run]", "task")
    run.metrics.write(step=1, loss=0.5, learning_rate=0.1)
    translate.report(echo, pairs.Split(rows, rows), run, 0, Console(width=300))
    shown = capsys.readouterr().out
    assert (
        "[/b]3$" in shown
        and "$x$[bold]3" in shown
        and "[run]" in shown
        and "held-out pairs: 100.00%" in shown
    )


def test_beam_wider_than_the_alphabet(table, tmp_path, capsys):
    message = fails(capsys, "--data", table, "--run-dir", tmp_path / "run", "--beam", "12")
    assert "--beam must be at most the 11 tokens of the target, got 12" in message


def test_default_data_is_split_by_date_and_shown_in_every_script():
    data = translate.load(translate.Settings())
    assert not {pair.target for pair in data.train} & {pair.target for pair in data.test}
    assert [pair.label for pair in translate.examples(data, 0)] == list(translate.SHOWN)
    assert all(pair in data.test for pair in translate.examples(data, 0))


def test_examples_of_unlabelled_pairs():
    data = pairs.Split([], [pairs.Pair(str(i), "x") for i in range(5)])
    assert sorted(translate.examples(data, 0)) == data.test


def test_help_reads():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    for option in (
        "--data FILE",
        "--translate TEXT",
        "--resume",
        "--run-dir FOLDER",
        "--steps INT",
    ):
        assert option in done.stdout


def test_a_finished_run_that_is_resumed_says_that_it_is_trained(finished_run, copied_run, capsys):
    translate.main(["--resume", "--run-dir", str(copied_run.folder)])
    assert "trained already: 240 steps" in capsys.readouterr().out
    assert_same_weights(finished_run, copied_run)


def test_more_steps_extend_a_finished_run(finished_run, copied_run, capsys):
    resume = ["--resume", "--run-dir", str(copied_run.folder)]
    translate.main([*resume, "--steps", "260"])
    rows = copied_run.metrics.read()
    assert rows[: len(finished_run.metrics.read())] == finished_run.metrics.read()
    assert [row["step"] for row in rows[-2:]] == [240, 260]
    newest = copied_run.checkpoints.newest()
    assert (newest.step, newest.metadata["ends"]) == (260, [240, 260])
    assert newest.metadata["settings"]["steps"] == 260


@pytest.mark.parametrize("steps", ["100", "300"])
def test_a_run_that_has_not_finished_keeps_its_steps(copied_run, capsys, steps):
    shutil.rmtree(copied_run.checkpoints.folder / "240")
    message = fails(capsys, "--resume", "--run-dir", copied_run.folder, "--steps", steps)
    assert f"--steps {steps} differs from the checkpoint's, 240" in message


def test_fewer_steps_than_the_checkpoints_are_refused(finished_run, capsys):
    message = fails(capsys, "--resume", "--run-dir", finished_run.folder, "--steps", "100")
    assert "--steps 100 differs from the checkpoint's, 240" in message
