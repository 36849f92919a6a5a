"""The `jattn` command: hold jattn against PyTorch's recorded numbers, without PyTorch.

jattn parity [FOLDER]            every fixture of a folder, a line each
jattn parity run FIXTURE...      the given fixtures, tensor by tensor

Exit code: 0 where all is equal, 1 where some tensor differs, 2 where the input is bad.
"""

import argparse
import dataclasses
import glob
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jattn.parity.compare import Comparison, run
from jattn.parity.fixtures import load

_FOLDER = pathlib.Path("tests/fixtures")
_WHERE = "jattn's own are found from the top folder of a clone; or give a path to fixtures"
_COLUMNS = """\
columns, each the worst of a tensor:
  max |Δ|    the largest difference from PyTorch's numbers
  relative   the same, over the largest number of the tensor
  ulps       over the spacing of floats of this dtype at the largest number
  / float32  root mean square error, over that of PyTorch itself in float32
  / allowed  over what is allowed; a tensor passes up to 1

Exit code: 0 where all is equal, 1 where some tensor differs, 2 for bad input."""
_OPTIONS = "[--dtype …] [--json FILE]"
_USAGE = f"jattn parity [FOLDER] {_OPTIONS}\n       jattn parity run FIXTURE... {_OPTIONS}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: its words; those of the process by default.

    Returns:
      0 where all is equal, 1 where some tensor differs, 2 where the input is bad.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    one_by_one = words[:2] == ["parity", "run"]
    options = _run_parser().parse_args(words[2:]) if one_by_one else _parser().parse_args(words)
    try:
        if one_by_one:
            paths = [path for pattern in options.fixture for path in _matching(pattern)]
        else:
            paths = _fixtures(options.folder)
        comparisons = []
        for path in paths:
            comparisons.append(run(load(path), options.dtype))
            print(_rows(comparisons[-1]) if one_by_one else _line(comparisons[-1]), flush=True)
        if options.json:
            options.json.write_text(
                json.dumps([_report(each) for each in comparisons], indent=2) + "\n"
            )
    except (OSError, ValueError) as error:
        print(f"jattn: {error}", file=sys.stderr)
        return 2
    passed = sum(comparison.passed for comparison in comparisons)
    print(f"{passed} of {len(comparisons)} fixtures are equal to PyTorch in {options.dtype}")
    return 0 if passed == len(comparisons) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jattn",
        usage=_USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["parity"])
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
        "--dtype", choices=["float64", "float32"], default="float64", help="type of the port"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="also write every row to FILE"
    )
    return parser


def _fixtures(folder: pathlib.Path) -> list[pathlib.Path]:
    """The fixtures of a folder, and of the folders in it; those of training lie deeper."""
    paths = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*/*.safetensors"))]
    if not paths:
        raise FileNotFoundError(f"no fixtures (*.safetensors) in the folder {folder}: {_WHERE}")
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


def _line(comparison: Comparison) -> str:
    numbers = (
        f"outputs {comparison.worst('max_error', 'output/'):7.1e}",
        f"gradients {comparison.worst('max_error', 'grad/'):7.1e}",
        f"of allowed {comparison.worst('share'):7.1e}",
    )
    return "  ".join([_word(comparison.passed), f"{comparison.fixture:42}", *numbers])


def _rows(comparison: Comparison) -> str:
    titles = ("max |Δ|", "relative", "ulps", "/ float32", "/ allowed")
    lines = [
        f"{comparison.fixture}: {comparison.system}, {comparison.dtype}",
        "  ".join([f"{'':4}", f"{'tensor':42}", *(f"{title:>9}" for title in titles)]),
    ]
    for row in comparison.rows:
        numbers = (row.max_error, row.relative_error, row.ulps, row.float32_ratio, row.share)
        lines.append(
            "  ".join(
                [_word(row.passed), f"{row.name:42}", *(f"{number:9.1e}" for number in numbers)]
            )
        )
    return "\n".join(lines) + "\n"


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"


if __name__ == "__main__":
    raise SystemExit(main())
