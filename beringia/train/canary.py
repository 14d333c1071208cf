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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from beringia.records.events import Canary
from beringia.train import sharding
from beringia.train.compute import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from beringia.train.session import Session

PERTURBED_REPLAYS = 2

BAND_FACTOR = 4.0
"""How many times the largest perturbed replay's difference a sound chip may differ. Derivation in docs/crossing.md: a
perturbed replay moves only the weights, once a step, while each chip rounds activations, products and gradients too;
over clean crossings between all emulated chips and the CPU the ratio stayed below half of this."""

FLOOR = 1e-6
"""Smallest band: two float32 chips that agree to rounding may have a perturbed replay of nearly no difference. A few
hundred unit roundoffs of float32, the accumulated rounding of the weights' own float32 update over a replay."""


def run_canary(session: Session, from_step: int | None, to_step: int) -> Canary:
    """Replay on the session's chip and judge. Leaves the live state anywhere: load a checkpoint afterwards."""
    started = time.perf_counter()
    before = _weights_at(session, from_step)
    recorded = _weights_at(session, to_step)
    replayed = _replay(session, from_step, to_step, None)
    roundoff = _roundoffs(session)
    perturbed = [_replay(session, from_step, to_step, (roundoff, seed)) for seed in range(PERTURBED_REPLAYS)]
    update = _distance(recorded, before)
    difference = _distance(replayed, recorded) / update
    noise = [_distance(one, replayed) / update for one in perturbed]
    band = max(BAND_FACTOR * max(noise), FLOOR)
    passed = difference <= band  # NaN is not
    return Canary(
        from_step=from_step or 0,
        to_step=to_step,
        difference=difference if difference == difference else None,
        band=band,
        parts={"roundoff": roundoff, **{f"perturbed_replay_{n}": value for n, value in enumerate(noise)}},
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


def _replay(
    session: Session, from_step: int | None, to_step: int, noise: tuple[float, int] | None
) -> list[torch.Tensor]:
    """Weights after the replayed steps, float32 copies on the device (local shards)."""
    session.place(from_step)
    trainer = session.trainer
    if noise is not None:
        trainer.while_computing = lambda: _perturbed(session, *noise)
    try:
        while trainer.step < to_step:
            trainer.train_step()
            session.channel.beat()
    finally:
        trainer.while_computing = _undisturbed
    return _weights(session)


def _weights_at(session: Session, step: int | None) -> list[torch.Tensor]:
    session.place(step)
    return _weights(session)


def _weights(session: Session) -> list[torch.Tensor]:
    return [sharding.local(parameter).detach().clone() for parameter in session.trainer.decoder.parameters()]


def _roundoffs(session: Session) -> float:
    old = session.order.canary_compute_dtype or "float32"
    new = str(session.compute_dtype).removeprefix("torch.")
    return UNIT_ROUNDOFF[old] + UNIT_ROUNDOFF[new]


@contextmanager
def _undisturbed() -> Iterator[None]:
    yield


@contextmanager
def _perturbed(session: Session, roundoff: float, seed: int) -> Iterator[None]:
    """Move each weight by a random relative error up to `roundoff` for one forward and backward pass."""
    parameters = [sharding.local(parameter) for parameter in session.trainer.decoder.parameters()]
    saved = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(session.recipe.seed * 1_000_003 + session.trainer.step * 101 + seed)
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
