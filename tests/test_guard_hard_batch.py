"""A spike that the data explain is no alarm; one that comes of the chip or of spoiled weights is."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import changed_output, trainer
from small_runs import beringia, of_kind, small_recipe, write_recipe

from beringia.data import Batch
from beringia.model import IGNORED
from beringia.records.events import SPIKE, Alarm
from beringia.train.hard_batch import explained_by_data
from beringia.train.trainer import Trainer

HARD_STEP = 6


@dataclass
class HardOnce:
    """A stream in one of whose batches all labels are a token that never comes."""

    stream: Any
    batch: int
    token: int

    def samples(self, start: int, count: int) -> Batch:
        given: Batch = self.stream.samples(start, count)
        if start // self.batch != HARD_STEP - 1:
            return given
        return replace(given, labels_BT=given.labels_BT.masked_fill(given.labels_BT != IGNORED, self.token))


@pytest.fixture
def made() -> Trainer:
    """A trainer that has just taken a step with a hard batch."""
    found = trainer(share=None)
    found.stream = HardOnce(found.stream, found.recipe.train.batch, found.decoder.config.vocab_size - 1)  # type: ignore[assignment]  # what a trainer asks of a stream
    for _ in range(HARD_STEP):
        found.train_step()
    return found


def spike(tensor: str = "loss", site: str = "model", rise: float = 0.4) -> Alarm:
    return Alarm(step=HARD_STEP, detector=SPIKE, site=site, tensor=tensor, value=rise, bound=0.9 * rise, message="")


def explained(made: Trainer, *spikes: Alarm) -> bool:
    return explained_by_data(made, spikes, lambda: None)


def test_a_hard_batch_explains_its_loss_and_nothing_is_left_of_asking(made: Trainer) -> None:
    before = {name: tensor.clone() for name, tensor in made.decoder.state_dict().items()}
    assert explained(made, spike())
    assert (made.step, made.cursor) == (HARD_STEP, HARD_STEP * made.recipe.train.batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in made.decoder.parameters())


def test_an_ordinary_batch_explains_nothing(made: Trainer) -> None:
    made.train_step()
    assert not explained(made, spike())


def test_a_rise_much_larger_than_the_batch_is_hard_is_not_explained(made: Trainer) -> None:
    assert not explained(made, spike(), spike(rise=40.0))


def test_spoiled_weights_make_every_batch_hard_and_are_not_explained(made: Trainer) -> None:
    made.decoder.lm_head.weight.data *= 200.0
    assert not explained(made, spike(rise=3.0))


def test_a_chip_on_which_the_batch_is_harder_than_on_the_cpu_is_not_explained(made: Trainer) -> None:
    def larger(sums: dict[str, Any]) -> dict[str, Any]:
        return {name: 3.0 * value for name, value in sums.items()}

    with changed_output(made.decoder, larger):
        assert not explained(made, spike())


@pytest.mark.slow
def test_a_run_whose_text_has_one_hard_place_goes_on_and_tells_of_it(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    easy, draw = ["abcdefgh" * 60] * 400, random.Random(1)
    easy[230] = "".join(draw.choice("0123456789") for _ in range(480))
    (text / "one.txt").write_text("\n".join(easy))
    document = small_recipe(train={"steps": 160, "learning_rate": 3e-3}, guard={"share": 0.02})
    document["data"] = {"text": str(text), "tokenizer": "bytes", "sequence_length": 64}
    run = tmp_path / "run"
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(run))
    assert done.returncode == 0, done.stderr[-2000:]
    assert of_kind(run, "alarm") == []
    explained = [event for event in of_kind(run, "check") if event.explained]
    assert explained and {event.detector for event in explained} == {SPIKE}
    assert all(event.value > event.bound for event in explained)
    assert [decision.action for decision in of_kind(run, "decision")] == ["start"]
