import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jattn.parity.cli import main
from jattn.parity.fixtures import Fixture, load, save

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
SOFTMAX = FOLDER / "masks" / "masked_softmax.safetensors"


def test_run_shows_every_tensor(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["parity", "run", str(SOFTMAX), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "masks/masked_softmax: masked softmax, float64",
        "output/weights",
        "grad/input/scores",
        "1 of 1",
    ):
        assert text in shown
    comparison, single = json.loads(report.read_text())
    assert comparison["passed"] and single["passed"] and single["dtype"] == "float32"
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
    assert shown[1].startswith("pass") and shown[2].startswith("FAIL")
    assert "1 of 2 fixtures are equal to PyTorch in float64, float32" in shown[3]
    rows = {row["name"]: row for row in json.loads(report.read_text())[2]["rows"]}
    assert rows["output/weights"]["max_error"] is None and not rows["output/weights"]["passed"]


@pytest.mark.parametrize(
    ("where", "why"), [(".", "is a folder"), ("nowhere/report.json", "lies in no folder")]
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_compared(capsys, where, why):
    assert main(["parity", "run", str(SOFTMAX), "--json", where]) == 2
    captured = capsys.readouterr()
    assert f"--json {where} {why}" in captured.err and not captured.out


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


def test_a_file_where_a_folder_is_meant_and_a_fixture_of_another_module(capsys, tmp_path):
    assert main(["parity", str(SOFTMAX)]) == 2
    assert f"`jattn parity run {SOFTMAX}` takes a file" in capsys.readouterr().err
    save(tmp_path / "mine.safetensors", Fixture("yours/net", "net", outputs={"y": np.ones(2)}))
    assert main(["parity", "run", str(tmp_path / "mine.safetensors")]) == 2
    assert "`jattn parity diff` holds a port of it against it" in capsys.readouterr().err


def test_a_command_that_is_almost_one(capsys):
    assert main(["parity", "runn"]) == 2
    assert "did you mean `jattn parity run`?" in capsys.readouterr().err


def titles(capsys):
    """Titles of the fixtures that were run tensor by tensor."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split(":")[0] for line in lines if line.endswith(", float64")]


def test_a_folder_of_folders_or_one_of_them(capsys, tmp_path):
    for family in ("one", "two"):
        (tmp_path / family).mkdir()
        shutil.copy(SOFTMAX, tmp_path / family / "a.safetensors")
    assert main(["parity", str(tmp_path)]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert main(["parity", str(tmp_path / "two")]) == 0
    assert "1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pattern", ["masks/masked_softmax_[lm]*", f"{FOLDER}/masks/masked_softmax_[lm]*.safetensors"]
)
def test_patterns_that_the_shell_has_not_expanded(capsys, monkeypatch, pattern):
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(["parity", "run", pattern]) == 0
    assert titles(capsys) == [
        f"masks/masked_softmax_{name}" for name in ("lengths", "lengths_per_query", "mask")
    ]


def test_a_file_whose_name_looks_like_a_pattern(capsys, tmp_path):
    shutil.copy(SOFTMAX, tmp_path / "a[1].safetensors")
    assert main(["parity", "run", str(tmp_path / "a[1].safetensors")]) == 0
    assert titles(capsys) == ["masks/masked_softmax"]


def test_a_pattern_takes_files_alone(capsys, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(SOFTMAX, tmp_path / "b.safetensors")
    assert main(["parity", "run", f"{tmp_path}/*"]) == 0
    assert titles(capsys) == ["masks/masked_softmax"]


def test_patterns_that_the_shell_has_expanded(capsys):
    paths = sorted(map(str, (FOLDER / "masks").glob("masked_softmax_l*")))
    assert main(["parity", "run", *paths]) == 0
    assert titles(capsys) == [
        f"masks/masked_softmax_{name}" for name in ("lengths", "lengths_per_query")
    ]


@pytest.mark.parametrize("words", [[], ["run", "masks/masked_softmax"], ["run", "masks/*"]])
def test_outside_a_clone_it_asks_for_a_folder(capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    assert main(["parity", *words]) == 2
    assert "from the top folder of a clone; or give a path" in capsys.readouterr().err


def test_a_name_that_no_fixture_of_the_clone_has(capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(["parity", "run", "masks/nothing"]) == 2
    assert "no such fixture: masks/nothing: `jattn parity` lists" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["parity", "--help"], ["parity", "run", "--help"]])
def test_help_says_what_there_is(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for text in ("FIXTURE", "--dtype", "--json", "Exit code: 0 where all is equal"):
        assert text in shown


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


PORT = """
import jax
import numpy as np
from flax import nnx


class Net(nnx.Module):
    def __init__(self, approximate):
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))
        self.approximate = approximate

    def __call__(self, x):
        return self.second(jax.nn.gelu(self.first(x), approximate=self.approximate))


def right():
    return Net(False)


def wrong():
    return Net(True), {"pairs": {"0": "first", "2": "second"}}


def torch_net():
    import torch

    layers = torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4)
    return torch.nn.Sequential(*layers), [np.arange(12.0).reshape(3, 4) / 12]


def needs(x):
    return x


def fails():
    raise RuntimeError("a fault of the user's")


def odd():
    return Net(False), {"rulez": ()}


nothing = 3
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "my_port.py"
    path.write_text(PORT)
    return path


@pytest.mark.torch
def test_a_module_is_recorded_once_and_ports_are_held_against_it(program, tmp_path, capsys):
    fixture, report = str(tmp_path / "net.safetensors"), tmp_path / "report.json"
    assert main(["parity", "record", f"{program}:torch_net", "-o", fixture]) == 0
    assert "4 parameters" in capsys.readouterr().out
    assert main(["parity", "diff", fixture, f"{program}:right"]) == 0
    assert "Sequential: equal to PyTorch" in capsys.readouterr().out
    words = ["parity", "diff", fixture, f"{program}:wrong", "--json", str(report)]
    assert main(words) == 1
    assert "matches with erf GELU instead of the other form" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert not found["passed"] and found["pairs"] == {"0": "first", "2": "second"}
    assert found["first"]["torch"] == ""
    assert {rule["torch"][0] for rule in found["rules"]} >= {"0.weight", "2.bias"}


TAGGER = str(FOLDER / "ports" / "tagger" / "whole.safetensors")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_port.py", "expected MODULE:FACTORY"),
        ("nowhere.py:right", "no such file: nowhere.py"),
        ("no_such_package:right", "No module named 'no_such_package'"),
        ("{}:absent", "has no function 'absent'"),
        ("{}:nothing", "has no function 'nothing'"),
        ("{}:right", "the port cannot be called with the inputs x, mask"),
        ("{}:fails", "RuntimeError: a fault of the user's"),
        (
            "{}:odd",
            "a pair of a module and a dict of rules, pairs, call, params, got ['Net', ['rulez']]",
        ),
        ("{}:needs", "my_port.py:needs() fails: needs() missing 1 required positional argument"),
    ],
)
def test_a_port_that_cannot_be_made_or_filled(program, capsys, factory, message):
    assert main(["parity", "diff", TAGGER, factory.format(program)]) == 2
    assert message in capsys.readouterr().err


def test_recording_without_pytorch_says_how_to_install_it(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    output = str(tmp_path / "net.safetensors")
    assert main(["parity", "record", f"{program}:torch_net", "-o", output]) == 2
    assert "pip install 'jattn[torch]'" in capsys.readouterr().err


def test_a_dtype_stands_before_or_after_a_fixture_and_may_come_again(capsys):
    fixture = str(SOFTMAX)
    assert main(["parity", "run", "--dtype", "bfloat16", fixture]) == 0
    assert main(["parity", "run", fixture, "--dtype", "float32", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("softmax, bfloat16\n") == 2 and shown.count("softmax, float32\n") == 1


def test_what_pytorch_cannot_compute_is_not_called_equal(capsys):
    hidden = str(FOLDER / "bert" / "hidden_words.safetensors")
    assert main(["parity", "run", hidden, "--dtype", "bfloat16"]) == 2
    captured = capsys.readouterr()
    assert "bert/hidden_words" in captured.out and "equal" not in captured.out
    assert "no such fixture is known in bfloat16" in captured.err
