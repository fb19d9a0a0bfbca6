"""Which commands does the documentation tell a person to type?

In a Markdown page: lines that begin with `$ concertina` or `$ make` in a ```console block; a line `error: ...` right
after one says that it is refused. In `--help`: lines that begin with `concertina`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.house.tree import ROOT, files

__all__ = ["Documented", "commands", "help_examples"]


@dataclass(frozen=True)
class Documented:
    """One command line and where it stands."""

    place: str
    line: str
    refusal: str | None = None

    @property
    def words(self) -> list[str]:
        """As a shell would split it, up to a pipe."""
        return shlex.split(self.line.partition("|")[0], comments=True)


@cache
def commands() -> tuple[Documented, ...]:
    """Every command of every page, in the order of pages and lines."""
    pages = [path for path in files() if path.suffix == ".md" and len(path.parts) <= 2]
    return tuple(found for page in pages for found in _in_page(page))


def help_examples(command: str, text: str) -> list[Documented]:
    """The examples in a command's --help."""
    lines = re.findall(r"^ +(concertina .+)$", text, flags=re.MULTILINE)
    return [Documented(f"concertina {command} --help", line.strip()) for line in lines]


def _in_page(page: Path) -> Iterator[Documented]:
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```console\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"\$ (concertina|make)\b", line):
                yield Documented(str(page), line[2:], after if after.startswith("error: ") else None)
