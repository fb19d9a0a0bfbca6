"""Does check_job refuse what a model, a world or a batch cannot have, and name values that work?"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.config import ClusterConfig, Job, LayoutConfig, ModelConfig, TrainingConfig
from concertina.errors import LayoutError
from concertina.layout import Layout, check_job, fits

pytestmark = pytest.mark.unit


def job(
    world: int = 8, batch: int = 64, model: dict[str, Any] | None = None, micro: int | None = None, **degrees: int
) -> Job:
    return Job(
        name="test",
        model=ModelConfig(**(model or {})),
        training=TrainingConfig(global_batch_size=batch, micro_batch_size=micro),
        layout=LayoutConfig(**degrees),
        cluster=ClusterConfig(num_workers=world, num_nodes=1),
    )


def refusal(refused: Job) -> LayoutError:
    with pytest.raises(LayoutError) as caught:
        check_job(refused)
    return caught.value


def test_a_fitting_job_gives_its_layout() -> None:
    assert check_job(job(world=8, ep=4, pp=2)) == Layout(8, pp=2, ep=4)


def test_uneven_shares_are_allowed() -> None:
    assert check_job(job(world=3, batch=16, ep=3)).ep == 3  # 8 experts over 3, 16 sequences over 3
    assert check_job(job(world=3, pp=3)).pp == 3  # 4 layers over 3


@pytest.mark.parametrize(
    ("refused", "line"),
    [
        (job(ep=3), "ep=3 must divide dp*cp*tp=8: set layout.ep to 1, 2, 4 or 8"),
        (
            job(tp=8, model={"num_attention_heads": 24, "num_key_value_heads": 3, "head_dim": 8}),
            "tp=8 must divide or be a multiple of model.num_key_value_heads=3: set layout.tp to 1",
        ),
        (job(world=16, ep=16), "ep=16 is more than model.num_experts=8: set layout.ep to 1, 2, 4 or 8"),
        (job(pp=8), "pp=8 is more than model.num_hidden_layers=4: set layout.pp to 1, 2 or 4"),
        (
            job(world=6, etp=3),
            "etp=3 must divide model.moe_intermediate_size=512: set layout.etp to 1 or 2",
        ),
        (
            job(batch=2),
            "global_batch_size=2 leaves 6 of dp=8 ranks without a sequence: "
            "set training.global_batch_size to 8 or more",
        ),
    ],
)
def test_one_line_with_numbers_and_remedy(refused: Job, line: str) -> None:
    assert refusal(refused).data["problems"] == [line]


def test_ranks_and_micro_batches_hold_whole_capacity_groups() -> None:
    model = {"capacity": {"factor": 1.25, "group_sequences": 4}}
    assert check_job(job(world=3, batch=20, micro=8, model=model)).dp == 3  # two, two and one group
    assert refusal(job(world=3, batch=22, micro=6, model=model)).data["problems"] == [
        "global_batch_size=22 is no multiple of model.capacity.group_sequences=4: "
        "set training.global_batch_size to 20 or 24",
        "micro_batch_size=6 is no multiple of model.capacity.group_sequences=4: "
        "set training.micro_batch_size to 4 or 8",
    ]
    assert refusal(job(world=8, batch=6, micro=3, model=model)).data["problems"] == [
        "global_batch_size=6 is no multiple of model.capacity.group_sequences=4: "
        "set training.global_batch_size to 32 or 36",
        "micro_batch_size=3 is no multiple of model.capacity.group_sequences=4: "
        "set training.micro_batch_size to 4 or 8",
    ]
    assert refusal(job(world=8, batch=28, model=model)).data["problems"] == [
        "global_batch_size=28 leaves 1 of dp=8 ranks without a capacity group of 4 sequences: "
        "set training.global_batch_size to 32 or more"
    ]
    assert refusal(job(world=8, batch=28, model=model)).exit_code == 2


@pytest.mark.parametrize("capacity", [{}, {"factor": 1.0, "scope": "sub_sequence"}])
def test_dropless_and_local_capacity_ask_for_no_groups(capacity: dict[str, Any]) -> None:
    assert check_job(job(world=3, batch=5, micro=1, model={"capacity": capacity})).dp == 3


def test_one_line_an_axis_whatever_is_wrong_with_it() -> None:
    model = {"mlp_only_layers": (0,), "intermediate_size": 512, "shared_expert_intermediate_size": 256}
    error = refusal(job(world=4, tp=3, model=model))
    assert error.data["keys"] == ["layout.tp"]
    assert error.data["problems"] == [
        "tp=3 must divide world=4 and model.num_attention_heads=8 and model.intermediate_size=512 and "
        "model.shared_expert_intermediate_size=256 and must divide or be a multiple of model.num_key_value_heads=4: "
        "set layout.tp to 1, 2 or 4"
    ]


def test_stages_and_batch_are_refused_together() -> None:
    error = refusal(job(world=8, batch=2, pp=2, virtual_stages=99))
    assert error.data["keys"] == ["layout.virtual_stages", "training.global_batch_size"]
    assert "leaves 2 of dp=4 ranks" in error.data["problems"][1]


def test_widths_that_no_layer_has_do_not_matter() -> None:
    model = {"intermediate_size": 513, "moe_intermediate_size": 513, "mlp_only_layers": ()}
    assert check_job(job(world=4, tp=4, model=model)).tp == 4
    dense = {**model, "mlp_only_layers": (0, 1, 2, 3), "intermediate_size": 512}
    assert check_job(job(world=4, etp=4, model=dense)).etp == 4


def refused_lines(world: int, degrees: dict[str, int]) -> dict[str, str]:
    """Key -> line of each refusal; empty when the job fits."""
    try:
        check_job(job(world=world, **degrees))
    except LayoutError as error:
        return dict(zip(error.data["keys"], error.data["problems"], strict=True))
    return {}


@given(
    st.integers(1, 48),
    st.fixed_dictionaries({axis: st.integers(1, 9) for axis in ("pp", "cp", "tp", "ep", "etp")}),
)
def test_every_value_a_refusal_names_mends_its_axis(world: int, degrees: dict[str, int]) -> None:
    for key, line in refused_lines(world, degrees).items():
        axis = key.removeprefix("layout.")
        for value in map(int, re.findall(r"\d+", line.rpartition(" to ")[2])):
            assert key not in refused_lines(world, {**degrees, axis: value})


@given(
    st.integers(1, 24),
    st.integers(1, 12),
    st.sampled_from([1, 4]),
    st.fixed_dictionaries({axis: st.integers(1, 9) for axis in ("pp", "cp", "tp", "ep", "etp")}),
)
def test_what_fits_is_what_is_not_refused(world: int, batch: int, group: int, degrees: dict[str, int]) -> None:
    asked = job(world=world, batch=batch, model={"capacity": {"factor": 1.0, "group_sequences": group}}, **degrees)
    try:
        check_job(asked)
    except LayoutError:
        assert not fits(asked, world, degrees)
    else:
        assert fits(asked, world, degrees)
