"""Does every message arrive as it was sent, after a journey as a line of JSON?"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic import messages
from concertina.elastic.messages import Committed, Control, Message, Move, Prepare, RankError, decode, encode
from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit

KINDS = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)]
numbers = st.floats(allow_nan=False)
json_like = st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)
documents = st.dictionaries(st.text(), json_like, max_size=3)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(),
    "int | None": st.none() | st.integers(),
    "float": numbers,
    "bool": st.booleans(),
    "str": st.text(),
    "str | None": st.none() | st.text(),
    "tuple[str, int]": st.tuples(st.text(), st.integers()),
    "list[int]": st.lists(st.integers()),
    "list[float] | None": st.none() | st.lists(numbers),
    "list[dict[str, Any]]": st.lists(documents, max_size=3),
    "dict[str, str]": st.dictionaries(st.text(), st.text()),
    "dict[str, int]": st.dictionaries(st.text(), st.integers()),
    "dict[str, float]": st.dictionaries(st.text(), numbers),
    "dict[str, Any]": documents,
    "dict[str, Any] | None": st.none() | documents,
}


def of(kind: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(kind, **{field.name: VALUES[str(field.type)] for field in dataclasses.fields(kind)})


any_message = st.sampled_from([kind for kind in KINDS if kind is not Message]).flatmap(of)


@given(any_message)
def test_round_trip(message: Message) -> None:
    line = json.dumps(encode(message))
    assert "\n" not in line
    found = decode(json.loads(line))
    assert type(found) is type(message)
    assert found == message


def test_every_message_is_public() -> None:
    assert {kind.__name__ for kind in KINDS} <= set(messages.__all__)
    assert len(KINDS) > 14


@given(any_message)
def test_a_message_does_not_change(message: Message) -> None:
    for field in dataclasses.fields(message):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, None)


def test_the_wire_names_the_kind() -> None:
    assert encode(Control(stop=True)) == {"kind": "Control", "stop": True, "checkpoint": False, "regroup": False}
    error = RankError(1, "ValueError", "boom", "Traceback", 1, False)
    assert encode(error)["kind"] == "RankError"
    assert encode(error)["kind_of_error"] == "ValueError"


def test_orders_carry_the_seating_they_are_of() -> None:
    """A member rebuilds from an order, and from nothing else, who sits where."""
    seating = Seating(Layout(3, ep=3), (4, 0, 7), (1, None, 0), spares=(9,))
    prepare = decode(json.loads(json.dumps(encode(Prepare(5, seating.to_json(), ("127.0.0.1", 4711))))))
    assert isinstance(prepare, Prepare)
    assert Seating.from_json(prepare.seating) == seating
    move = decode(json.loads(json.dumps(encode(Move(6, source=5, seating=seating.to_json(), nodes={"4": "a"})))))
    assert isinstance(move, Move)
    assert move.seating is not None
    assert Seating.from_json(move.seating) == seating


def test_what_was_encoded_is_a_copy() -> None:
    metrics = {"loss": 1.0}
    document = encode(Committed(1, metrics))
    metrics["loss"] = 2.0
    assert document["metrics"] == {"loss": 1.0}


def test_decoding_leaves_the_document_as_it_was() -> None:
    document = encode(Control())
    decode(document)
    assert document == encode(Control())


@pytest.mark.parametrize("document", [{"kind": "Nonsense"}, {"stop": True}])
def test_an_unknown_message_is_our_error(document: dict[str, object]) -> None:
    with pytest.raises(KeyError):
        decode(document)
