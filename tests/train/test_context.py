"""Do chunks of sequences change the mathematics? With other axes, uneven, by both exchanges, with documents apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import on_ranks
from tests.train.test_layouts import assemble, check, gradients_of, odd_job, one_process, worst_error
from tests.train.worlds import LATENT, Degrees

pytestmark = pytest.mark.dist

TESTED: list[Degrees] = [
    (2, 1, 1, 1, 2),
    (3, 1, 3, 1, 3),  # eleven positions in six chunks
    (4, 2, 2, 1, 2),
    (4, 1, 4, 1, 2),  # ep spans dp and cp
    (6, 2, 1, 3, 3),
    (8, 2, 2, 2, 2),
]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("degrees", TESTED, ids=str)
def test_loss_and_every_gradient_equal_one_process(degrees: Degrees, exchange: str) -> None:
    check(degrees, "float64", 1e-10, layout={"context_exchange": exchange})


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_and_in_fp32_for_one_step(exchange: str) -> None:
    check((4, 2, 2, 1, 2), "float32", 1e-5, layout={"context_exchange": exchange})


DOCUMENTS: dict[str, Any] = {"data__document_mask": True}


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("degrees", [(1, 1, 1, 1), (3, 1, 1, 1, 3), (4, 2, 2, 1, 2)], ids=str)
def test_documents_apart(degrees: Degrees, exchange: str) -> None:
    check(degrees, "float64", 1e-10, layout={"context_exchange": exchange}, **DOCUMENTS)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("priority", ["position", "probability"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_the_same_tokens_are_dropped(lanes: int, priority: str, sequences: int) -> None:
    rule = {"factor": 0.9, "priority": priority, "group_sequences": sequences, "pad": priority == "position"}
    for together in (True, False):
        check(
            (2 * lanes, lanes, 2, 1, 2),
            "float64",
            1e-10,
            model__capacity=rule,
            training__global_batch_size=8,
            layout={"sequence_parallel": together},
        )


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_keys_and_values_of_latents(exchange: str) -> None:
    """Of several widths."""
    check((4, 2, 2, 1, 2), "float64", 1e-10, layout={"context_exchange": exchange}, model=LATENT)


def test_layers_are_computed_again_with_their_exchanges() -> None:
    check((4, 1, 2, 1, 2, 2), "float64", 1e-10, training__activation_checkpointing="full", training__micro_batch_size=1)


def test_noise_knows_positions_only() -> None:
    check((4, 2, 2, 1, 2), "float64", 1e-10, model__router_noise=True)


@pytest.mark.parametrize(
    "mutation",
    [
        "positions as if chunks were neighbours",
        "gradients of keys stay where they are made",
        "balance by this lane's counts",
        "dp_cp",
    ],
)
def test_a_mutation_is_seen(mutation: str) -> None:
    degrees = (2, 1, 1, 1, 2)
    found = assemble(on_ranks(gradients_of, 2, odd_job(), degrees, mutation))
    assert worst_error(found, assemble([one_process("float64")]))[0] > 1e-6
