"""The house: where imports point, what they cost, what public names and files owe the reader."""

import ast
import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest
from flax import nnx

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "jattn").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
ORDER = ["functional", "request", "kernels", "attention", "nn", "models", "interop", "parity"]
OPTIONAL = {"torch", "transformers"}
# Flax needs PyYAML, Orbax and rich, too
CORE = {"jax", "flax", "yaml", "optax", "chex", "einops", "safetensors", "numpy", "jattn"} | set(
    sys.stdlib_module_names
)
CORE |= {"orbax", "rich"}
MENUS = ["jattn", "jattn.functional", "jattn.nn", "jattn.models", "jattn.interop"]
PIECES = [
    "scores", "masks", "named_masks", "modifiers", "heads", "positions", "ropes", "softmax",
    "checks",
]  # fmt: skip


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, tree=None):
    """The absolute names that a file imports, with their nodes.

    `from jattn import masks` imports `jattn.masks`.
    """
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((f"{module}.{alias.name}", node) for alias in node.names)


def floor(name):
    """How high in the house a module of jattn stands; None for `jattn` itself, the menu of all."""
    parts = name.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else None


def at_import(tree):
    """The nodes that run when the file is imported: all but the bodies of functions."""
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
        if inner is not node
    }
    return [node for node in ast.walk(tree) if id(node) not in inside]


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parent.name != "jattn" or path.stem != "__init__"],
    ids=name_of,
)
def test_imports_point_one_way(path):
    own = floor(name_of(path))
    assert own is not None or path.stem in ("__main__", "__init__"), (
        f"{name_of(path)} has no place in {ORDER}"
    )
    for name, node in imports(path):
        if name.split(".")[0] == "jattn" and own is not None:
            came = floor(name)
            assert came is not None, (
                f"line {node.lineno} imports {name}, the menu: import from where it is defined"
            )
            assert came <= own, (
                f"line {node.lineno}: {name_of(path)} imports {name}, which stands above it"
            )
        assert name.split(".")[0] not in ("tests", "experiments"), (
            f"line {node.lineno} imports {name}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_core_is_imported_and_torch_only_inside_functions(path):
    tree = ast.parse(path.read_text())
    top = {id(node) for node in at_import(tree)}
    for name, node in imports(path, tree):
        package = name.split(".")[0]
        if id(node) in top:
            assert package in CORE, f"line {node.lineno} needs {package} at import"
        elif package in OPTIONAL:
            assert floor(name_of(path)) in (ORDER.index("interop"), ORDER.index("parity")), (
                f"line {node.lineno}: {package} belongs in interop and parity"
            )


def test_one_file_knows_what_is_not_in_the_main_namespace_of_jax():
    """And nothing knows what is private."""
    for path in [*SOURCES, *EXPERIMENTS]:
        for name, node in imports(path):
            private = name.startswith("jax._src")
            outside = name.startswith(("jax.interpreters", "jax.extend", "jax.experimental"))
            known = path == ROOT / "jattn" / "functional" / "compat.py"
            assert not private and (known or not outside), f"{path}:{node.lineno}: {name}"


def test_functional_never_imports_flax():
    for path in (ROOT / "jattn" / "functional").glob("*.py"):
        assert not [name for name, _ in imports(path) if name.split(".")[0] == "flax"], path


IMPORT_ALL = """
import importlib, sys, warnings
warnings.simplefilter("error")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
for name in {names}:
    importlib.import_module(name)
import jax
assert not jax._src.xla_bridge.backends_are_initialized(), "a backend was started at import"
"""


def test_every_module_imports_without_extras_and_starts_nothing():
    """In a fresh process: no torch, no extras, no warning, no array made, no backend started."""
    # Flax itself imports rich, and orbax where it is there
    blocked = {
        "torch",
        "transformers",
        "tyro",
        "babel",
        "matplotlib",
        "tokenizers",
        "pytest",
        "hypothesis",
    }
    names = [name_of(path) for path in SOURCES if path.stem != "__main__"]
    code = IMPORT_ALL.replace("{blocked}", repr(blocked)).replace("{names}", repr(names))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def public(module):
    """The public functions and classes of a menu or a piece, those of its own package."""
    for name, value in vars(module).items():
        documented = inspect.isfunction(value) or inspect.isclass(value)
        if documented and not name.startswith("_") and value.__module__.split(".")[0] == "jattn":
            yield name, value


NAMES = {
    f"{menu}.{name}": value
    for menu in [*MENUS, *(f"jattn.functional.{piece}" for piece in PIECES)]
    for name, value in public(importlib.import_module(menu))
    if menu in MENUS or value.__module__ == menu
}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_with_an_example_that_runs_as_a_doctest(name):
    """Records of plain fields need no example."""
    value = NAMES[name]
    docstring = inspect.getdoc(value)
    assert docstring and docstring.splitlines()[0].strip(), "no docstring"
    if inspect.isfunction(value) or issubclass(value, nnx.Module):
        assert doctest.DocTestParser().get_examples(docstring), "no example"


def is_overload(node):
    return any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_public_definition_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_overload(node):
            continue  # the function that follows has the docstring
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(
    "name",
    [
        "jattn",
        "jattn.functional",
        "jattn.kernels",
        "jattn.nn",
        "jattn.models",
        "jattn.interop",
        "jattn.parity",
    ],
)
def test_menus_only_export(name):
    path = ROOT / pathlib.Path(*name.split(".")) / "__init__.py"
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and node.targets[0].id.startswith("__")
        export = isinstance(node, ast.ImportFrom) and all(
            alias.asname == alias.name for alias in node.names
        )
        assert docstring or dunder or export, (
            f"line {node.lineno}: a menu holds `from … import name as name` alone"
        )


def body_lines(node):
    """The lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", [*SOURCES, *EXPERIMENTS], ids=name_of)
def test_a_file_is_one_reading_and_a_function_one_screen(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= 40, f"{node.name} has a body of {body_lines(node)} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rearrangements_are_patterns(path):
    """einops says what moves where; a transpose by numbers does not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "transpose" or not node.args[1:], (
                f"line {node.lineno}: a bare transpose"
            )
            bare = (
                node.func.attr == "transpose"
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "jnp"
            )
            assert not bare, f"line {node.lineno}: a bare jnp.transpose"
