"""The commands for modules that are the user's: `jattn parity record` and `jattn parity diff`."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import sys
from typing import Any

from jattn.parity.console import console
from jattn.parity.diffing import Report, diff
from jattn.parity.fixtures import load, save
from jattn.parity.recording import record, versions

WHERE = "MODULE:FACTORY, such as my_package.models:make or my_file.py:make"


def record_parser() -> argparse.ArgumentParser:
    """The options of `jattn parity record`."""
    parser = argparse.ArgumentParser(
        prog="jattn parity record",
        description="Runs a PyTorch module in float64 and records its weights, inputs, outputs and"
        " gradients, and those of all its layers. Needs PyTorch.",
    )
    help = f"{WHERE}: a function that returns the module and its inputs, a sequence or a mapping"
    parser.add_argument("factory", metavar="MODULE:FACTORY", help=help)
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="FILE", required=True,
        help="the fixture, a safetensors file",
    )  # fmt: skip
    return parser


def record_port(options: argparse.Namespace) -> int:
    """Run `jattn parity record`."""
    versions()  # needs PyTorch, as the factory does, and says how to install it
    found = made(options.factory)
    if not (isinstance(found, tuple) and len(found) == 2):
        kind = f"{len(found)} things" if isinstance(found, tuple) else f"a {type(found).__name__}"
        raise ValueError(f"{options.factory}: expected (module, inputs), got {kind}")
    module, inputs = found
    fixture = record(module, inputs, case=type(module).__name__)
    save(options.output, fixture)
    size = options.output.stat().st_size / 1e3
    print(
        f"{options.output}: {len(fixture.parameters)} parameters,"
        f" {len(fixture.modules)} outputs of layers, {size:.0f} kB"
    )
    return 0


def diff_parser() -> argparse.ArgumentParser:
    """The options of `jattn parity diff`."""
    parser = argparse.ArgumentParser(
        prog="jattn parity diff",
        description="Holds a port against a recorded PyTorch module, layer by layer, forward and"
        " backward, and tries what would mend the first layer that differs.",
        epilog="Exit code: 0 where all is equal, 1 where some tensor differs, 2 for bad input.",
    )
    parser.add_argument(
        "fixture", type=pathlib.Path, metavar="FILE", help="from `jattn parity record`"
    )
    help = (
        f"{WHERE}: a function that returns the port, a module of Flax NNX or Linen, or a function;"
        " or a pair of it and a dict of options of `jattn.parity.diff`, such as rules and params"
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help=help)
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="also write the report to FILE"
    )
    return parser


def diff_port(options: argparse.Namespace) -> int:
    """Run `jattn parity diff`."""
    fixture = load(options.fixture)
    found = made(options.factory)
    port, given = with_options(options.factory, found)
    report = diff(fixture, port, **given)
    console().print(report)
    if options.json:
        options.json.write_text(json.dumps(_plain(report), indent=2) + "\n")
    return 0 if report.passed else 1


def _plain(report: Report) -> dict[str, Any]:
    """The report as JSON, which knows no infinity: null stands for it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if value == math.inf else value

    kept = dataclasses.asdict(dataclasses.replace(report, rules=()))
    rules = [{"torch": rule.torch, "flax": rule.flax} for rule in report.rules]
    return plain(kept) | {"rules": rules, "passed": report.passed}


def with_options(where: str, found: Any) -> tuple[Any, dict[str, Any]]:
    """What a factory returns, a module or a function, and the options beside it.

    Raises:
      ValueError: it returns something else, or options that there are not.
    """
    if not isinstance(found, tuple):
        return found, {}
    known = ("rules", "pairs", "call", "params")
    if len(found) != 2 or not isinstance(found[1], dict) or not {*found[1]} <= {*known}:
        what = f"a pair of a module and a dict of {', '.join(known)}"
        got = [[*each] if isinstance(each, dict) else type(each).__name__ for each in found]
        raise ValueError(f"{where}: expected a module or {what}, got {got}")
    return found


def made(where: str) -> Any:
    """What the function `MODULE:FACTORY` returns.

    Raises:
      ValueError: it cannot be called without arguments, or there is none of the name.
      FileNotFoundError, ImportError: neither is its module.
    """
    source, _, name = where.rpartition(":")
    if not source or not name:
        raise ValueError(f"expected {WHERE}, got {where!r}")
    if source.endswith(".py"):
        module = _of_file(pathlib.Path(source))
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(source)
        finally:
            sys.path.remove(os.getcwd())
    if not callable(factory := getattr(module, name, None)):
        raise ValueError(f"{source} has no function {name!r}")
    try:
        return factory()
    except TypeError as error:
        raise ValueError(f"{where}() fails: {error}; expected {WHERE}") from error


def _of_file(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that classes in it can be found by their names
    sys.path.insert(0, str(path.absolute().parent))  # as Python itself does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.absolute().parent))
    return module
