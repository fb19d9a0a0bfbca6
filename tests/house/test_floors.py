"""Do arrows go down only, and does the ground stand without torch, ray and mlflow?"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.tree import ROOT

pytestmark = pytest.mark.unit

HEAVY = ("torch", "ray", "mlflow")

IMPORT_EVERYTHING_WITHOUT = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError(name + " is blocked here")

sys.meta_path.insert(0, Refuse())
package = importlib.import_module({name!r})
for module in pkgutil.walk_packages(getattr(package, "__path__", []), {name!r} + "."):
    importlib.import_module(module.name)
assert not set({heavy!r}) & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["errors", "config", "layout", "planner", "elastic"])
def test_the_ground_imports_without_torch_ray_and_mlflow(name: str) -> None:
    code = IMPORT_EVERYTHING_WITHOUT.format(heavy=HEAVY, name=f"concertina.{name}")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_layers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
