"""Does the collector leave alone what is imported, and still find what is thrown away afterwards?"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import gc, weakref
import yaml, pydantic
from infra.garbage import spare_imports

class Node:
    pass

before = len(gc.get_objects())
spare_imports()
assert len(gc.get_objects()) < before / 100, "imports are still looked at"
node = Node()
node.itself, seen = node, weakref.ref(node)
del node
gc.collect()
assert seen() is None
"""


def test_imports_are_spared_and_garbage_is_not() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
