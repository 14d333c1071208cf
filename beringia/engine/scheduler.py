"""Which tokens the next step computes: continuous batching with chunked prefill.

A sequence waits, then runs. In every step each running sequence whose prompt is computed gets one token; what is left
of the step's tokens goes to prompts, whole or in chunks, in the order of arrival: of as many tokens as the pace allows
where somebody waits for a next token. Where the cache has no block left for a running sequence, the newest one goes
back to waiting and is computed again later.

A sequence may carry a draft of its next token: it is computed behind the newest one, and counts only if that one's
logits choose it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from beringia.data.detokenizer import StopWatch
from beringia.engine.blocks import BlockPool
from beringia.engine.pace import Pace
from beringia.engine.sampling import GumbelNoise, Sampling, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """One request on its way: its tokens so far, and how many of them are in the cache."""

    number: int
    tokens: list[int]
    """The prompt's, then the new ones."""
    num_prompt: int
    sampling: Sampling
    noise: GumbelNoise
    stop_watch: StopWatch | None = None
    """None: no stop string ends it."""
    num_computed: int = 0
    draft: tuple[int, ...] = ()
    """What the next token may be, not yet checked; one or none."""
    table: list[int] = field(default_factory=list)
    """Its blocks, in order."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: str | None = None
    at_string: bool = False
    """Whether a stop string ended it."""
    error: str | None = None

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is not in the cache."""
        return self.num_computed == len(self.tokens) - 1 >= self.num_prompt

    @property
    def new_tokens(self) -> list[int]:
        """What was generated."""
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether it has the sequence's last token, whose logits choose the next one."""
        return self.end >= len(self.sequence.tokens)

    @property
    def tokens(self) -> list[int]:
        """The draft among them."""
        tokens = self.sequence.tokens[self.start : self.end]
        return [*tokens, *self.sequence.draft] if self.drafted else tokens

    @property
    def drafted(self) -> int:
        """How many of its tokens are a draft."""
        return max(0, self.end - len(self.sequence.tokens))


class Scheduler:
    """The queue, the running sequences, and their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        step_tokens: int,
        step_seconds: float | None = None,
        drafts: bool = False,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self.pace = Pace(step_seconds, step_tokens)
        self._drafts = drafts

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; those that decode come first. Takes the blocks that they need."""
        chunks: list[Chunk] = []
        budget = self._step_tokens
        for sequence in self._decoding():
            end = len(sequence.tokens) + len(sequence.draft)
            chunks.append(Chunk(sequence, sequence.num_computed, end))
            self.note_computed(sequence, sequence.num_computed, len(sequence.tokens))
            budget -= end - sequence.num_computed
        if chunks:
            budget = min(budget, self.pace.beside(self._step_tokens - budget))
        for sequence in [s for s in self.running if not s.decodes]:
            budget -= self._take(sequence, budget, chunks)
        while self.waiting and budget > 0 and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._take(sequence, budget, chunks)
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks."""
        self.pool.free(sequence.table)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def note_computed(self, sequence: Sequence, start: int, end: int) -> None:
        """These tokens are in the cache after this step."""
        self.pool.remember(sequence.table, sequence.tokens, start, end)

    def restart(self) -> None:
        """Compute all running sequences again from their first token: the weights have changed."""
        while self.running:
            newest = self.running.pop()
            self._send_back(newest)
            self.waiting.appendleft(newest)
        self.pool.forget_all()

    def _decoding(self) -> Iterable[Sequence]:
        """Running sequences that need one token computed, each with a block for it."""
        for sequence in [s for s in self.running if s.decodes]:
            # With drafts: room for the draft, and for the token after it, whose draft is made in the same step.
            needed = len(sequence.tokens) + (len(sequence.draft) + 1 if self._drafts else 0)
            while sequence in self.running and not self.pool.extend(sequence.table, needed):
                newest = self.running.pop()
                self._send_back(newest)
                self.waiting.appendleft(newest)
            if sequence in self.running:
                yield sequence

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the next chunk of a prompt, and say how many tokens it has."""
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + budget)
        if end > start:
            self.note_computed(sequence, start, end)
            chunks.append(Chunk(sequence, start, end))
        return max(0, end - start)

    def _admit(self, sequence: Sequence) -> bool:
        """Find shared blocks and take the others for all tokens so far; False where there are not enough."""
        if sequence.sampling.prompt_logprobs is None:  # those need every token's logits
            sequence.table = self.pool.share(sequence.tokens)
        sequence.num_computed = len(sequence.table) * self.pool.block_tokens
        if self._drafts and sequence.num_computed:
            sequence.num_computed -= 1  # drafting goes on from the last one's hidden state, which no cache keeps
        if not self.pool.extend(sequence.table, len(sequence.tokens) + int(self._drafts)):
            self._send_back(sequence)
            return False
        return True

    def _send_back(self, sequence: Sequence) -> None:
        """Free its blocks; it is computed from its first token, new ones included, when it runs again."""
        self.pool.free(sequence.table)
        sequence.num_computed, sequence.draft = 0, ()
