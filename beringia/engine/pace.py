"""How many tokens of prompts a step computes while somebody waits for the next word of an answer.

A prompt is computed in chunks beside answers that stream, and each of these waits for the whole step: what is a moment
on one chip is ten seconds on another. So a chunk's size follows from how long steps took (as the token budget of
Sarathi-Serve, Agrawal et al. 2024, follows from a profile). Sizes depend on time; answers depend on sizes only by
rounding, as they do on what else is in a batch.
"""

from __future__ import annotations

_FIRST_TOKENS = 256
"""Of a step, before any was measured."""
LEAST_TOKENS = 64
"""Of prompts in any step. Steps of fewer tokens say little of larger ones: for a single token all weights are read."""


class Pace:
    """Learns how many tokens a step of `seconds` has; None: as many as it may have, however long that takes."""

    def __init__(self, seconds: float | None, most_tokens: int) -> None:
        self._seconds = seconds
        self._most = most_tokens
        self._tokens = most_tokens if seconds is None else _FIRST_TOKENS

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if self._seconds is not None and tokens >= min(LEAST_TOKENS, self._most):
            self._tokens = int(tokens * self._seconds / max(seconds, 1e-9))

    def beside(self, others: int) -> int:
        """Tokens of prompts in a step with so many tokens of answers."""
        return max(min(self._tokens, self._most) - others, LEAST_TOKENS)
