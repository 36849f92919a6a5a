import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jattn.parity.cli import main
from jattn.parity.fixtures import load, save

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
SOFTMAX = FOLDER / "04_masked_softmax.safetensors"


def test_run_shows_every_tensor(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["parity", "run", str(SOFTMAX), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "4/masked_softmax: masked softmax, float64",
        "output/weights",
        "grad/input/scores",
        "1 of 1",
    ):
        assert text in shown
    (comparison,) = json.loads(report.read_text())
    assert comparison["passed"]
    assert {row["name"] for row in comparison["rows"]} == {"output/weights", "grad/input/scores"}
    assert all(row["max_error"] < 1e-15 and row["passed"] for row in comparison["rows"])


def test_a_folder_gives_a_line_for_each_fixture_and_a_failure_is_exit_code_one(capsys, tmp_path):
    shutil.copy(SOFTMAX, tmp_path / "good.safetensors")
    wrong = load(SOFTMAX)
    wrong.outputs["weights"][0, 0, 0] = np.nan
    save(tmp_path / "wrong.safetensors", wrong)
    report = tmp_path / "report.json"
    assert main(["parity", str(tmp_path), "--json", str(report)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("pass") and shown[1].startswith("FAIL")
    assert "1 of 2" in shown[2]
    rows = {row["name"]: row for row in json.loads(report.read_text())[1]["rows"]}
    assert rows["output/weights"]["max_error"] is None and not rows["output/weights"]["passed"]


def test_float32(capsys):
    assert main(["parity", "run", str(SOFTMAX), "--dtype", "float32"]) == 0
    assert "float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["parity", "{}/nowhere"], ["parity", "run", "{}/nowhere"], ["parity", "{}"]]
)
def test_bad_input_is_exit_code_two(capsys, tmp_path, words):
    assert main([word.format(tmp_path) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jattn: no ") and str(tmp_path) in captured.err


def test_a_file_that_is_no_fixture(capsys, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not this")
    assert main(["parity", str(tmp_path)]) == 2
    assert "not an intact safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["party"], ["parity", "run"], ["parity", "--dtype", "float16"]]
)
def test_words_that_are_no_command(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: jattn" in capsys.readouterr().err


def test_in_a_process_of_its_own_without_torch():
    code = (
        "import sys; from jattn.parity.cli import main; sys.exit(main() or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "parity", "run", SOFTMAX],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 fixtures are equal to PyTorch in float64" in done.stdout
