"""Do the sources of a job say what they leave out, and is each that cannot be meant refused?"""

from __future__ import annotations

from pathlib import Path

import pytest

from concertina.config import DataConfig, Job, dump_job, load_job
from concertina.errors import ConfigError

pytestmark = pytest.mark.unit

MIXTURE = {
    "text_field": "body",
    "max_bytes": 1000,
    "sequence_length": 64,
    "sources": {
        "prose": {"source": "a.jsonl", "weight": 0.25, "max_bytes": 10},
        "code": {"source": ["b", "c"], "text_field": "content"},
    },
}


def test_parts_say_what_data_says_unless_they_say_it_themselves() -> None:
    parts = DataConfig.model_validate(MIXTURE).parts
    assert list(parts) == ["code", "prose"], "the order of keys means nothing"
    assert parts["code"] == DataConfig(source=("b", "c"), text_field="content", max_bytes=1000, sequence_length=64)
    assert (parts["prose"].text_field, parts["prose"].max_bytes) == ("body", 10)
    assert all(part.sources is None for part in parts.values())
    assert DataConfig().parts == {}


def test_a_mixture_that_was_written_down_loads_back(tmp_path: Path) -> None:
    job = Job(name="a", data=DataConfig.model_validate(MIXTURE))
    (tmp_path / "a.yaml").write_text(dump_job(job))
    assert load_job(tmp_path / "a.yaml") == job
    assert load_job(tmp_path / "a.yaml", ["data.sources.code.weight=3"]).data.sources["code"].weight == 3.0


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data={sources: {}}", "data.sources: a mixture needs at least one source"),
        ("data.source=x", "data.sources: source='x' and sources both say where the text comes from"),
        ("data.sources.a.wieght=1", "data.sources.a.wieght: unknown key, did you mean data.sources.a.weight?"),
        ("data.sources.a.weight=0", "data.sources.a.weight: 0 is too small, must be more than 0"),
        ("data.sources.a.format=csv", "data.sources.a.format: expected auto, text"),
        ("data.sources.b.weight=2", "data.sources.b.source: missing"),
        ("data.sources.Be={source: x}", "data.sources.Be: 'Be' is no name"),
        ("data.sources=[{source: x}]", "data.sources: "),
    ],
)
def test_one_refusal(override: str, line: str, tmp_path: Path) -> None:
    sources = "" if override == "data={sources: {}}" else "data:\n  sources: {a: {source: y}}\n"
    (tmp_path / "x.yaml").write_text(f"name: x\n{sources}")
    with pytest.raises(ConfigError) as caught:
        load_job(tmp_path / "x.yaml", [override])
    assert any(found.partition(": ")[2].startswith(line) for found in caught.value.data["problems"]), str(caught.value)
