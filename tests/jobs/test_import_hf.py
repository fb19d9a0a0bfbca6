"""Does `concertina import hf` say what it made, in text and JSON, and leave with the code its documentation gives?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.opening import open_job
from tests.hf.folders import source

pytestmark = pytest.mark.unit


def code_of(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code if isinstance(left.value.code, int) else 0


def test_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "imported"
    assert code_of("import", "hf", str(source("qwen2")), str(target)) == 0
    said, beside = capsys.readouterr()
    assert beside.endswith("written; reading it back\n")
    assert f"{target}: a qwen2_moe, 39.0 k parameters, 29.8 k active" in said
    assert "55 tensors, shapes, every weight, logits; transformers 5.23.0 says the same" in said
    assert f"{target}/model.yaml, to `extends` in a job file" in said
    assert f"concertina export hf {target} OUT_DIR" in said
    for command in ("inspect", "verify"):
        assert code_of("ckpt", command, str(target)) == 0


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("import", "hf", str(source("mixtral")), str(tmp_path / "imported"), "-o", "json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "mixtral"
    assert facts["tensors"] == 41
    assert facts["left_out"] == []
    assert facts["parameters"] > facts["active_parameters"] > 0
    assert facts["verified"] is True


def test_a_job_file_may_extend_what_lies_beside(tmp_path: Path) -> None:
    assert code_of("import", "hf", str(source("deepseek")), str(tmp_path / "imported")) == 0
    text = "extends: imported/model.yaml\nname: tuned\ndata: {sequence_length: 64, tokenizer: {path: t}}\n"
    (tmp_path / "tuned.yaml").write_text(text)
    opened = open_job(str(tmp_path / "tuned.yaml"))
    assert opened.job.model.kv_lora_rank == 16
    assert opened.job.model.has_router_bias
    assert opened.job.training.precision == "float32"


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    for folder in (other, damaged):
        shutil.copytree(source("mixtral"), folder)
    (other / "config.json").write_text((other / "config.json").read_text().replace('"mixtral"', '"gpt_oss"'))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    target = str(tmp_path / "imported")
    for words, code, said in [
        ((str(tmp_path), target), 102, f"error: {tmp_path}: no config.json"),
        ((str(other), target), 2, "error: model_type=gpt_oss is not supported: use one of mixtral"),
        ((str(damaged), target), 105, f"error: {weights}: not a safetensors file"),
        ((str(source("mixtral")), str(tmp_path)), 2, f"error: {tmp_path} is there already"),
    ]:
        assert code_of("import", "hf", *words) == code, words
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(said)
        assert printed.err.count("\n") == 1
    assert not Path(target).exists()


def test_it_works_without_transformers(tmp_path: Path) -> None:
    """It is an oracle and no dependency."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"  # what Python takes for: it is not installed
        "from jobs.cli import main\n"
        f"words = [['import', 'hf', {str(source('olmoe'))!r}, {str(tmp_path / 'in')!r}],\n"
        f"         ['export', 'hf', {str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}]]\n"
        "for each in words:\n"
        "    try: main(each)\n"
        "    except SystemExit as left: assert not left.code, left.code\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "says the same" not in done.stdout
    assert done.stdout.count("every weight, logits\n") == 2
