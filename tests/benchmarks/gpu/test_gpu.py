"""Does the benchmark of one GPU walk its whole way on a CPU, and does it count right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.clock import peak_flops
from benchmarks.gpu.ours import Ours, balanced_choice
from benchmarks.gpu.shapes import SHAPES, layers_that_fit, with_layers, work_of
from benchmarks.gpu.stack import refuse_unknown_torch
from benchmarks.gpu.theirs import Theirs
from concertina.errors import UserError
from concertina.model.router import Router

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--allow-dirty", "--rounds", "1", "--warm-up", "1", "--layers", "1"]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    assert main(["-o", str(path), *SHORT]) == 0
    return json.loads(path.read_text())


def test_all_shapes_have_all_rows_and_nothing_is_judged(document: dict[str, Any]) -> None:
    assert document["config"]["toy"] is True
    assert document["config"]["layers"] == {f"toy {name}": 1 for name in SHAPES}
    rows = {row["name"]: row for row in document["rows"] if row["unit"] != "tokens/s"}
    assert all(name.startswith("toy") and row["goal"] is row["met"] is None for name, row in rows.items())
    for shape in SHAPES:
        of_shape = {name: row["value"] for name, row in rows.items() if shape in name}
        for routing in ("real", "balanced"):
            label = f"toy {shape}, 1 layers, {routing} routing"
            assert of_shape[f"{label}: step"] > 0
            assert of_shape[f"{label}: transformers grouped_mm, ours against it"] > 0
        parts = {name.rpartition("share of ")[2] for name in of_shape if "share of" in name}
        shared = {"shared expert"} if shape == "Qwen2-57B-A14B" else set()
        assert parts == {"attention", "router", "permute", "experts", "optimizer", "norms and the rest"} | shared


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path / "x.json"), "--shapes", "GPT-2"])


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Products with weights; attention's halves differ by the mask, so it is left out on both sides."""
    work = with_layers(work_of(name, 1, 8, 1, toy=True), 2)
    contestant = Ours(work, CPU, balanced=True, recomputed=frozenset())
    with FlopCounterMode(display=False) as counter:
        contestant.forward_backward()
    products = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "mm" in str(operation))
    attended = 6 * work.length * work.model.num_attention_heads * work.model.width_of_head * work.layers
    # The first block's inputs want gradients too; oneDNN's products are not counted, so fp32 routers may be missing.
    router = 6 * work.model.hidden_size * work.model.num_experts * work.layers * work.tokens * work.micro_batches
    expected = work.flops - attended * work.tokens * work.micro_batches
    assert expected - router <= products <= expected


def choices(contestant: Ours) -> Tensor:
    found: list[Tensor] = []
    for module in contestant.blocks.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, routing: found.append(routing.counts_E))
    contestant.forward_backward()
    return torch.stack(found)


def test_balanced_is_even_and_real_is_not() -> None:
    work = work_of("Qwen3-30B-A3B", 2, 32, 2, toy=True)
    even, real = (Ours(work, CPU, balanced, frozenset()) for balanced in (True, False))
    assert choices(even).unique().tolist() == [work.tokens * work.model.num_experts_per_tok // work.model.num_experts]
    assert choices(real).float().std() > 1
    assert even.imbalance() == 1.0 < real.imbalance()
    assert balanced_choice(3, 2, 4, CPU).tolist() == [[0, 1], [2, 3], [0, 1]]


def test_their_balanced_routers_send_tokens_round() -> None:
    work = work_of("Mixtral 8x22B", 2, 32, 2, toy=True)
    theirs, seen = Theirs(work, CPU, True, "eager"), []
    for module in theirs.model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[1].flatten().bincount()))
    theirs.step()
    assert len(seen) == work.micro_batches
    assert torch.stack(seen).unique().numel() == 1


def test_a_step_of_ours_moves_every_weight() -> None:
    contestant = Ours(work_of("Qwen2-57B-A14B", 2, 32, 2, toy=True), CPU, False, frozenset({"layer"}))
    before = {name: parameter.clone() for name, parameter in contestant.blocks.named_parameters()}
    for _ in range(3):
        contestant.step()
    moved = [name for name, parameter in contestant.blocks.named_parameters() if not parameter.equal(before[name])]
    assert {name for name in before if "norm" not in name} <= set(moved), "bf16 rounds small moves of ones away"


@pytest.mark.parametrize("name", SHAPES)
def test_fewer_layers_fit_less_memory_and_more_do_when_less_is_kept(name: str) -> None:
    work = work_of(name, 2, 4096, 4, toy=False)
    fitting = [layers_that_fit(work, gib << 30, 99) for gib in (16, 139, 1000)]
    assert 1 == fitting[0] <= fitting[1] < fitting[2] <= work.model.num_hidden_layers
    assert layers_that_fit(work, 1000 << 30, 99, ["layer"]) >= fitting[2]
    assert layers_that_fit(work, 1000 << 30, 2) == 2


def test_a_peak_is_given_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, None) is None
    assert peak_flops(CPU, 100.0) == 1e14
    names = iter(["NVIDIA H200", "NVIDIA H100 PCIe", "Something new"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    assert peak_flops(torch.device("cuda"), None) == 989.4e12
    assert peak_flops(torch.device("cuda"), None) == 756e12
    with pytest.raises(UserError, match="Something new: pass --peak-tflops"):
        peak_flops(torch.device("cuda"), None)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1+cu130"])
def test_torch_it_was_written_for(version: str) -> None:
    refuse_unknown_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0.dev20261101", "3.0.0"])
def test_another_torch_is_refused(version: str) -> None:
    with pytest.raises(UserError, match=rf"torch {version}: this was written for 2\.11 to 2\.15"):
        refuse_unknown_torch(version)


def test_what_is_measured_is_written_down(document: dict[str, Any]) -> None:
    assert document["config"]["stack"].startswith(f"torch {torch.__version__}, ")
