"""Inference for the models of `model/`, on any chip: continuous batching over a paged cache.

Start in `engine.py`. A step: `scheduler.py` says which tokens are computed, `blocks.py` where they go, `forward.py`
computes their logits from `weights.py` and `cache.py` with `operators/`, `sampling.py` chooses the next ones.
`endpoint.py` has the same interface over a server.
"""

from beringia.engine.engine import Completion, Engine, EngineLimits
from beringia.engine.sampling import Sampling, TokenLogprobs

Limits = EngineLimits
"""As callers outside know it, beside `Engine`."""

__all__ = ["Completion", "Engine", "EngineLimits", "Limits", "Sampling", "TokenLogprobs"]
