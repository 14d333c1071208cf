"""When a campaign qualifies a chip, and when it lets its certificate stand: what was asked of it, and which it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import IDENTITY, certificate
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small_runs import of_kind, small_recipe

from beringia.campaign import qualifying
from beringia.campaign.qualifying import qualify_chips, request_for
from beringia.errors import ChipUnavailable
from beringia.qualify.evidence import Opened
from beringia.qualify.qualification import Request
from beringia.records.certificate import Certificate
from beringia.records.identity import ChipIdentity
from beringia.records.recipe import Recipe, parse_recipe
from beringia.records.run_directory import RunDirectory
from beringia.records.signature import read_signed, sign, write_signed

KEY = Ed25519PrivateKey.generate()


class Chips:
    """Stands where chips are qualified: notes the requests, and says which chip is there."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.identity: ChipIdentity | None = IDENTITY
        """None: it cannot be opened."""
        self.opened: list[str] = []

    def qualify(self, request: Request, *others: Any) -> Certificate:
        self.asked.append(request)
        assert self.identity is not None
        return certificate(self.identity, chip=request.chip)

    def describe(self, request: Request, directory: Path) -> Opened:
        if self.identity is None:
            raise ChipUnavailable("There is no such chip.")
        self.opened.append(request.chip)
        return Opened(name=request.chip, identity=self.identity, compute_dtype="bfloat16")


@pytest.fixture
def chips(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chips]:
    stand_in = Chips()
    monkeypatch.setattr(qualifying, "qualify", stand_in.qualify)
    monkeypatch.setattr(qualifying, "describe", stand_in.describe)
    monkeypatch.setattr(qualifying, "reference_for", lambda request, directory, say: directory)
    monkeypatch.setattr(qualifying, "load_or_create_key", lambda: KEY)
    return stand_in


def recipe(**sections: Any) -> Recipe:
    refusing = {"qualify": {"unqualified": "refuse"}, "chips": {"first": {"use": "emulated:h800"}}}
    return parse_recipe(small_recipe(**(refusing | sections)), "test")


def campaign(run: RunDirectory, asked: Recipe) -> None:
    qualify_chips(asked, json.dumps(asked.model_dump(mode="json")), run, None)


def test_a_chip_is_qualified_once_for_the_same_recipe(chips: Chips, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for _ in range(3):
        campaign(run, recipe())
    assert len(chips.asked) == 1 and len(of_kind(run.root, "qualified")) == 1


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({"chips": {"first": {"use": "emulated:mi300x"}}}, {"chip": "emulated:mi300x"}),
        (
            {"chips": {"first": {"use": "emulated:h800", "faults": "r2-2025-first-lot"}}},
            {"faults": "r2-2025-first-lot"},
        ),
        ({"chips": {"first": {"use": "emulated:h800", "ranks": 8}}}, {"collectives": True, "ranks": 8}),
        ({"data": {"sequence_length": 96}}, {"run_tokens": 96}),
        ({"seed": 5}, {"seed": 5}),
        ({"data": {"tokenizer": "bytes"}}, {"vocabulary_size": 261}),
        ({"train": {"compute": "float32"}}, {"compute_dtype": "float32"}),
    ],
    ids=["use", "faults", "ranks", "length", "seed", "tokenizer", "compute"],
)
def test_a_chip_of_which_something_else_is_asked_is_qualified_again_once(
    chips: Chips, tmp_path: Path, change: dict[str, Any], asked: dict[str, Any]
) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    for _ in range(2):
        campaign(run, recipe(**change))
    assert len(chips.asked) == 2, "again, and then no more"
    assert {name: getattr(chips.asked[1], name) for name in asked} == asked


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"checkpoint_every": 7}},
        {"train": {"learning_rate": 1e-3}},
        {"chips": {"first": {"use": "emulated:h800", "launch": ["env"]}}},
    ],
    ids=["checkpoints", "rate", "launch"],
)
def test_what_a_chip_is_not_asked_leaves_its_certificate_alone(
    chips: Chips, tmp_path: Path, change: dict[str, Any]
) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    campaign(run, recipe(**change))
    assert len(chips.asked) == 1


def test_another_content_of_a_fault_script_is_another_chip(chips: Chips, tmp_path: Path) -> None:
    run, script = RunDirectory(tmp_path / "run"), tmp_path / "faults.toml"
    asked = recipe(chips={"first": {"use": "emulated:h800", "faults": str(script)}})
    for content in ("one", "one", "two"):
        script.write_text(content)
        campaign(run, asked)
    assert len(chips.asked) == 2


def test_a_chip_with_another_driver_is_qualified_again_once(chips: Chips, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    chips.identity = IDENTITY.model_copy(update={"driver": "590.1"})
    for _ in range(2):
        campaign(run, recipe())
    hashes = [event.identity_hash for event in of_kind(run.root, "qualified")]
    assert hashes == [IDENTITY.hash, chips.identity.hash]


def test_a_chip_that_cannot_be_opened_keeps_its_certificate(chips: Chips, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    chips.identity = None
    campaign(run, recipe())
    assert len(chips.asked) == 1


def test_a_certificate_that_somebody_put_there_is_never_replaced(chips: Chips, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    other = IDENTITY.model_copy(update={"sku": "MI300X"})
    write_signed(run.certificates / "first.json", sign(certificate(other), KEY))
    for use in ("emulated:h800", "emulated:mi300x"):
        campaign(run, recipe(chips={"first": {"use": use}}))
    assert not chips.asked


def test_a_certificate_that_somebody_put_in_place_of_the_campaigns_is_never_replaced(
    chips: Chips, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    theirs = sign(certificate(IDENTITY.model_copy(update={"sku": "MI300X"})), KEY)
    write_signed(run.certificates / "first.json", theirs)
    for asked in (recipe(), recipe(seed=9)):
        campaign(run, asked)
    assert len(chips.asked) == 1
    assert read_signed(run.certificates / "first.json", Certificate).record == theirs.record


def test_of_several_chips_only_the_one_that_trains_next_is_opened_to_see_which_it_is(
    chips: Chips, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    two = recipe(
        chips={"first": {"use": "emulated:h800"}, "second": {"use": "emulated:mi300x"}},
        train={"prefer": ["first", "second"]},
    )
    for _ in range(2):
        campaign(run, two)
    assert chips.opened == ["emulated:h800"]


def test_an_event_from_before_it_was_noted_what_was_asked_leaves_the_certificate_alone(
    chips: Chips, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    campaign(run, recipe())
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    for event in lines:
        event.pop("asked" if event["kind"] == "qualified" else "", None)
    run.events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    campaign(run, recipe(seed=9))
    assert len(chips.asked) == 1


def test_the_request_has_the_vocabulary_that_the_run_trains_and_none_where_it_is_the_presets_own(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path)
    assert request_for(recipe(), run, "first").vocabulary_size is None
    assert request_for(recipe(data={"tokenizer": "bytes"}), run, "first").vocabulary_size == 261
    assert request_for(recipe(model={"preset": "r2-small"}), run, "first").vocabulary_size == 54
