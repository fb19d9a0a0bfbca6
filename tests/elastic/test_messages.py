"""Does every message arrive as it was sent, after a journey as a line of JSON?"""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic import messages
from concertina.elastic.messages import Committed, Control, Message, RankError, decode, encode

pytestmark = pytest.mark.unit

KINDS = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)]
numbers = st.floats(allow_nan=False)
VALUES = {
    "int": st.integers(),
    "float": numbers,
    "bool": st.booleans(),
    "str": st.text(),
    "dict[str, float]": st.dictionaries(st.text(), numbers),
    "dict[str, Any]": st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists)),
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
    assert len(KINDS) > 9


@given(any_message)
def test_a_message_does_not_change(message: Message) -> None:
    for field in dataclasses.fields(message):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, None)


def test_the_wire_names_the_kind() -> None:
    assert encode(Control(stop=True)) == {"kind": "Control", "stop": True, "checkpoint": False}
    error = RankError(1, "ValueError", "boom", "Traceback", 1, False)
    assert encode(error)["kind"] == "RankError"
    assert encode(error)["kind_of_error"] == "ValueError"


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
