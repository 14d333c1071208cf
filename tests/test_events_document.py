"""docs/events.md says what the models of events say."""

from __future__ import annotations

from pathlib import Path

from beringia.records.events import Event, parse_event
from beringia.records.events_document import document, examples, kinds

DOCUMENT = Path(__file__).parents[1] / "docs" / "events.md"


def test_the_document_is_up_to_date() -> None:
    advice = "run: python -m beringia.records.events_document > docs/events.md"
    assert DOCUMENT.read_text() == document(), advice


def test_there_is_an_example_of_every_kind_and_it_parses_to_itself() -> None:
    told = examples()
    assert {type(event) for event in told.values()} == set(kinds())
    for event in told.values():
        assert parse_event(event.model_dump(mode="json")) == event


def test_every_model_of_an_event_is_one_of_the_kinds() -> None:
    assert set(Event.__subclasses__()) == set(kinds())
