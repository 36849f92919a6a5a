"""What commands say while they load, without packages, at Ctrl-C, and of options that are wrong."""

import os
import signal
import subprocess
import sys
import tomllib

import pytest

import experiments
from experiments import (
    BadInput,
    classify,
    embed,
    exits_on_bad_input,
    kernel_regression,
    spell_hello,
    translate,
)
from experiments.data.pairs import Pair

LOADING = "loading …\n"
NAMES = "experiments.data.names"  # the command that loads the fewest packages
USAGE = f"usage: python -m {NAMES} OUT.tsv\n"
SCRIPTS = (translate, classify, spell_hello, kernel_regression, embed)
SHOW_HANDLER = "atexit.register(lambda: print(repr(signal.getsignal(signal.SIGINT))))"


def without(*packages):
    """Code after which Python finds none of the packages."""
    return f"sys.modules.update(dict.fromkeys({packages}))"


@pytest.fixture
def start(tmp_path):
    def start(*arguments, before="", **options):
        """A Python process that runs some code first."""
        first = ("import atexit, signal, sys", "signal.signal(2, signal.default_int_handler)")
        (tmp_path / "sitecustomize.py").write_text("\n".join((*first, before)))
        paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(paths)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, **{**pipes, **options}
        )

    return start


@pytest.fixture
def run(start):
    def run(*arguments, **options):
        """The exit code of a process, what it prints, and its errors."""
        with start(*arguments, **options) as process:
            printed, errors = process.communicate(timeout=120)
        return process.returncode, printed, errors

    return run


def fails(capsys, main, *arguments):
    """What a command prints before it exits."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return "".join((str(stopped.value.code), *capsys.readouterr()))


def test_ctrl_c_ends_a_command_that_loads(start):
    with start("-m", "experiments.translate") as process:
        assert process.stderr.readline() == LOADING
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == 130


def test_ctrl_c_ends_a_command_that_runs(capsys):
    @exits_on_bad_input
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr() == ("", "stopped\n")


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_a_command_that_runs_has_the_handler_that_it_was_started_with(run, handler):
    before = f"signal.signal(2, signal.{handler}); {SHOW_HANDLER}"
    assert handler in run("-m", NAMES, before=before)[1]


@pytest.mark.parametrize("first", ["", "sys.argv[0] = '-m'; "])
def test_an_import_by_other_code_says_and_changes_nothing(run, first):
    line = f"import sys; {first}import experiments.data.names"
    code, printed, errors = run("-c", line, before=SHOW_HANDLER)
    assert code == 0 and "default_int_handler" in printed and not errors


@pytest.mark.parametrize(
    "options", [["-m", NAMES], [f"-m{NAMES}"], ["-B", "-X", "dev", "-m", NAMES]]
)
def test_a_command_says_at_once_that_it_loads(run, options):
    assert run(*options) == (1, "", LOADING + USAGE)


def test_on_a_terminal_the_line_vanishes(start):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with start("-m", NAMES, stderr=theirs) as process:
        os.close(theirs)
        process.wait(timeout=60)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == "loading …\r" + "\r         \r" + USAGE.replace("\n", "\r\n")


def test_the_packages_are_those_of_the_extra():
    with open("pyproject.toml", "rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["experiments"]
    names = {requirement.partition(">")[0].partition("-")[0] for requirement in extra}
    assert names - {"notojp"} == set(experiments.PACKAGES)  # pictures do without this font


@pytest.mark.parametrize(
    "missing", [(name,) for name in experiments.PACKAGES] + [("babel", "tyro")]
)
def test_a_command_names_the_packages_that_are_missing(run, missing):
    names = ", ".join(missing)
    message = f"the experiments need more packages ({names}): pip install -e '.[experiments]'\n"
    expected = (1, "", f"error: {message}")
    assert run("-m", "experiments.translate", before=without(*missing)) == expected


def test_an_import_names_the_packages_that_are_missing(run):
    code, _, errors = run("-c", "import experiments", before=without("rich", "tokenizers"))
    message = "the experiments need more packages (rich, tokenizers): pip install -e '.[experi"
    assert code == 1 and f"ModuleNotFoundError: {message}" in errors


def test_a_command_needs_no_more_packages_than_it_uses(run):
    others = set(experiments.PACKAGES) - {"babel"}
    assert run("-m", NAMES, before=without(*others)) == (1, "", LOADING + USAGE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attend", "embed", "transformer"])
def test_a_benchmark_needs_no_more_packages_than_it_uses(run, name):
    module = f"experiments.benchmarks.{name}"
    needed = experiments.FEWER.get(module, experiments.FEWER["experiments.benchmarks"])
    others = set(experiments.PACKAGES) - set(needed)
    code, printed, errors = run("-m", module, "--help", before=without(*others))
    assert (code, errors) == (0, LOADING) and printed.startswith(f"usage: python -m {module}")
    for package in needed:
        assert f"({package})" in run("-m", module, "--help", before=without(package))[2]


def test_the_process_of_a_benchmark_needs_no_more_packages(run):
    line = "import experiments.benchmarks.cases"
    before = without("babel", "matplotlib")
    assert run("-c", line, "--multiprocessing-fork", before=before) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments", ["--help", "--stepz 3", "--steps x", "--steps 0", "--model nope", "--seed x"]
)
def test_no_message_holds_a_name_of_the_code(capsys, script, arguments):
    shown = fails(capsys, script.main, *arguments.split())
    assert "Settings" not in shown and "BadInput" not in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (translate, "--steps 0", "--steps must be at least 1, got 0"),
        (translate, "--resume --translate x", "give --resume or --translate, not both"),
        (
            translate,
            "--model transformer --features 9",
            "--features must be a multiple of 4, got 9",
        ),
        (classify, "--layers 0", "--layers must be at least 1, got 0"),
        (spell_hello, "--seed -1", "--seed must be at least 0, got -1"),
        (embed, "one", "give two sentences or more, got 1"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(capsys, script, arguments, message):
    assert fails(capsys, script.main, *arguments.split()) == f"error: {message}"


def test_bad_input_is_an_error_of_one_line():
    @exits_on_bad_input
    def main():
        raise BadInput("so")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == "error: so"


def test_the_mistakes_of_a_translator_are_none_that_is_shown_already():
    test = [Pair(str(i), "right") for i in range(9)]
    outputs = ["wrong"] * 7 + ["right"] * 2
    found = translate.mistakes(test, outputs, test[:3], 0)
    assert sorted(found) == [(pair, "wrong") for pair in test[3:7]]
    assert len(translate.mistakes(test, outputs, test[:1], 0)) == 5
    assert translate.mistakes(test, outputs, test[:7], 0) == []
