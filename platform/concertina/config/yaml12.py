"""What does this YAML say, and on which line?

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is false, `010` is eight and `12:30` is 750. Here the scalars
are those of YAML 1.2's core schema. Tags, anchors and aliases are refused: they can name Python types, or unfold
a small file into a huge one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from concertina.config.tree import Entry, Problem

__all__ = ["dump", "parse"]

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


def parse(text: str, file: str) -> tuple[Entry, list[Problem]]:
    """The document as entries with `file:line` places (`file` alone when it is `--set`), and all that is wrong
    with its form; with a syntax error the entry is an empty section."""
    reading = _Reading(file)
    try:
        node = yaml.compose(text, Loader=_Composer)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        place = reading.place(mark.line if mark else 0)
        return Entry({}, place), [Problem(place, "", f"not YAML: {said}")]
    except yaml.YAMLError as error:
        return Entry({}, file), [Problem(file, "", f"not YAML: {error}".splitlines()[0])]
    if node is None:
        return Entry(None, reading.place(0)), []
    return reading.entry(node, ()), reading.problems


def dump(value: Any) -> str:
    """YAML that both 1.1 and 1.2 readers understand alike, keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Composer(yaml.SafeLoader):
    """Composes nodes only, without anchors and tags; what a plain scalar means is decided in `_scalar`."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise _refusal("anchors and aliases are not allowed, write the value out", event)
        if getattr(event, "tag", None):
            raise _refusal(f"the tag {event.tag} is not allowed", event)
        return super().compose_node(parent, index)


def _refusal(said: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=said, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern, _tag in ((_INT, "int"), (_FLOAT, "float")):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))


class _Reading:
    """One pass over a document's nodes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def place(self, line: int) -> str:
        """Lines of YAML marks count from 0."""
        return self.file if self.file.startswith("--") else f"{self.file}:{line + 1}"

    def entry(self, node: yaml.Node, path: tuple[str, ...]) -> Entry:
        place = self.place(node.start_mark.line)
        if isinstance(node, yaml.MappingNode):
            return Entry(self.section(node, path), place)
        if isinstance(node, yaml.SequenceNode):
            return Entry(tuple(self.entry(item, path).plain() for item in node.value), place)
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        return Entry(node.value if quoted else _scalar(node.value), place)

    def section(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node.start_mark.line)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(place, ".".join(path), "a key must be a word"))
                continue
            key = key_node.value
            here = (*path, key)
            if key in entries:
                first = entries[key].place
                self.problems.append(Problem(place, ".".join(here), f"given twice, first at {first}"))
            entries[key] = Entry(self.entry(value_node, here).value, place)
        return entries


def _scalar(word: str) -> Any:
    """Value of a plain scalar by YAML 1.2's core schema."""
    if _NULL.match(word):
        return None
    if _BOOL.match(word):
        return word.lower() == "true"
    if _INT.match(word):
        base = {"0o": 8, "0x": 16}.get(word[:2], 10)
        return int(word, base)
    if _FLOAT.match(word):
        return float(word)
    return _SPECIAL.get(word.lower(), word)
