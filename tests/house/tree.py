"""Which files are ours? What git tracks, and what it would track."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "files", "python_files", "syntax", "top_folders"]

ROOT = Path(__file__).resolve().parents[2]


@cache
def files() -> tuple[Path, ...]:
    """Tracked and untracked, ignored ones left out, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return tuple(path for name in listing.split("\0") if name and (ROOT / (path := Path(name))).is_file())


@cache
def python_files() -> tuple[Path, ...]:
    """All Python sources, tests and benchmarks included."""
    return tuple(path for path in files() if path.suffix == ".py")


@cache
def syntax(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def top_folders() -> list[str]:
    """Folders at the root that are not hidden."""
    return sorted({path.parts[0] for path in files() if len(path.parts) > 1 and not path.parts[0].startswith(".")})
