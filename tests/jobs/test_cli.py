"""Does the command line start light, refuse in one line, and leave with the code its documentation gives?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from concertina import errors
from concertina.config import load_job
from concertina.layout import Layout
from concertina.planner.activations import activations, layer_bytes
from concertina.planner.flops import flops_per_token
from concertina.planner.memory import rank_bytes
from concertina.planner.traffic import Sender
from jobs.cli import COMMANDS, main

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
Outcome = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`run("layout", "--world", "8")` -> exit code, stdout, stderr; in this process."""

    def inside(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main(words)
        captured = capsys.readouterr()
        code = left.value.code
        return (code if isinstance(code, int) else 0, captured.out, captured.err)

    return inside


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], ["ray", "torch", "mlflow"]),
        *[([name, "--help"], ["ray", "torch", "mlflow"]) for name, _ in COMMANDS],
        (["validate", "quickstart"], ["ray", "torch", "mlflow", "numpy"]),
        (["layout", "quickstart"], ["ray", "torch", "mlflow", "numpy"]),
        (["layout", "--world", "8"], ["ray", "torch", "mlflow", "numpy", "yaml", "concertina.config"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_a_command_may_not_import(words: list[str], forbidden: list[str]) -> None:
    """Start-up time, without a clock: `ray` takes 0.4 s to import, `mlflow` 1.3 s, `torch` 1 s and more."""
    code = (
        "import sys\nfrom jobs.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        f"found = set({forbidden!r}) & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command(run: Callable[..., Outcome]) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name, _ in COMMANDS)
    assert run("-h")[1] == out


def test_without_words_there_is_help(run: Callable[..., Outcome]) -> None:
    code, out, err = run()
    assert code == 2
    assert "Usage: concertina" in out + err


def test_version(run: Callable[..., Outcome]) -> None:
    assert run("--version")[:2] == (0, "concertina 0.1.0\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("layot",), "Did you mean 'layout'?"),
        (("layout", "--wrld", "8"), "No such option: --wrld"),
        (("layout", "--world", "0"), "Invalid value for '--world'"),
        (("layout",), "error: which layout? Give a job file, or --world and degrees"),
        (("layout", "--world", "8", "--ep", "6"), "error: ep=6 must divide dp*cp*tp=8: set layout.ep to 1, 2, 4 or 8"),
        (("layout", "nowhere"), "error: nowhere: no such job file; named jobs: "),
        (("validate", "quickstart", "--set", "layout.ep=3"), "error: --set: layout.ep: ep=3 must divide dp*cp*tp=4"),
    ],
)
def test_usage_errors_leave_with_2(run: Callable[..., Outcome], words: tuple[str, ...], said: str) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert said in err
    assert out == ""
    assert "Traceback" not in err


def test_a_refused_layout_is_one_line(run: Callable[..., Outcome]) -> None:
    _, _, err = run("layout", "--world", "12", "--pp", "5")
    assert err == "error: pp=5 must divide world=12: set layout.pp to 1, 2, 3, 4, 6 or 12\n"


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_the_traceback_wherever_it_stands(place: int) -> None:
    words = ["layout", "--world", "8", "--ep=6"]
    with pytest.raises(errors.LayoutError):
        main([*words[:place], "--debug", *words[place:]])


def test_exit_codes_are_those_of_the_documentation() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "ConcertinaError": 1,
        "UserError": 2,
        "ConfigError": 2,
        "LayoutError": 2,
        "DataError": 2,
        "RunFailed": 100,
        "RankFailure": 100,
        "StateError": 100,
        "NotFoundError": 102,
        "RunStopped": 103,
        "CapacityError": 104,
        "CheckpointError": 105,
    }


def test_layout_prints_the_document(run: Callable[..., Outcome]) -> None:
    words = ["--world=64", "--pp=2", "--cp=2", "--tp=4", "--ep=8", "--etp=1", "-o", "json"]
    code, out, err = run("layout", *words)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert json.loads(out) == Layout(64, pp=2, cp=2, tp=4, ep=8, etp=1).to_json()


def test_layout_of_16384_ranks(run: Callable[..., Outcome]) -> None:
    code, out, _ = run("layout", "--world", "16384", "--pp", "8", "--tp", "8", "--ep", "64", "-o", "json")
    groups = json.loads(out)["groups"]
    assert code == 0
    assert all(sum(map(len, ranks)) == 16384 for ranks in groups.values())


def test_layout_of_a_job_takes_degrees_from_the_command_line(run: Callable[..., Outcome]) -> None:
    code, out, _ = run("layout", "quickstart", "--world", "6", "--ep", "3", "-o", "json")
    assert code == 0
    assert json.loads(out)["expert"] == {"pp": 1, "edp": 2, "ep": 3, "etp": 1}


def test_layout_of_a_job_prints_what_it_takes(run: Callable[..., Outcome]) -> None:
    words = ["layout", "quickstart", "--world", "6", "--tp", "2", "--ep", "3"]
    document = json.loads(run(*words, "-o", "json")[1])
    job = load_job(ROOT / "jobs/quickstart.yaml")
    layout = Layout(6, tp=2, ep=3)
    held = {rank: rank_bytes(job.model, layout, "float32", rank, (rank,)) for rank in range(6)}
    assert {key: document[key] for key in layout.to_json()} == layout.to_json()
    assert document["parameters"] == {"total": 4_921_728, "active": 2_267_520}
    assert document["flops_per_token"] == flops_per_token(job.model, 256)
    assert document["bytes_per_rank"] == {
        "largest": {"rank": 0, **held[0].to_json()},
        "smallest": {"rank": 2, **held[2].to_json()},
    }
    kept = activations(Sender(job.model, layout, 0), 256, 3, "cpu").kept  # eight sequences over dp 3
    assert document["activations"] == {"rank": 0, "kept": kept, "again": 0}
    _, out, _ = run(*words)
    assert "\nmodel       4.9 M parameters, 2.3 M of them active for a token\n" in out
    assert "MiB of a micro-batch of 3 x 256 tokens, even routing\n" in out.partition("\nactivations ")[2]
    assert (
        "\ntraining    14.2 MFLOP a token: products of forward and backward, causal attention over 256 tokens\n" in out
    )
    rows = out.partition("\nmemory, float32 ")[2].splitlines()
    assert rows[0].split() == ["weights", "gradients", "optimizer", "second", "copies", "total"]
    assert rows[1] == "  rank 0, most          7.71 MiB   13.68 MiB   12.78 MiB      17.04 MiB   51.20 MiB"
    assert rows[2].startswith("  rank 2, least ")
    assert len({len(row) for row in rows[1:3]}) == 1
    assert len("memory, float32 " + rows[0]) == len(rows[1]), "names stand over their numbers"


def test_layout_of_equal_ranks_and_of_stages(run: Callable[..., Outcome]) -> None:
    row = "\n  every rank           12.02 MiB   16.72 MiB   14.08 MiB      18.77 MiB   61.60 MiB\n"
    assert row in run("layout", "quickstart")[1]
    _, out, _ = run("layout", "mixtral-8x7b", "--world", "64", "--tp", "2", "--ep", "8")
    assert "\nmodel       46.7 B parameters, 12.9 B of them active for a token\n" in out
    assert "\ntraining    79.7 GFLOP a token: " in out
    assert "\nlayers      pp0 0-7, pp1 8-15, pp2 16-23, pp3 24-31\n" in out
    assert "\n  rank 48, most         3.06 GiB    8.85 GiB " in out
    assert "\nlayers      pp0 0 2, pp1 1 3\n" in run("layout", "quickstart-pipeline")[1]
    document = json.loads(run("layout", "mixtral-8x7b", "-o", "json")[1])
    assert document["bytes_per_rank"]["largest"]["rank"] == 48
    # Four stages: the first has four of the sixteen micro-batches in flight, in eight layers, and what it sent of them.
    model = load_job(ROOT / "jobs/mixtral-8x7b.yaml").model
    layer = layer_bytes(Sender(model, Layout(64, pp=4, ep=8), 0, "bfloat16"), 4096, 1, True, "cuda")
    assert document["activations"] == {"rank": 0, "kept": 4 * (8 * layer.kept + 4096 * 4096 * 2), "again": 0}
    assert json.loads(run("layout", "quickstart-latent", "-o", "json")[1])["activations"] is None


def test_layout_ends_with_the_next_command(run: Callable[..., Outcome]) -> None:
    _, out, _ = run("layout", "--world", "8", "--ep", "4")
    assert out.splitlines()[-1].startswith("  concertina layout --world 8 --ep 4 -o json")


def test_validate_prints_facts(run: Callable[..., Outcome]) -> None:
    code, out, _ = run("validate", str(ROOT / "jobs/quickstart.yaml"))
    assert code == 0
    assert "quickstart.yaml is valid" in out
    assert "concertina train" in out
    code, out, _ = run("validate", "mixtral-8x7b", "olmoe-1b-7b", "-o", "json")
    documents = [json.loads(line) for line in out.splitlines()]
    assert [document["name"] for document in documents] == ["mixtral-8x7b", "olmoe-1b-7b"]
    assert documents[0]["parameters"]["total"] == 46_702_792_704
    assert documents[0]["layout"]["edp"] == 2


def test_validate_reports_every_file(run: Callable[..., Outcome], tmp_path: Path) -> None:
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.yaml").write_text(f"name: {stem}\ntraning: {{}}\nlayout: {{ep: 0}}\n")
    code, out, err = run("validate", f"{tmp_path}/a.yaml", "quickstart", f"{tmp_path}/b.yaml", "-o", "json")
    documents = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert [document["valid"] for document in documents] == [False, True, False]
    assert err.splitlines() == [f"error: {line}" for document in documents for line in document.get("problems", [])]
    assert len(err.splitlines()) == 4


def test_validate_resolved_is_a_job_file(run: Callable[..., Outcome], tmp_path: Path) -> None:
    code, out, _ = run("validate", "mixtral-8x22b", "--resolved", "--set", "training.steps=7")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    assert run("validate", f"{tmp_path}/again.yaml", "--resolved")[1] == out
    assert "\n  steps: 7\n" in out
