"""Does `concertina export hf` find a run's newest checkpoint or a folder, say what it wrote, and refuse in one line?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from concertina.config import Job, Precision
from concertina.data.tokenizer import train_tokenizer
from concertina.hf.importing import import_folder
from concertina.layout import Layout
from concertina.model.families import Family
from concertina.track.run import DataFacts, RunFolder, create_run
from jobs.cli import main
from jobs.commands.export_hf import Dtype, FamilyName
from tests.hf.folders import recut, source, tensors_in
from tests.train.worlds import tiny_job

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "imported"
    import_folder(source("deepseek"), folder, most_compared=0)
    return folder


@pytest.fixture
def run(imported: Path, tmp_path: Path) -> RunFolder:
    """A run of the imported model on four ranks, with a checkpoint of step 3."""
    import yaml

    model = yaml.safe_load((imported / "model.yaml").read_text())["model"]
    job: Job = tiny_job().model_copy(update={"model": type(tiny_job().model).model_validate(model)})
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    train_tokenizer(["some words"], 300).save(str(corpus / "tokenizer.json"))
    folder = create_run(tmp_path / "runs", job, DataFacts("some words", "f00d", 99, str(corpus)), "latent")
    recut(imported, job.model, Layout(4, tp=2, ep=2), folder.checkpoints)
    return folder


def code_of(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code if isinstance(left.value.code, int) else 0


def test_choices_are_those_of_the_library() -> None:
    assert set(get_args(FamilyName)) == set(get_args(Family))
    assert set(get_args(Dtype)) == set(get_args(Precision))


def test_of_a_run(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert code_of("export", "hf", "late", str(out), "--storage", str(run.storage)) == 0
    said, beside = capsys.readouterr()
    assert beside.endswith("written; reading it back\n")
    assert f"{out}: a deepseek_v3 in float32, " in said
    assert "53 tensors, shapes, every weight, logits; transformers 5.23.0 says the same" in said
    assert "tokenizer  copied" in said
    assert f"concertina import hf {out} CKPT_DIR" in said
    card = (out / "README.md").read_text()
    assert "# latent" in card
    assert "| step | 3 |" in card
    assert "| layout it was trained on | world=4 pp=1 dp=2 cp=1 tp=2 edp=2 ep=2 etp=1 |" in card
    assert "| corpus | some words (f00d) |" in card
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    original = tensors_in(source("deepseek"))
    assert all(tensor.equal(original[name]) for name, tensor in tensors_in(out).items())


def test_of_an_import_as_json_in_files_of_a_size(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dtype", "bfloat16", "--shard-bytes", "30000", "--family", "deepseek_v3", "-o", "json")
    assert code_of("export", "hf", str(imported), str(tmp_path / "out"), *words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] is True
    assert facts["compared_with"] == "transformers 5.23.0"
    assert facts["dtype"] == "bfloat16"
    assert facts["tokenizer"] is False
    assert len(facts["files"]) > 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == facts["files"]


def test_refusals_are_one_line(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    bare = tmp_path / "bare"
    shutil.copytree(imported, bare)
    (bare / "model.yaml").unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(imported, damaged)
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    garbled = tmp_path / "garbled"
    shutil.copytree(imported, garbled)
    (garbled / "model.yaml").write_text("model: {hidden_size: none}")
    for words, code, said in [
        (("export", "hf", str(imported), out, "--family", "olmoe"), 2, "error: no family of Hugging Face's says this"),
        (("export", "hf", str(imported), str(tmp_path)), 2, f"error: {tmp_path} is there already and not empty"),
        (("export", "hf", str(bare), out), 2, f"error: {bare}: no job file beside it says what model it is of"),
        (("export", "hf", str(bare), out, "--job", "quickstart"), 2, "error: no family of Hugging Face's says this"),
        (("export", "hf", str(garbled), out), 2, f"error: {garbled}/model.yaml: does not say what model this is of"),
        (("export", "hf", str(damaged), out), 105, f"error: {file}: sha256 differs"),
        (("export", "hf", "nobody", out, "--storage", str(tmp_path)), 102, "error: no runs under"),
    ]:
        assert code_of(*words) == code, words
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(said)
        assert printed.err.count("\n") == 1
    assert not Path(out).exists()


def test_a_job_file_may_be_given(imported: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(imported, bare)
    (bare / "model.yaml").rename(tmp_path / "model.yaml")
    job = "extends: model.yaml\nname: again\ndata: {sequence_length: 64, tokenizer: {path: none}}\n"
    (tmp_path / "again.yaml").write_text(job)
    assert code_of("export", "hf", str(bare), str(tmp_path / "out"), "--job", str(tmp_path / "again.yaml")) == 0
