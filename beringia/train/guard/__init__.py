"""The checks that run inside training, within a stated share of the step time. `docs/guard.md` says what they see."""

from beringia.train.guard.guard import Guard

__all__ = ["Guard"]
