"""One site in turn: what it was given (`given.py`), what one sample's way through it was, against a replay on the CPU
(`shadow.py`, `embedding.py`), and what the whole batch gave at the ends (`head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from beringia.train.guard.capture import EMBEDDING, HEAD, SiteCapture, weights_of
from beringia.train.guard.check import Check, Moment, Step, Training, Turns, When
from beringia.train.guard.embedding import judge_embedding
from beringia.train.guard.finding import Finding
from beringia.train.guard.given import judge_given
from beringia.train.guard.head import judge_gradients, judge_sums
from beringia.train.guard.shadow import DETECTOR, Shadow


class SiteShadow(Check[SiteCapture]):
    """Embedding, layers and head. A site in which it finds nothing is clean."""

    name = DETECTOR
    when = When(look=Moment.FORWARD, judge=(Moment.GRADIENTS,), weight=0.4, order=0)
    vouches = True

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        # The head soon: what is wrong in it is seen nowhere else, and what is wrong in a layer in others, too. The
        # embedding last: it costs least, and what a visit costs is first learnt from the first.
        embedding, first, *others, head = training.sites
        self._turns = Turns((first, head, *others, embedding))
        self._shadow = Shadow(training.decoder, training.objective)

    def look(self, step: Step) -> Sequence[SiteCapture]:
        return [self._capture(site, step) for site in step.demanded or (self._turns.next(),)]

    def judge(self, look: SiteCapture, step: Step) -> Sequence[Finding]:
        if not look.complete:
            return []  # a part of the model that this step did not use
        weights = weights_of(self.training.decoder, look.site)
        given = judge_given(DETECTOR, self.training.decoder, look, step.given)
        if look.site == EMBEDDING:
            return [*given, *judge_embedding(self.training, look, weights, step)]
        sums = judge_sums(DETECTOR, self.training, look) if look.site == HEAD else []
        gradients = judge_gradients(DETECTOR, self.training, look, step.draw("signs"))
        return [*given, *self._shadow.judge(look, weights, step.draw("sample")), *sums, *gradients]

    def _capture(self, site: str, step: Step) -> SiteCapture:
        capture = SiteCapture(self.training.decoder, site)
        step.hooks.callback(capture.close)
        return capture
