"""Are the bytes that a step sends the formulas', by group and kind, to the byte?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from concertina.config import Job, ModelConfig, count_parameters
from concertina.layout import Layout, Seating, kv_copies
from concertina.model.router import Router
from concertina.parallel.trace import bytes_sent, recording
from concertina.planner.traffic import (
    Counts,
    Sender,
    Traffic,
    agreement,
    crossing,
    dispatch,
    even_counts,
    micro_batch,
    seconds,
    step,
    zero,
)
from tests.distributed import form, on_ranks
from tests.train.worlds import LATENT, Degrees, layout_of, tiny_job, unconfigured

Owners = tuple[int | None, ...]
"""The second owner of every rank."""


# -- a recorded step ---------------------------------------------------------------------------------------------------


def nobody(degrees: Degrees) -> Owners:
    return (None,) * degrees[0]


def recorded_step(rank: int, store: Any, job: Job, degrees: Degrees, owners: Owners) -> dict[str, Any]:
    """Bytes that step 1 sent, sequences of its micro-batches, rows this rank routed to every expert, in order."""
    engine, layout = unconfigured(job), layout_of(degrees)
    groups = form(layout, rank, store, kv_lanes=kv_copies(job.model, layout.tp))
    engine.adopt(engine.prepare(Seating(layout, tuple(range(layout.world)), owners), rank, groups, "initial"))
    engine.fill_seconds()
    routed: dict[int, list[list[int]]] = {piece: [] for piece in engine.decoder.pieces}
    forward: list[int | None] = [None]  # routers are asked again in the backward of what is computed again

    def note(_: Any, __: Any, output: Any) -> None:
        if forward[-1] is not None:
            counts = output.expert_ids_RK.flatten().bincount(minlength=job.model.num_experts)
            routed[forward[-1]].append(counts.tolist())

    for module in engine.decoder.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    advance = engine.decoder.advance

    def noted(piece: int, *arguments: Any) -> Any:
        forward.append(piece)
        found = advance(piece, *arguments)
        forward.append(None)
        return found

    engine.decoder.advance = noted  # type: ignore[method-assign]
    with recording(engine.groups) as records:
        engine.train_step(1)
    pieces = engine._micro_batches(job.training.global_batch_size)
    micro_batches = [len(numbers[engine.groups["dp"].rank]) for numbers in pieces]
    number = len(micro_batches)
    in_order = [
        rows
        for micro_batch in range(number)
        for counts in routed.values()
        for rows in counts[micro_batch * len(counts) // number : (micro_batch + 1) * len(counts) // number]
    ]
    return {"sent": bytes_sent(records), "micro_batches": micro_batches, "routed": in_order}


def sender_of(job: Job, degrees: Degrees, rank: int, has_second: bool = False) -> Sender:
    training, layout = job.training, job.layout
    how = layout.sequence_parallel, has_second, layout.context_exchange, training.recomputed
    return Sender(job.model, layout_of(degrees), rank, training.precision, *how)


def expected(sender: Sender, ranks: list[dict[str, Any]], length: int) -> Traffic:
    micro_batches = ranks[sender.rank]["micro_batches"]
    routed = [ranks[peer]["routed"] for peer in sender.layout.group_of("etp_ep", sender.rank)]
    calls: list[Counts] = [list(everyone) for everyone in zip(*routed, strict=True)]
    layers = sender.num_moe_layers
    routing = [calls[index * layers : (index + 1) * layers] for index in range(len(micro_batches))]
    return step(sender, length, micro_batches, routing)


def check(job: Job, degrees: Degrees, owners: Owners | None = None) -> list[Traffic]:
    owners = owners or nobody(degrees)
    ranks = on_ranks(recorded_step, degrees[0], job, degrees, owners)
    formulas = []
    for rank, found in enumerate(ranks):
        sender = sender_of(job, degrees, rank, owners[rank] is not None)
        formulas.append(expected(sender, ranks, job.data.sequence_length))
        assert {key: sent for key, sent in found["sent"].items() if sent} == formulas[-1]
    return formulas


LANES = {("tp", kind) for kind in ("all_reduce", "all_gather", "reduce_scatter")}
EXPERTS = {("etp_ep", "counts"), ("edp", "all_gather"), ("edp", "reduce_scatter")}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("degrees", "kinds"),
    [
        ((2, 1, 1, 1), {("dp_cp", "all_gather"), ("edp", "reduce_scatter")}),
        ((2, 2, 1, 1), LANES),
        ((2, 1, 2, 1), {("ep", "all_to_all"), ("etp_ep", "counts")}),
        ((4, 1, 4, 1), {("ep", "all_to_all"), ("dp_cp_tp", "all_gather")}),
        ((2, 1, 1, 2), {("etp", "all_gather"), ("etp", "reduce_scatter")}),
        ((3, 1, 3, 1), {("ep", "all_to_all")}),  # uneven experts and sequences
        ((4, 4, 1, 1), {*LANES, ("dp_cp_kv", "reduce_scatter")}),  # lanes that share key-value heads
        ((4, 2, 2, 2), {*LANES, ("etp_ep", "counts"), ("ep", "all_to_all"), ("etp", "all_gather")}),
        ((8, 2, 2, 2), {*LANES, *EXPERTS, ("ep", "all_to_all"), ("etp", "reduce_scatter")}),
    ],
    ids=lambda value: "world{}-tp{}-ep{}-etp{}".format(*value) if isinstance(value, tuple) else "",
)
def test_a_step_sends_what_the_formulas_say(degrees: Degrees, kinds: set[tuple[str, str]]) -> None:
    for traffic in check(tiny_job(training__precision="float32", training__micro_batch_size=3), degrees):
        assert kinds <= traffic.keys()


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("degrees", [(2, 1, 1, 1, 2), (3, 1, 3, 1, 3), (4, 2, 2, 1, 2)], ids=str)
def test_of_chunks_of_sequences(degrees: Degrees, exchange: str, precision: str) -> None:
    """Pieces are of one size where there are twelve positions, of several with eleven; keys as wide as values
    and not."""
    for length, model in ((11, {}), (12, LATENT)):
        changes = {"layout": {"context_exchange": exchange}, "data__sequence_length": length, "model": model}
        for traffic in check(tiny_job(training__precision=precision, **changes), degrees):
            assert ("cp", "exchange" if exchange == "ring" else "all_gather") in traffic


@pytest.mark.dist
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "degrees", [(2, 1, 1, 1, 1, 2), (3, 1, 1, 1, 1, 3), (4, 2, 2, 1, 1, 2, 2), (4, 1, 2, 1, 2, 2, 1, 4, 1)], ids=str
)
def test_of_stages(degrees: Degrees, tied: bool) -> None:
    """Each sends what its layers do, the ends theirs, and all of them hidden states to the next and the one before."""
    model = {"num_hidden_layers": 5, "tie_word_embeddings": tied}
    sharing = {"sequence_parallel": not tied}
    job = tiny_job(model=model, training__precision="bfloat16", training__micro_batch_size=2, layout=sharing)
    for traffic in check(job, degrees):
        assert ("pp", "exchange") in traffic


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_in_other_precisions_and_without_sequence_parallelism(precision: str, sequence_parallel: bool) -> None:
    job = tiny_job(
        training__precision=precision,
        layout={"sequence_parallel": sequence_parallel},
        model__qk_norm="full",
        model__shared_expert_intermediate_size=0,
    )
    check(job, (2, 2, 1, 1))
    check(job, (4, 2, 2, 1))


@pytest.mark.dist
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("query", [24, 0])
def test_latents_are_what_is_gathered(query: int, sequence_parallel: bool) -> None:
    model = {**LATENT, "q_lora_rank": query}
    job = tiny_job(model=model, training__precision="float32", layout={"sequence_parallel": sequence_parallel})
    check(job, (2, 2, 2, 1))
    assert sender_of(job, (2, 2, 2, 1), 0).latent_width == (query or 32) + 16 + 6


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kinds", "sequence_parallel"),
    [("full", True), ("full", False), (["attention"], True), (["moe", "norm"], True), (["mlp"], True)],
    ids=str,
)
def test_what_is_computed_again_is_sent_again(kinds: str | list[str], sequence_parallel: bool) -> None:
    job = tiny_job(
        training__activation_checkpointing=kinds,
        layout={"sequence_parallel": sequence_parallel},
        model__qk_norm="full",
    )
    check(job, (4, 2, 2, 2))


@pytest.mark.dist
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("kinds", ["full", ["core"], ["moe"]], ids=str)
def test_keys_and_values_are_sent_again_too(kinds: str | list[str], exchange: str) -> None:
    for model in ({}, LATENT):
        changes = {"layout": {"context_exchange": exchange}, "model": model}
        check(tiny_job(training__activation_checkpointing=kinds, **changes), (4, 2, 2, 1, 2))


@pytest.mark.unit
def test_only_regions_that_communicate_send_more() -> None:
    job, degrees = tiny_job(), (4, 2, 2, 2)
    plain = sender_of(job, degrees, 0)
    routing = [even_counts(plain, 48)] * plain.num_moe_layers
    usual, full, selective = (
        micro_batch(replace(plain, recomputed=frozenset(kinds)), 12, 4, routing)
        for kinds in ((), ("layer",), ("norm", "activation", "permute", "core", "experts"))
    )
    assert selective == usual
    assert all(full[key] > usual[key] for key in usual if key[1] != "all_reduce")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("degrees", "owners", "precision"),
    [
        ((3, 1, 3, 1), (2, 2, 0), "float32"),  # experts unevenly; rank 2 keeps two copies, rank 1 none
        ((4, 4, 1, 1), (1, 2, 3, None), "float64"),  # lanes that share key-value heads; one rank without a second
        ((4, 2, 2, 1), (2, 3, 0, 1), "bfloat16"),  # gradients travel wider than weights
    ],
    ids=["uneven", "shared heads", "narrow weights"],
)
def test_a_step_with_second_owners(degrees: Degrees, owners: Owners, precision: str) -> None:
    formulas = check(tiny_job(training__precision=precision), degrees, owners)
    sent = [traffic.get(("seconds", "exchange"), 0) for traffic in formulas]
    assert [count > 0 for count in sent] == [second is not None for second in owners]


@pytest.mark.dist
def test_another_routing_would_have_sent_something_else() -> None:
    """The comparison sees one row that went to another rank, and a crossing too many."""
    job, degrees = tiny_job(), (2, 2, 2, 1)
    ranks = on_ranks(recorded_step, 2, job, degrees, nobody(degrees))
    sender, length = sender_of(job, degrees, 0), job.data.sequence_length
    right = expected(sender, ranks, length)
    assert ranks[0]["sent"] == right
    first = ranks[0]["routed"][0]
    first[0], first[-1] = first[0] - 1, first[-1] + 1
    wrong = expected(sender, ranks, length)
    # There and back, forward and backward.
    assert wrong[("ep", "all_to_all")] - right[("ep", "all_to_all")] == 2 * sender.row_bytes
    dense = sender_of(tiny_job(model__mlp_only_layers=[0, 1]), degrees, 0)
    assert dense.crossings == sender.crossings
    assert sender_of(tiny_job(model__shared_expert_intermediate_size=0), degrees, 0).crossings == sender.crossings - 4


# -- the formulas themselves -------------------------------------------------------------------------------------------

MODELS = {
    "Mixtral 8x22B": (6144, 8, 2),
    "G8T8": (6144, 64, 8),
    "Qwen2-57B": (3584, 64, 8),
}
KILOBYTES_A_TOKEN = [
    ("Mixtral 8x22B", "ep", 8, 42),
    ("Mixtral 8x22B", "etp", 8, 336),
    ("Mixtral 8x22B", "ep", 16, 45),
    ("Mixtral 8x22B", "etp", 16, 720),
    ("G8T8", "ep", 8, 168),
    ("G8T8", "etp", 8, 1344),
    ("G8T8", "ep", 16, 180),
    ("G8T8", "etp", 16, 2880),
    ("Qwen2-57B", "ep", 8, 98),
    ("Qwen2-57B", "etp", 8, 784),
    ("Qwen2-57B", "ep", 16, 105),
    ("Qwen2-57B", "etp", 16, 1680),
]


@pytest.mark.unit
@pytest.mark.parametrize(("name", "axis", "degree", "kilobytes"), KILOBYTES_A_TOKEN)
def test_even_routing_costs_etp_its_degree_times_ep(name: str, axis: str, degree: int, kilobytes: int) -> None:
    """2 k h b (g-1)/g a token over ep, 2 k h b (g-1) over etp: a forward in bfloat16."""
    hidden, experts, k = MODELS[name]
    model = ModelConfig(hidden_size=hidden, num_experts=max(experts, degree), num_experts_per_tok=k)
    sender = Sender(model, Layout(degree, **{axis: degree}), degree - 1, "bfloat16")
    tokens = 4096
    moved = dispatch(sender, even_counts(sender, tokens))
    sent = sum(count for (group, _), count in moved.items() if group == axis)
    assert sent == pytest.approx(kilobytes * 1024 * tokens, rel=1e-12)


@pytest.mark.unit
def test_crossings_cut_the_tokens_and_all_gather_the_shares() -> None:
    model = ModelConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=4)
    sent = [crossing(Sender(model, Layout(4, tp=4), rank, "bfloat16"), 10) for rank in range(4)]
    assert [traffic[("tp", "all_gather")] for traffic in sent] == [3 * own * 32 for own in (3, 3, 2, 2)]
    assert [traffic[("tp", "reduce_scatter")] for traffic in sent] == [(10 - own) * 32 for own in (3, 3, 2, 2)]
    alike = crossing(Sender(model, Layout(4, tp=4), 0, "bfloat16", sequence_parallel=False), 10)
    assert alike == {("tp", "all_reduce"): 2 * 3 / 4 * 10 * 16 * 4}


@pytest.mark.unit
def test_every_parameter_is_reduced_and_gathered_once() -> None:
    """Of a model whose parameters divide by the world, nothing is padding but what uneven pieces leave."""
    model = ModelConfig(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, vocab_size=256)
    sender = Sender(model, Layout(4, ep=2), 1, "bfloat16")
    traffic = zero(sender)
    weights = {group: sent for (group, kind), sent in traffic.items() if kind == "all_gather"}
    assert {group for group, _ in traffic} == {"dp_cp", "dp_cp_tp", "edp"}
    experts = model.num_hidden_layers * model.num_experts // 2 * 3 * 64 * 64
    assert weights["edp"] == experts // 2 * 2  # half a rank's experts to its one replica, two bytes each
    assert all(traffic[(group, "reduce_scatter")] == 2 * sent for group, sent in weights.items())


@pytest.mark.unit
def test_four_bytes_a_parameter_go_to_second_owners_over_the_world() -> None:
    """Every parameter once, of a model whose parameters divide by the world; in bfloat16 as in float32."""
    model = ModelConfig(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, vocab_size=256)
    for precision in ("float32", "bfloat16"):
        ranks = [Sender(model, Layout(4, ep=2), rank, precision, has_second=True) for rank in range(4)]
        sent = sum(seconds(sender)[("seconds", "exchange")] for sender in ranks)
        assert sent == 4 * count_parameters(model)[0]
    assert seconds(Sender(model, Layout(4, ep=2), 0)) == {}


@pytest.mark.unit
def test_alone_nothing_is_sent() -> None:
    model = ModelConfig()
    sender = Sender(model, Layout(1), 0)
    assert step(sender, 16, [2], [[even_counts(sender, 32)] * model.num_hidden_layers]) == {}
    assert agreement(sender) == {("world", "all_reduce"): 0}
