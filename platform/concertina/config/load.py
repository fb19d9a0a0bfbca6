"""Which job do a file, the files it extends and the overrides describe?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from concertina.config.explain import explain
from concertina.config.schema import Job
from concertina.config.tree import Entry, Problem, merge
from concertina.config.yaml12 import parse
from concertina.errors import ConfigError

__all__ = ["ReadJob", "load_job", "read_job"]

SHELF = Path("jobs")


@dataclass(frozen=True)
class ReadJob:
    """A valid job, with the place of each of its values, for messages about it."""

    job: Job
    tree: Entry

    def problem(self, key: str, text: str) -> Problem:
        """A problem with this key, at the place where it was written (or its section, for a default)."""
        return Problem(self.tree.nearest(key.split(".")).place, key, text)


def load_job(path: str | Path, overrides: Iterable[str] = (), shelf: Path = SHELF) -> Job:
    """The job of a file, or of the name of a file on the `shelf` folder.

    `overrides` are `training.steps=50`: applied in order, after the file and all it extends. Raises ConfigError
    with every problem, one line each, also in `data["problems"]`.
    """
    return read_job(path, overrides, shelf).job


def read_job(path: str | Path, overrides: Iterable[str] = (), shelf: Path = SHELF) -> ReadJob:
    """As `load_job`, with the places."""
    problems: list[Problem] = []
    tree = _read(_find(str(path), Path(), shelf), shelf, (), problems)
    for override in overrides:
        tree = merge(tree, _override(override, tree.place, problems))
    try:
        job = Job.model_validate(tree.plain(), strict=True)
    except ValidationError as error:
        raise _refusal([*problems, *explain(error, tree)]) from None
    if problems:
        raise _refusal(problems)
    return ReadJob(job, tree)


def _refusal(problems: list[Problem]) -> ConfigError:
    lines = [str(problem) for problem in sorted(problems, key=lambda problem: problem.order)]
    return ConfigError("\n".join(lines), problems=lines)


def _find(name: str, beside: Path, shelf: Path) -> Path:
    """The file called `name`, relative to `beside`; a bare word may also be a job on the shelf."""
    candidates = [beside / name]
    if not name.endswith((".yaml", ".yml")) and "/" not in name:
        candidates += [beside / f"{name}.yaml", shelf / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    there = ", ".join(sorted(file.stem for file in shelf.glob("*.yaml"))) or "none"
    raise ConfigError(f"{candidates[0]}: no such job file; named jobs: {there}", path=str(candidates[0]))


def _read(path: Path, shelf: Path, above: tuple[Path, ...], problems: list[Problem]) -> Entry:
    """The file's entries over those of the files it extends."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    tree, found = parse(text, str(path))
    problems += found
    if any(not problem.key for problem in found):
        raise _refusal(problems)  # not YAML: whatever else we said about the file would mislead
    if not tree.is_section:
        raise _refusal([*problems, Problem(tree.place, "", "a job file holds keys such as `name: my-job`")])
    extends = tree.value.get("extends")
    if extends is None:
        return tree
    own = Entry({key: entry for key, entry in tree.value.items() if key != "extends"}, tree.place)
    return merge(_extended(extends, path, shelf, above, problems), own)


def _extended(extends: Entry, path: Path, shelf: Path, above: tuple[Path, ...], problems: list[Problem]) -> Entry:
    """What the file at `path` builds on."""
    if not isinstance(extends.value, str):
        raise _refusal([Problem(extends.place, "extends", "expected one file or the name of a job")])
    seen = (*above, path.resolve())
    try:
        below = _find(extends.value, path.parent, shelf)
    except ConfigError as error:
        raise _refusal([Problem(extends.place, "extends", error.message)]) from None
    if below.resolve() in seen:
        ring = " -> ".join(file.name for file in (*seen, below))
        raise _refusal([Problem(extends.place, "extends", f"goes in a circle: {ring}")])
    return _read(below, shelf, seen, problems)


def _override(text: str, place: str, problems: list[Problem]) -> Entry:
    """`a.b=c` as a tree of its own; the root keeps the file's place, for keys that are nowhere."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(Problem("--set", text, "expected key=value, such as training.steps=50"))
        return Entry({}, place)
    entry, found = parse(value, "--set")
    if found:
        problems += [Problem("--set", key, problem.text) for problem in found]
        return Entry({}, place)
    for part in reversed(key.split(".")):
        entry = Entry({part: entry}, "--set")
    return Entry(entry.value, place)
