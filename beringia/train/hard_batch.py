"""Whether the data of a step explain its spike: a batch that is hard is so wherever it is computed, and another is not.

Asked after the update, with the weights as they are by then. The data explain a rise of some number where

- every site computes rightly in the pass of this very batch (the guard's shadows);
- with the same weights the batch stands out from the one that is due, by at least half of the rise (in logarithms):
  what struck one step and is gone does not come again, and weights that were spoiled make every batch hard;
- its samples, passed through the model one by one, add up to it: of gradients the triangle inequality says so; and
- the samples that give the most are so on the CPU, too, from the same weights and in the same dtype.

Then the spike is told and is no alarm. In all other cases it is one, as ever: also with several ranks, where a sample
of one rank cannot be told from the others'. Changes nothing of the run; the host holds the weights and one gradient of
them meanwhile, as for `divergence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from beringia.records.events import Alarm
from beringia.train.divergence import copy_on_the_cpu
from beringia.train.guard.checks.spikes import number_name
from beringia.train.trainer import Trainer

HARDEST_SAMPLES = 2
"""Computed on the CPU for each number that rose."""
AGREED = 2.0
"""Factor within which chip and CPU are said to agree: whether layers compute rightly was checked to their roundings;
here it is only asked whether the number is as large."""
_ROUNDING = 1.01
"""Of sums of norms, in whatever dtype gradients were stored."""

Numbers = Mapping[str, float]


def explained_by_data(trainer: Trainer, spikes: Sequence[Alarm], beat: Callable[[], None]) -> bool:
    """Whether the data explain all these spikes of the step that was just taken, in which no site was found wrong."""
    if trainer.ranks.count > 1:
        return False
    due = trainer.numbers_of_step()
    beat()
    with trainer.one_step_back():
        batch = trainer.numbers_of_step()
        if not all(stands_out(spike, batch, due) for spike in spikes):
            return False
        return all(_agreed(trainer, name, batch, beat) for name in {_name(spike) for spike in spikes})


def _name(spike: Alarm) -> str:
    return number_name(spike.site, spike.tensor)


def stands_out(spike: Alarm, batch: Numbers, due: Numbers) -> bool:
    """Whether the number of one batch is above another's by at least half of the rise."""
    here, there = batch[_name(spike)], due[_name(spike)]
    if spike.value is None or not (0.0 < there < math.inf and 0.0 < here < math.inf):
        return False
    return math.log(here / there) >= 0.5 * spike.value


def _agreed(trainer: Trainer, name: str, batch: Numbers, beat: Callable[[], None]) -> bool:
    counts = trainer.counts()
    shares = []
    for place, sample in enumerate(trainer.samples()):
        shares.append((trainer.all_numbers_of(sample, counts)[name], place))
        beat()
    if batch[name] > _ROUNDING * sum(share for share, _ in shares):
        return False
    hardest = dict((place, share) for share, place in sorted(shares, reverse=True)[:HARDEST_SAMPLES])
    on_cpu = copy_on_the_cpu(trainer, beat)
    there = [
        (share, on_cpu.all_numbers_of(sample, counts)[name])
        for place, sample in enumerate(trainer.samples())
        if (share := hardest.get(place)) is not None
    ]
    return all(share / AGREED <= value <= share * AGREED for share, value in there)
