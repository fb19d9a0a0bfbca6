"""Does `concertina data` prepare once, tell what is there, and refuse in one line?"""

import json
from pathlib import Path

import pytest

from jobs.cli import main

pytestmark = pytest.mark.unit

JOB = """
name: small
storage_path: {folder}/runs
model: {{vocab_size: 300, max_position_embeddings: 32}}
data: {{source: {folder}/text.txt, sequence_length: 16, validation_fraction: 0.1, tokenizer: {{vocab_size: 300}}}}
cluster: {{num_workers: 1, num_nodes: 1}}
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("The bellows fold; the reeds sing.\n" * 60)
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    return str(tmp_path / "job.yaml")


def concertina(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


def facts(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_prepare_then_inspect(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("data", "prepare", job) == 0
    said = capsys.readouterr()
    assert "documents: prepared in" in said.out
    assert f"concertina data inspect {job}" in said.out
    assert said.err.startswith("training the tokenizer ...\ntokenizing")
    assert concertina("data", "inspect", job) == 0
    text = capsys.readouterr().out
    for expected in ("source      ", "sequences   ", "The bellows fold", f"concertina train {job}"):
        assert expected in text


def test_the_second_prepare_builds_nothing(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        assert concertina("data", "prepare", job, "-o", "json") == 0
        found.append(facts(capsys))
    assert [one.pop("built") for one in found] == [True, False]
    assert found[0] == found[1]


def test_inspect_of_the_job_and_of_its_folder(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    concertina("data", "prepare", job, "-o", "json")
    folder = facts(capsys)["folder"]
    assert concertina("data", "inspect", job, "--verify", "-o", "json") == 0
    of_job = facts(capsys)
    assert of_job["verified"]
    assert of_job["sequence_length"] == 16
    assert sum(of_job["sequences"].values()) == (of_job["tokens"] - 1) // 16
    assert of_job["epochs"] == 200 * 16 / of_job["sequences"]["train"]
    assert of_job["bytes_per_token"] == of_job["text_bytes"] / of_job["tokens"]
    assert 0 < of_job["vocabulary_used"] <= of_job["vocab_size"] <= 300
    assert of_job["excerpt"].startswith("The bellows fold; the reeds sing.\n")
    assert concertina("data", "inspect", folder, "-o", "json") == 0
    of_folder = facts(capsys)
    assert of_folder["sequence_length"] == 256
    assert of_folder["tokens"] == of_job["tokens"]


def test_inspect_before_prepare_names_the_command(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("data", "inspect", job, "--set", "data.max_bytes=999") == 102
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(f"run `concertina data prepare {job} --set data.max_bytes=999`")


@pytest.fixture
def mixed(job: str, tmp_path: Path) -> str:
    (tmp_path / "other.txt").write_text("Keys and buttons, and air between them.\n" * 120)
    sources = "\n".join(
        f"    {name}: {{source: {tmp_path}/{file}.txt, weight: {weight}}}"
        for name, file, weight in (("text", "text", 3), ("other", "other", 1))
    )
    path = tmp_path / "mixed.yaml"
    path.write_text(f"extends: {job}\nname: mixed\ndata:\n  source: stdlib\n  sources:\n{sources}\n")
    return str(path)


def test_a_mixture_is_shown_source_by_source(mixed: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--set", "training.steps=5")
    assert concertina("data", "prepare", mixed) == 0
    assert concertina("data", "prepare", mixed, "-o", "json") == 0
    folder = facts(capsys)["folder"]
    assert concertina("data", "inspect", mixed, *few, "--verify", "-o", "json") == 0
    found = facts(capsys)
    assert found["verified"]
    assert list(found["mixture"]) == ["other", "text"]
    text, other = found["mixture"]["text"], found["mixture"]["other"]
    assert found["tokens"] == text["tokens"] + other["tokens"]
    assert (text["weight"], other["weight"]) == (0.75, 0.25)
    assert (text["drawn"], other["drawn"]) == (60, 20)  # five steps of sixteen
    assert text["epochs"] == 60 / text["sequences"]["train"]
    assert sum(text["sequences"].values()) == (text["tokens"] - 1) // 16
    assert concertina("data", "inspect", mixed, *few) == 0
    said = capsys.readouterr()
    for expected in ("source", "epochs", f"concertina data inspect {mixed}", "0.75", "60"):
        assert expected in said.out
    assert concertina("data", "inspect", folder, "-o", "json") == 0
    assert facts(capsys)["mixture"]["text"]["drawn"] is None


def test_a_source_that_is_read_too_often_is_told(mixed: str, capsys: pytest.CaptureFixture[str]) -> None:
    concertina("data", "prepare", mixed)
    capsys.readouterr()
    assert concertina("data", "inspect", mixed, "--set", "training.steps=100") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split(" is read ")[0] for line in warnings] == ["warning: source other", "warning: source text"]
    assert "times in 100 steps: beyond 4 times" in warnings[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.source=/no/such/text", "no file or folder /no/such/text"),
        ("data.tokenizer.path=/no/tokenizer.json", "data.tokenizer.path: no file /no/tokenizer.json"),
        ("data.format=jsonl", "text.txt:1: not JSON at column 1"),
        ("storage_path=/proc/none", "cannot write to /proc/none/data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    job: str, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert concertina("data", "prepare", job, "--set", override) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
