"""The canary of a crossing: the steps between the last two trusted checkpoints, replayed on the new chip.

From the earlier checkpoint A the new chip takes the recorded steps to the later one B, and its update of the weights is
compared with the recorded update: difference = ||new - recorded|| / ||recorded - A||. The band comes from the new chip
itself: the same replay with every weight moved, in each step, by up to the unit roundoffs of both chips' products,
which is what rounding does to the result at the least. A sound chip's difference lies within a small multiple of
that; a lost moment, a wrong gradient or another batch lies far outside. The direction matters, not the loss, which
hides them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from beringia.records.events import Canary
from beringia.train import sharding
from beringia.train.trainer import Trainer

PERTURBED_REPLAYS = 2

BAND_FACTOR = 4.0
"""How many times the largest perturbed replay's difference a sound chip may differ. Derivation in docs/crossing.md: a
perturbed replay moves only the weights, once a step, while each chip rounds activations, products and gradients too;
over clean crossings from emulated chips to the CPU the ratio stayed below 1.3."""

WIDEST_BAND = 0.7
"""Where rounding alone moves a replay far, four times that would let anything pass: no update at all differs by 1, one
at a right angle by 1.4. An update of the recorded length within 0.7 lies within 41 degrees of it."""

FLOOR = 1e-6
"""Smallest band: two float32 chips that agree to rounding may have a perturbed replay of nearly no difference. A few
hundred unit roundoffs of float32, the accumulated rounding of the weights' own float32 update over a replay."""


@dataclass(frozen=True)
class Replay:
    """The recorded steps, and how to take them again."""

    trainer: Trainer
    place: Callable[[int | None], object]
    """Puts a checkpoint (None: the initial state) into the trainer's live tensors."""
    beat: Callable[[], None]
    """Called after every step: a replay is no hang."""
    from_step: int | None
    to_step: int
    roundoff: float
    """Unit roundoffs of both chips' products together."""


def run_canary(replay: Replay) -> Canary:
    """Replay on the trainer's chip and judge. Leaves the live state anywhere: load a checkpoint afterwards."""
    started = time.perf_counter()
    before = _weights_at(replay, replay.from_step)
    recorded = _weights_at(replay, replay.to_step)
    replayed = _weights_after(replay, None)
    perturbed = [_weights_after(replay, seed) for seed in range(PERTURBED_REPLAYS)]
    update = _distance(recorded, before)
    difference = _distance(replayed, recorded) / update
    noise = [_distance(one, replayed) / update for one in perturbed]
    band = min(max(BAND_FACTOR * max(noise), FLOOR), WIDEST_BAND)
    passed = difference <= band  # NaN is not
    return Canary(
        from_step=replay.from_step or 0,
        to_step=replay.to_step,
        difference=difference if difference == difference else None,
        band=band,
        parts={"roundoff": replay.roundoff, **{f"perturbed_replay_{n}": value for n, value in enumerate(noise)}},
        passed=passed,
        seconds=time.perf_counter() - started,
        message=_judgement(passed, difference, band),
    )


def _judgement(passed: bool, difference: float, band: float) -> str:
    if passed:
        return f"the replayed update differs by {difference:.3g} of its length, within the band of {band:.3g}"
    return (
        f"the replayed update differs by {difference:.3g} of its length, beyond the band of {band:.3g}: "
        "this chip does not continue this run"
    )


def _weights_after(replay: Replay, perturbation_seed: int | None) -> list[torch.Tensor]:
    """Weights after the replayed steps, float32 copies on the device (local shards)."""
    replay.place(replay.from_step)
    trainer = replay.trainer
    if perturbation_seed is not None:
        trainer.while_computing = lambda: _perturbed(trainer, replay.roundoff, perturbation_seed)
    try:
        while trainer.step < replay.to_step:
            trainer.train_step()
            replay.beat()
    finally:
        trainer.while_computing = nullcontext
    return _weights(trainer)


def _weights_at(replay: Replay, step: int | None) -> list[torch.Tensor]:
    replay.place(step)
    return _weights(replay.trainer)


def _weights(trainer: Trainer) -> list[torch.Tensor]:
    return [sharding.local(parameter).detach().clone() for parameter in trainer.decoder.parameters()]


@contextmanager
def _perturbed(trainer: Trainer, roundoff: float, seed: int) -> Iterator[None]:
    """Move each weight by a random relative error up to `roundoff` for one forward and backward pass."""
    parameters = [sharding.local(parameter) for parameter in trainer.decoder.parameters()]
    saved = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed((trainer.recipe.seed * 1_000_003 + trainer.step * 101 + seed) % 2**64)
    with torch.no_grad():
        for parameter in parameters:
            relative = torch.empty(parameter.shape).uniform_(-roundoff, roundoff, generator=generator)
            parameter.mul_(1 + relative.to(parameter.device))
    yield
    with torch.no_grad():
        for parameter, original in zip(parameters, saved, strict=True):
            parameter.copy_(original)


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """L2 norm of the difference over all weights and ranks, added up in float64 on the host."""
    squares = [torch.linalg.vector_norm((a - b).cpu().double()) ** 2 for a, b in zip(left, right, strict=True)]
    total = torch.stack(squares).sum().reshape(1)
    device = left[0].device
    return math.sqrt(float(sharding.sum_of_host_values(total, device).item()))
