"""What is wrong with a job file, said as a person would: key, numbers, the nearest known key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from concertina.config.schema import Job
from concertina.config.section import Misfits
from concertina.config.tree import Entry, Problem

__all__ = ["ANY_NAME", "explain", "known_keys", "section_below"]

ANY_NAME = "NAME"
"""Stands for a key that a person chooses."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (in quotes if it looks like a number)",
    "tuple_type": "a list such as [1, 2]",
    "finite_number": "a finite number",
}
_BOUND = {
    "greater_than_equal": "{value} is too small, must be at least {ge}",
    "greater_than": "{value} is too small, must be more than {gt}",
    "less_than_equal": "{value} is too large, must be at most {le}",
    "less_than": "{value} is too large, must be less than {lt}",
}


def explain(error: ValidationError, tree: Entry) -> list[Problem]:
    """One problem a line, each at the place its value was written, in the order of the schema."""
    problems: dict[str, tuple[bool, Problem]] = {}
    for fault in error.errors(include_url=False):
        path = _path(fault["loc"], tree)
        for key, text in _lines(fault, path):
            place = tree.nearest(key.split(".")).place
            # a union reports once a branch; its first complaint is enough, or that of the branch that took the list
            name = key + text if fault["type"] == "value_error" else key
            inside = bool(fault["loc"]) and isinstance(fault["loc"][-1], int)
            if name not in problems or (inside and not problems[name][0]):
                problems[name] = inside, Problem(place, key, text)
    return [problem for _, problem in problems.values()]


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key a job file may hold, sections included; ANY_NAME where a person chooses it."""
    return tuple(_keys(Job, ""))


def section_below(field: FieldInfo) -> tuple[type[BaseModel], str] | None:
    """The section that a key holds, and what comes between the two: nothing, or the name of one of several."""
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation, ""
        if get_origin(annotation) is dict:
            return get_args(annotation)[1], f".{ANY_NAME}"
    return None


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if below := section_below(field):
            inner, between = below
            if between:
                yield f"{prefix}{name}{between}"
            yield from _keys(inner, f"{prefix}{name}{between}.")


def _path(loc: Sequence[str | int], tree: Entry) -> tuple[str, ...]:
    """Pydantic's location without what no file holds: branches of unions and indices into lists."""
    path: list[str] = []
    entry = tree
    for part in loc:
        if not (entry.is_section and isinstance(part, str)):
            break
        path.append(part)
        entry = entry.nearest([part])
        if part not in tree.nearest(path[:-1]).value:
            break
    return tuple(path)


def _lines(fault: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key, text) of each line that this fault becomes."""
    kind, key, context = fault["type"], ".".join(path), fault.get("ctx", {})
    if kind == "extra_forbidden":
        yield key, f"unknown key, {_hint(key)}"
    elif kind == "missing":
        yield key, "missing"
    elif kind in {"model_type", "model_attributes_type", "dict_type"}:
        yield key, f"expected keys below it, got {_shown(fault['input'])}"
    elif kind == "literal_error":
        yield key, _choice(context["expected"], fault["input"])
    elif kind == "value_error" and isinstance(context.get("error"), Misfits):
        for below, text in context["error"].problems:
            yield ".".join((*path, below)), text
    elif kind in _BOUND:
        yield key, _BOUND[kind].format(value=_shown(fault["input"]), **context)
    elif kind == "string_pattern_mismatch":
        yield key, f"{_shown(fault['input'])} is no name: up to 40 of a-z 0-9 . _ -, a letter or digit at both ends"
    elif kind in _EXPECTED:
        yield key, f"expected {_EXPECTED[kind]}, got {_shown(fault['input'])}"
    else:
        yield key, fault["msg"]


def _hint(key: str) -> str:
    """The nearest known key, or the keys there are."""
    for named in (known for known in known_keys() if known.endswith(f".{ANY_NAME}")):
        above = named.removesuffix(ANY_NAME)
        chosen, dot, rest = key.removeprefix(above).partition(".")
        if key.startswith(above) and dot:
            return _hint_among(f"{named}.{rest}").replace(named, above + chosen)
    return _hint_among(key)


def _hint_among(key: str) -> str:
    section, _, word = key.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = [k for k in known_keys() if k.startswith(prefix) and "." not in k[len(prefix) :]]
    by_word = {name.rpartition(".")[2]: name for name in reversed(known_keys())}
    near = get_close_matches(key, siblings, n=1, cutoff=0.7)
    if not near and (word in by_word):
        near = [by_word[word]]
    if not near:
        near = get_close_matches(key, known_keys(), n=1, cutoff=0.8)
    if not near:
        near = [by_word[other] for other in get_close_matches(word, by_word, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(name.rpartition('.')[2] for name in siblings)}"


def _choice(expected: str, given: Any) -> str:
    options = [word.strip(" '\"") for word in expected.replace(" or ", ", ").split(",")]
    near = get_close_matches(str(given), options, n=1, cutoff=0.5) if len(options) > 1 else []
    hint = f", did you mean {near[0]}?" if near else ""
    return f"expected {expected.replace(chr(39), '')}, got {_shown(given)}{hint}"


def _shown(value: Any) -> str:
    """The value as YAML would write it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"keys ({', '.join(value)})"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
