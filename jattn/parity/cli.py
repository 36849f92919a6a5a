"""The `jattn` command: hold ports against PyTorch's recorded numbers, and convert weights.

jattn parity [FOLDER]                            every fixture of a folder, a line each
jattn parity run FIXTURE...                      the given fixtures, tensor by tensor
jattn parity record MODULE:FACTORY -o FILE       run a PyTorch module, and record all it does
jattn parity diff FILE MODULE:FACTORY            which layer of a port differs first, and why
jattn convert CHECKPOINT --to flax|torch|hf -o FILE    weights, from and to PyTorch's names

Only `record` needs PyTorch, and `convert` for pickles. Each has a --help of its own.
Exit code: 0 where all is equal, 1 where some tensor differs, 2 where the input is bad.
"""

import argparse
import dataclasses
import difflib
import glob
import json
import math
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.progress import Progress
from rich.text import Text

from jattn.parity import conversion, ports
from jattn.parity.compare import Comparison, is_recorded, run
from jattn.parity.console import console, table, verdict
from jattn.parity.fixtures import load

_FOLDER = pathlib.Path("tests/fixtures")
_WHERE = "jattn's own are found from the top folder of a clone; or give a path to fixtures"
_DTYPES = ("float64", "float32", "bfloat16")
_COLUMNS = """\
columns, each the worst of a tensor:
  max |Δ|    the largest difference from PyTorch's numbers
  relative   the same, over the largest number of the tensor
  ulps       over the spacing of floats of this dtype at the largest number
  / PyTorch  root mean square error, over that of PyTorch itself in this dtype; of float64, float32
  / allowed  over what is allowed; a tensor passes up to 1

Exit code: 0 where all is equal, 1 where some tensor differs, 2 for bad input."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: its words; those of the process by default.

    Returns:
      0 where all is equal, 1 where some tensor differs, 2 where the input is bad.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = next(name for name in _COMMANDS if words[: len(name)] == [*name])
    parser, action = _COMMANDS[named]
    options = parser().parse_args(words[len(named) :])
    if "dtype" in options:
        options.dtype = options.dtype or list(_DTYPES[:2])
    try:
        _check_paths(options)
        return action(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"jattn: {error}", file=sys.stderr)
        return 2
    except Exception:  # of a module that is the user's; 1 would say that tensors differ
        traceback.print_exc()
        return 2


def _check_paths(options: argparse.Namespace) -> None:
    """What cannot be written must not cost the minutes before it."""
    for name in ("json", "output"):
        path = getattr(options, name, None)
        if path and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name} {path} lies in no folder")
        if path and name == "json" and path.is_dir():
            raise IsADirectoryError(f"--{name} {path} is a folder")


def _table(options: argparse.Namespace) -> int:
    paths = _fixtures(options.folder)
    console().print(f"{'':4}  {'fixture':{_WIDTH}}  " + "  ".join(map(_title, options.dtype)))
    return _compared(paths, options, _line)


def _run(options: argparse.Namespace) -> int:
    paths = [path for pattern in options.fixture for path in _matching(pattern)]
    return _compared(paths, options, _rows)


def _compared(
    paths: Sequence[pathlib.Path],
    options: argparse.Namespace,
    shown: Callable[[Sequence[Comparison]], Any],
) -> int:
    """Compare fixtures in each dtype, and print each as it comes."""
    comparisons: list[Comparison] = []
    passed = compared = 0
    out = console()
    bar = Progress(console=out, transient=True, disable=not out.is_terminal)
    with bar:
        for path in bar.track(paths, description="fixtures"):
            fixture = load(path)
            each = [run(fixture, dtype) for dtype in options.dtype if is_recorded(fixture, dtype)]
            if not each:
                unknown = "nothing of PyTorch's is known in this dtype"
                out.print(f"{'—':4}  {fixture.title:{_WIDTH}}  {unknown}")
                continue
            comparisons += each
            compared += 1
            passed += all(comparison.passed for comparison in each)
            out.print(shown(each))
            sys.stdout.flush()
    if options.json:
        reports = json.dumps([_report(each) for each in comparisons], indent=2)
        options.json.write_text(reports + "\n")
    if not compared:
        raise ValueError(f"no such fixture is known in {', '.join(options.dtype)}")
    dtypes = ", ".join(options.dtype)
    out.print(f"{passed} of {compared} fixtures are equal to PyTorch in {dtypes}")
    return 0 if passed == compared else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jattn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["parity", "convert"])
    parser.add_argument(
        "folder",
        nargs="?",
        type=pathlib.Path,
        default=_FOLDER,
        help=f"holds fixtures, or folders of them; default: {_FOLDER}",
    )
    return _with_options(parser)


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jattn parity run",
        description="Compares fixtures tensor by tensor.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_COLUMNS,
    )
    help = (
        "a file, or a name that `jattn parity` prints, such as multi_head/widths;"
        " or a pattern of either, such as 'multi_head/*'"
    )
    parser.add_argument("fixture", nargs="+", metavar="FIXTURE", help=help)
    return _with_options(parser)


def _with_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        action="append",
        help="type of the port; may be given several times; default: float64 and float32",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="also write every row to FILE"
    )
    return parser


def _fixtures(folder: pathlib.Path) -> list[pathlib.Path]:
    """The fixtures of a folder, and of the folders in it; those of training lie deeper."""
    paths = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*/*.safetensors"))]
    if not paths:
        words = [name[-1] for name in _COMMANDS if name and name[0] == "parity"]
        near = difflib.get_close_matches(str(folder), words, n=1)
        hint = f"did you mean `jattn parity {near[0]}`?" if near else _WHERE
        hint = f"`jattn parity run {folder}` takes a file" if folder.is_file() else hint
        raise FileNotFoundError(f"no fixtures (*.safetensors) in the folder {folder}: {hint}")
    return paths


def _matching(pattern: str) -> list[pathlib.Path]:
    """The fixtures of a path, of a name as `jattn parity` prints it, or of a pattern of either."""
    named = str(_FOLDER / f"{pattern}.safetensors")
    for each in (glob.escape(pattern), pattern, named):
        if paths := [path for path in map(pathlib.Path, sorted(glob.glob(each))) if path.is_file()]:
            return paths
    reason = f"`jattn parity` lists those of {_FOLDER}" if _FOLDER.is_dir() else _WHERE
    raise FileNotFoundError(f"no such fixture: {pattern}: {reason}")


def _report(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON, which knows no infinity: null stands for it."""
    rows = [
        {
            name: None if value == math.inf else value
            for name, value in dataclasses.asdict(row).items()
        }
        | {"passed": row.passed}
        for row in comparison.rows
    ]
    return dataclasses.asdict(comparison) | {"passed": comparison.passed, "rows": rows}


_WIDTH = 42


def _title(dtype: str) -> str:
    return f"{dtype + ': outputs':>17}  {'gradients':>9}  {'/ allowed':>9}"


def _line(comparisons: Sequence[Comparison]) -> Text:
    numbers = [
        f"{each.worst('max_error', 'output/'):17.1e}  {each.worst('max_error', 'grad/'):9.1e}"
        f"  {each.worst('share'):9.1e}"
        for each in comparisons
    ]
    word = verdict(all(each.passed for each in comparisons))
    rest = ["", f"{comparisons[0].fixture:{_WIDTH}}", *numbers]
    return Text.assemble(word, "  ".join(rest))


def _rows(comparisons: Sequence[Comparison]) -> Group:
    titles = ("", "tensor", "max |Δ|", "relative", "ulps", "/ PyTorch", "/ allowed")
    parts: list[Any] = []
    for each in comparisons:
        rows = [
            [
                verdict(row.passed), row.name, row.max_error, row.relative_error, row.ulps,
                row.torch_ratio, row.share,
            ]
            for row in each.rows
        ]  # fmt: skip
        heading = f"{each.fixture}: {each.system}, {each.dtype}"
        parts += [heading, table(titles, rows, names=2), ""]
    return Group(*parts)


Command = tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int]]
_COMMANDS: Mapping[tuple[str, ...], Command] = {
    ("parity", "run"): (_run_parser, _run),
    ("parity", "record"): (ports.record_parser, ports.record_port),
    ("parity", "diff"): (ports.diff_parser, ports.diff_port),
    ("convert",): (conversion.convert_parser, conversion.convert),
    (): (_parser, _table),
}


if __name__ == "__main__":
    raise SystemExit(main())
