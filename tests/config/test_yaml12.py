"""Does YAML mean what version 1.2 says, with the line of each key?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from concertina.config.yaml12 import dump, parse

pytestmark = pytest.mark.unit


def value(text: str) -> Any:
    entry, problems = parse(f"key: {text}\n", "x.yaml")
    assert problems == []
    return entry.plain()["key"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("010", 10),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("2026-01-31", "2026-01-31"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("[1, a, 2.0]", (1, "a", 2.0)),
        ("{on: 1, 010: x}", {"on": 1, "010": "x"}),
        ("<<", "<<"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars(text: str, meant: object) -> None:
    read = value(text)
    assert read == meant
    assert type(read) is type(meant)


def test_infinity_and_nan() -> None:
    assert value("-.inf") == -math.inf
    assert math.isnan(value(".nan"))


def test_each_key_has_its_line() -> None:
    entry, _ = parse("a: 1\n\n# why\nb:\n  c: 2\n  d: [1,\n    2]\n", "x.yaml")
    assert entry.nearest(["a"]).place == "x.yaml:1"
    assert entry.nearest(["b"]).place == "x.yaml:4"
    assert entry.nearest(["b", "d"]).place == "x.yaml:6"
    assert entry.nearest(["b", "nowhere", "e"]).place == "x.yaml:4"


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    _, problems = parse("a: 1\nb: {c: 1}\na: 2\n", "x.yaml")
    assert [str(problem) for problem in problems] == ["x.yaml:3: a: given twice, first at x.yaml:1"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: !!python/object/apply:os.system [ls]", "x.yaml:1: not YAML: the tag tag:yaml.org,2002:python/object"),
        ("a: 1\nb: !!str 2", "x.yaml:2: not YAML: the tag"),
        ("a: &x 1\nb: *x", "x.yaml:1: not YAML: anchors and aliases are not allowed"),
        ("a: [1,", "x.yaml:1: not YAML:"),
        ("a: 1\nb: c: d", "x.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "x.yaml:2: not YAML: expected a single document"),
        ("a: \x01", "x.yaml: not YAML: unacceptable character #x0001"),
    ],
)
def test_what_is_not_allowed_says_where(text: str, line: str) -> None:
    _, problems = parse(text, "x.yaml")
    assert len(problems) == 1
    assert str(problems[0]).startswith(line)


def test_a_key_that_is_no_word() -> None:
    _, problems = parse("? [1, 2]\n: 3\n", "x.yaml")
    assert [str(problem) for problem in problems] == ["x.yaml:1: a key must be a word"]


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    st.sampled_from(["1e-4", "010", "on", "no", "12:30", "0x1", "0o7", "~", "", ".5", "1.", "-", "2026-01-31", "<<"]),
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), plain))
def test_what_is_dumped_reads_back_the_same_in_both_versions(values: dict[str, object]) -> None:
    text = dump(values)
    entry, problems = parse(text, "x.yaml")
    assert problems == []
    assert entry.plain() == values
    assert yaml.safe_load(text) == values
