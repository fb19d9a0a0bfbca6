"""Do files, functions and constructors stay under the ceilings, with no exceptions listed?"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.house.tree import ROOT, files, python_files, syntax

pytestmark = pytest.mark.unit

MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_CONSTRUCTOR_ARGUMENTS = 7
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc"}


def classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(syntax(path)) if isinstance(node, ast.ClassDef))


def long_files(path: Path) -> Iterator[str]:
    count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    if count > MOST_FILE_LINES:
        yield f"{path}: {count} lines"


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > MOST_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {count} lines"


def wide_constructors(path: Path) -> Iterator[str]:
    """Written constructors; a frozen dataclass of many fields is the config object the rule asks for."""
    for node in classes(path):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                arguments = item.args.posonlyargs + item.args.args + item.args.kwonlyargs
                count = len(arguments) - 1
                if count > MOST_CONSTRUCTOR_ARGUMENTS:
                    yield f"{path}:{item.lineno}: {node.name} takes {count} arguments"


def nondescript_names(path: Path) -> Iterator[str]:
    if path.stem in FORBIDDEN_STEMS:
        yield f"{path}: a helper lives with its one user until it has two, then under a name that says what it is"


def missing_questions(path: Path) -> Iterator[str]:
    if syntax(path).body and not ast.get_docstring(syntax(path)):
        yield f"{path}: no module docstring; it says which question the file answers"


def busy_packages(path: Path) -> Iterator[str]:
    """An __init__.py re-exports, lists __all__, and does nothing else."""
    if path.name != "__init__.py":
        return
    for node in syntax(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        named = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and target.id in {"__all__", "__version__"} for target in node.targets
        )
        if not (docstring or named or isinstance(node, ast.ImportFrom)):
            yield f"{path}:{node.lineno}: more than a re-export"


RULES = [long_files, long_functions, wide_constructors, nondescript_names, missing_questions, busy_packages]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    assert [line for path in python_files() for line in rule(path)] == []


def test_platform_is_a_folder_and_no_package() -> None:
    """An __init__.py there would hide Python's own `platform`."""
    assert [path for path in files() if path.parent == Path("platform") and path.suffix == ".py"] == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (long_files, "x = 1\n" * 501),
        (long_functions, "def f():\n" + "    x = 1\n" * 60),
        (wide_constructors, "class A:\n    def __init__(self, a, b, c, d, *, e, f, g, h): ...\n"),
        (missing_questions, "import os\n"),
    ],
)
def test_rules_see_what_they_forbid(rule: Callable[[Path], Iterator[str]], text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    assert len(list(rule(tmp_path / "a.py"))) == 1
