"""Blocks of the paged cache: none is lost, none is used twice, and what is shared is equal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from beringia.engine.blocks import BlockPool
from beringia.engine.pace import LEAST_TOKENS, Pace
from beringia.engine.sampling import GumbelNoise, Sampling
from beringia.engine.scheduler import Scheduler, Sequence

BLOCK_TOKENS = 3
NUM_BLOCKS = 12


class Pool(RuleBasedStateMachine):
    """Sequences of few different tokens come, grow and go; `held` says what a block's tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self.sequences: list[tuple[list[int], list[int]]] = []
        self.held: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def begin(self, tokens: list[int]) -> None:
        table = self.pool.share(tokens)
        shared = len(table)
        assert shared * BLOCK_TOKENS < len(tokens), "the last token is always computed"
        for index, block in enumerate(table):
            assert self.held[block] == tuple(tokens[: (index + 1) * BLOCK_TOKENS]), "the same beginning"
        free = self.pool.num_free
        lacking = self.pool.needed(table, len(tokens))
        if not self.pool.extend(table, len(tokens)):
            assert lacking > free
            self.pool.free(table)
            return
        assert free - self.pool.num_free == lacking
        for index, block in enumerate(table[shared:], shared):
            self.held[block] = tuple(tokens[: (index + 1) * BLOCK_TOKENS])
        self.pool.remember(table, tokens, shared * BLOCK_TOKENS, len(tokens))
        self.sequences.append((tokens, table))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        _, table = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.free(table)
        assert table == []

    @rule()
    def forget(self) -> None:
        self.pool.forget_all()
        assert self.pool.share([0] * 20) == self.pool.share([1] * 20) == []

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        used = {block for _, table in self.sequences for block in table}
        assert self.pool.num_free == NUM_BLOCKS - len(used)

    @invariant()
    def a_block_in_two_tables_has_one_content(self) -> None:
        for tokens, table in self.sequences:
            for index, block in enumerate(table[: len(tokens) // BLOCK_TOKENS]):
                assert self.held[block] == tuple(tokens[: (index + 1) * BLOCK_TOKENS])


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def sequence(number: int, length: int, **asked: int) -> Sequence:
    tokens = [number * 100 + place for place in range(length)]
    return Sequence(number, tokens, length, Sampling(**asked), GumbelNoise(number, 4))


def scheduler(**sizes: int) -> Scheduler:
    pool = BlockPool(sizes.get("blocks", 100), 4)
    seconds = sizes.get("step_seconds")
    return Scheduler(
        pool,
        max_sequences=sizes.get("sequences", 8),
        step_tokens=sizes.get("step_tokens", 16),
        step_seconds=None if seconds is None else float(seconds),
    )


def compute(scheduled: Scheduler) -> list[tuple[int, int, int]]:
    """Take a step and give each sequence that is complete a token: (sequence, start, end) of its chunks."""
    chunks = scheduled.schedule()
    for chunk in chunks:
        complete = chunk.completes
        chunk.sequence.num_computed = chunk.end
        if complete:
            chunk.sequence.tokens.append(0)
    return [(chunk.sequence.number, chunk.start, chunk.end) for chunk in chunks]


def test_a_long_prompt_is_computed_in_chunks_and_those_that_decode_do_not_wait_for_it() -> None:
    scheduled = scheduler()
    scheduled.add(sequence(1, 3))
    assert compute(scheduled) == [(1, 0, 3)]
    scheduled.add(sequence(2, 40))
    assert compute(scheduled) == [(1, 3, 4), (2, 0, 15)]
    assert compute(scheduled) == [(1, 4, 5), (2, 15, 30)]
    assert compute(scheduled) == [(1, 5, 6), (2, 30, 40)]
    assert compute(scheduled) == [(1, 6, 7), (2, 40, 41)]


def test_where_steps_are_slow_a_prompt_comes_in_small_chunks_beside_an_answer_and_in_large_ones_alone() -> None:
    scheduled = scheduler(step_tokens=2048, step_seconds=1, blocks=2000)
    scheduled.pace.note(1000, 10.0)
    scheduled.add(sequence(1, 700))
    assert compute(scheduled) == [(1, 0, 700)], "nobody waits for another word"
    scheduled.add(sequence(2, 300))
    assert compute(scheduled) == [(1, 700, 701), (2, 0, 99)], "a hundred tokens a second"
    scheduled.pace.note(100, 0.5)
    assert compute(scheduled) == [(1, 701, 702), (2, 99, 298)]
    assert compute(scheduled) == [(1, 702, 703), (2, 298, 300)]


def test_however_slow_steps_are_a_prompt_goes_on_beside_the_answers() -> None:
    scheduled = scheduler(step_tokens=2048, step_seconds=1, sequences=100, blocks=2000)
    for number in range(90):
        scheduled.add(sequence(number, 4))
    compute(scheduled)
    scheduled.pace.note(90, 900.0)
    scheduled.add(sequence(90, 100))
    assert compute(scheduled)[-1] == (90, 0, 64) and compute(scheduled)[-1] == (90, 64, 100)


@given(
    tokens=st.integers(LEAST_TOKENS, 10_000),
    microseconds=st.integers(0, 10**9),
    others=st.integers(0, 5000),
    most=st.integers(LEAST_TOKENS, 5000),
)
def test_at_the_pace_that_was_measured_no_step_with_more_than_the_least_is_longer_than_asked(
    tokens: int, microseconds: int, others: int, most: int
) -> None:
    pace = Pace(0.25, most)
    pace.note(tokens, microseconds / 1e6)
    of_prompts = pace.beside(others)
    assert LEAST_TOKENS <= of_prompts <= most
    if of_prompts > LEAST_TOKENS:
        assert (of_prompts + others) * microseconds / 1e6 / tokens <= 0.25 * (1 + 1e-9)


def test_requests_start_in_the_order_of_arrival_and_no_more_than_may_run() -> None:
    scheduled = scheduler(sequences=2)
    for number in range(3):
        scheduled.add(sequence(number, 4))
    assert compute(scheduled) == [(0, 0, 4), (1, 0, 4)]
    assert compute(scheduled) == [(0, 4, 5), (1, 4, 5)]
    scheduled.remove(scheduled.running[0])
    assert compute(scheduled) == [(1, 5, 6), (2, 0, 4)]


def test_without_a_free_block_the_newest_is_sent_back_and_computed_again_later() -> None:
    scheduled = scheduler(blocks=4)
    for number in range(2):
        scheduled.add(sequence(number, 7))
    compute(scheduled)
    assert compute(scheduled) == [(0, 7, 8), (1, 7, 8)]
    assert compute(scheduled) == [(0, 8, 9)], "the first takes a block; the second's are given back"
    assert [waiting.number for waiting in scheduled.waiting] == [1]
    scheduled.remove(scheduled.running[0])
    # The block that the first took was the second's last; what is left of its beginning is found again.
    assert compute(scheduled) == [(1, 4, 9)]
