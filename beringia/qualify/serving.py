"""What is served, as people serve it: prompts whole, in pieces and behind a beginning that others share; decoding
alone, with a few and with many others, at short, middle and long contexts, over many steps; beside padding, and when
another request has finished.

A *serving* is some sequences and the calls in which they go through the model, each behind what the cache holds of
them. What every call gives must be what one pass over the whole sequences gives, so float64 makes one such pass and no
more, and the noise of rounding is measured on it, too. All combinations of batch and context would be many: `quick` is
a covering subset, in which each batch, each context and each way of a prompt occurs; `whole` is their product.

R sequences (rows), T tokens of a row, V vocabulary, C compared positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from beringia.engine.engine import EngineLimits

BATCHES = (1, 4, 64)
"""Requests that decode together: alone (kernels of their own for one row), few, as many as a tile of a matrix unit."""
SEQUENCES = 4
SHORT = 48
"""Tokens: within one block of attention on any chip."""
LONG_QUICK, LONG_QUICK_LARGE = 600, 320
"""Past 512 and past 256 keys, where kernels are known to change; the latter for models that are not small."""
LONG_WHOLE = 2_100
LARGE_PARAMETERS = 20_000_000
FEW_STEPS, MANY_STEPS = 3, 12
LEAST = 16
"""Tokens that a model must take to be served at all as this is done here."""
ENGINE_PROMPT, ENGINE_PROMPT_QUICK_LARGE = 288, 96
"""Tokens: past 256 keys, which the engine's attention adds up by operators of its own; some blocks of its cache."""
BLOCK_TOKENS = EngineLimits().block_tokens
"""Of the engine's cache, as it is by default."""
_ENGINE_ROW = 50
"""Apart from the rows of other servings."""
_COMPARED = 64
"""Positions of a call whose logits are compared, at most."""

Row = Callable[[int, int], list[int]]
"""Number of a row and how many tokens: the tokens."""
Around = AbstractContextManager[None]
"""Around a call."""


@dataclass(frozen=True)
class Step:
    """One call: tokens `start` to `end` of these rows, which may come several times."""

    scenario: str
    rows: tuple[int, ...]
    start: int
    end: int
    watched: bool = False
    """Whether each of its operator calls is held against float64."""
    by_engine: bool = False
    """Whether Beringia's engine makes it, and not the decoder with a cache of its own."""
    beside: bool = False
    """Whether the engine computes it in one pass with the step before it."""


@dataclass(frozen=True)
class Serving:
    """Sequences and the calls in which they are served."""

    tokens_RT: torch.Tensor
    steps: tuple[Step, ...]
    lengths: tuple[int, ...]
    """Of each row, without the padding behind it."""

    @property
    def by_engine(self) -> bool:
        """Whether Beringia's engine makes the calls."""
        return self.steps[0].by_engine

    @property
    def passes(self) -> tuple[tuple[Step, ...], ...]:
        """The steps that are computed together, in order; the first of each says whether it is watched."""
        passes: list[tuple[Step, ...]] = []
        for step in self.steps:
            passes = [*passes[:-1], (*passes[-1], step)] if step.beside else [*passes, (step,)]
        return tuple(passes)

    def compared(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a call's results, the ones that are compared: which of its rows, and which position of the sequence."""
        positions = _spread(step.start, step.end)
        pairs = [
            (place, position)
            for place, row in enumerate(step.rows)
            for position in positions
            if position < self.lengths[row]
        ]
        places_C, positions_C = torch.tensor(pairs).reshape(-1, 2).unbind(1)
        return places_C, positions_C

    def routes_in(self, step: Step, routes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the experts that one pass over the whole sequences chose (R T rows of K, by layer) those of a call."""
        rows, (sequences, tokens) = list(step.rows), self.tokens_RT.shape
        return {
            layer: chosen.view(sequences, tokens, -1)[rows, step.start : step.end].flatten(0, 1)
            for layer, chosen in routes.items()
        }

    def sources(self, held: Sequence[int], step: Step) -> list[int]:
        """Where in the last call's rows the cache of each row is found: the row itself, or one that begins alike."""
        return [self._source(held, row, step.start) for row in step.rows] if step.start else []

    def _source(self, held: Sequence[int], row: int, start: int) -> int:
        if row in held:
            return held.index(row)
        begins = self.tokens_RT[row, :start]
        return next(place for place, other in enumerate(held) if torch.equal(self.tokens_RT[other, :start], begins))


def longest(context: int, is_large: bool, *, whole: bool) -> int:
    """Tokens of the longest sequence that is tried of a model that takes `context` tokens."""
    return min(context, LONG_WHOLE if whole else LONG_QUICK_LARGE if is_large else LONG_QUICK)


def servings(row: Row, context: int, is_large: bool, *, whole: bool) -> tuple[Serving, ...]:
    """What is tried of a model; `row` gives sequences of its data."""
    long = longest(context, is_large, whole=whole)
    if long < LEAST:
        return ()
    short = min(SHORT, long // 2)
    made = [_one_long(row, long), _shared(row, long), _many(row, short, long), _padded(row, short)]
    made.append(_in_engine(row, ENGINE_PROMPT_QUICK_LARGE if is_large and not whole else ENGINE_PROMPT, long))
    if whole:
        made += _product(row, {"short": short, "middle": long // 3, "long": long - FEW_STEPS})
    return tuple(made)


def scenarios(made: Sequence[Serving]) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(dict.fromkeys(step.scenario for serving in made for step in serving.steps))


def untried(context: int, is_large: bool, *, whole: bool) -> tuple[str, ...]:
    """What is not tried of serving, a clause each, for who reads a certificate."""
    long = longest(context, is_large, whole=whole)
    if long < LEAST:
        return (f"serving at all (the model takes {context:,} tokens)",)
    told = [f"contexts beyond {long:,} tokens (the model takes {context:,})"] if long < context else []
    if not whole:
        told.append(f"batches of {_listed(BATCHES)} at every context: each at one or two of them")
    return (
        *told,
        "other batches, and other software for serving it than Beringia's with torch's operators",
    )


def _listed(numbers: Sequence[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}"


def _tokens(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(rows)


def _one_long(row: Row, long: int) -> Serving:
    """The same prompt whole and in pieces of unlike sizes, one of them a single token; then it decodes alone."""
    prompt = long - FEW_STEPS
    cuts = sorted({0, prompt // 3, prompt // 3 + 1, prompt // 3 + 1 + min(64, prompt // 4), prompt - 7, prompt})
    name = f"of {prompt} tokens"
    pieces = [Step(f"a prompt {name} in pieces", (0,), *cut) for cut in itertools.pairwise(cuts)]
    decoding = [Step(f"decoding 1 at {prompt}", (0,), at, at + 1, watched=at == prompt) for at in range(prompt, long)]
    steps = (Step(f"a prompt {name} whole", (0,), 0, prompt), *pieces[:-1], _watched(pieces[-1]), *decoding)
    return Serving(_tokens([row(0, long)]), steps, (long,))


def _shared(row: Row, longest: int) -> Serving:
    """Prompts behind a beginning that is in the cache already; they decode together, and one of them finishes."""
    beginning = longest // 3
    prompt = beginning + min(16, longest // 3)
    long = prompt + 2 * FEW_STEPS
    first = row(1, beginning)
    rows = [[*first, *row(2 + number, long - beginning)] for number in range(SEQUENCES)]
    everyone = tuple(range(SEQUENCES))
    left = (*everyone[:1], *everyone[2:])
    name = f"prompts behind a shared beginning of {beginning} tokens"
    finished = prompt + FEW_STEPS
    steps = [
        Step(name, (0,), 0, beginning),
        Step(name, everyone, beginning, prompt, watched=True),
        *(
            Step(f"decoding 4 at {prompt}", everyone, at, at + 1, watched=at == prompt)
            for at in range(prompt, finished)
        ),
        *(Step("decoding when another request has finished", left, at, at + 1) for at in range(finished, long)),
    ]
    return Serving(_tokens(rows), tuple(steps), (long,) * SEQUENCES)


def _many(row: Row, short: int, longest: int) -> Serving:
    """Many requests decode together, then one of them goes on alone for many steps."""
    many = short + FEW_STEPS
    long = min(many + MANY_STEPS, longest)
    everyone = tuple(range(SEQUENCES))
    steps = [
        Step(f"decoding 64 at {short}", everyone, 0, short),
        *(Step(f"decoding 64 at {short}", everyone * 16, at, at + 1, watched=at == short) for at in range(short, many)),
        *(Step(f"decoding 1 at {many}, many steps", (1,), at, at + 1) for at in range(many, long)),
    ]
    rows = [row(2 + SEQUENCES + number, long) for number in range(SEQUENCES)]
    return Serving(_tokens(rows), tuple(steps), (long,) * SEQUENCES)


def _padded(row: Row, short: int) -> Serving:
    """Prompts of unlike lengths in one call, filled up behind with one and the same token."""
    lengths = tuple(max(1, short * (number + 1) // SEQUENCES) for number in range(SEQUENCES))
    rows = [row(2 + 2 * SEQUENCES + number, short) for number in range(SEQUENCES)]
    tokens_RT = _tokens(rows)
    for number, length in enumerate(lengths):
        tokens_RT[number, length:] = tokens_RT[0, 0]
    return Serving(tokens_RT, (Step("prompts with padding", tuple(range(SEQUENCES)), 0, short),), lengths)


def _in_engine(row: Row, prompt: int, longest: int) -> Serving:
    """As the engine computes: a prompt in chunks, others behind its beginning beside it when it decodes already, and
    requests of unlike lengths that decode together."""
    prompt = min(prompt, longest - 2 * FEW_STEPS)
    # Only full blocks are shared.
    beginning, cut = prompt // 3 // BLOCK_TOKENS * BLOCK_TOKENS, prompt // 2
    other = min(2 * BLOCK_TOKENS, prompt // 4)
    first = row(_ENGINE_ROW, prompt + 2 * FEW_STEPS)
    second = [*first[:beginning], *row(_ENGINE_ROW + 1, other + FEW_STEPS)]
    third = row(_ENGINE_ROW + 2, other + FEW_STEPS)
    shared = beginning + other
    chunks, mixed = (
        f"in the engine, prompts of {prompt} tokens in chunks",
        "in the engine, prompts beside requests that decode",
    )
    steps = [
        *_pass(chunks, {0: (0, cut)}),
        *_pass(chunks, {0: (cut, prompt)}),
        *_pass(mixed, {0: (prompt, prompt + 1), 1: (beginning, shared), 2: (0, other - 1)}, watched=True),
        *_pass(mixed, {0: (prompt + 1, prompt + 2), 1: (shared, shared + 1), 2: (other - 1, other)}),
    ]
    lengths: tuple[int, ...] = (prompt + 2, shared + 1, other)
    for _ in range(1, FEW_STEPS):
        decoding = {number: (length, length + 1) for number, length in enumerate(lengths)}
        steps += _pass("in the engine, decoding 3 of unlike lengths", decoding)
        lengths = tuple(length + 1 for length in lengths)
    rows = [(one + first)[: max(lengths)] for one in (first, second, third)]  # filled up behind
    return Serving(_tokens(rows), tuple(steps), lengths)


def _pass(scenario: str, spans: Mapping[int, tuple[int, int]], *, watched: bool = False) -> list[Step]:
    """One pass of the engine: of each row the tokens from one to another."""
    return [
        Step(scenario, (row,), start, end, watched=watched and not number, by_engine=True, beside=number > 0)
        for number, (row, (start, end)) in enumerate(spans.items())
    ]


def _product(row: Row, contexts: dict[str, int]) -> list[Serving]:
    """Every batch at every context."""
    made = []
    for number, context in enumerate(contexts.values()):
        rows = [row(100 + number * SEQUENCES + each, context + FEW_STEPS) for each in range(SEQUENCES)]
        steps: list[Step] = []
        steps.append(Step(f"prompts of {context} tokens", tuple(range(SEQUENCES)), 0, context))
        for batch in reversed(BATCHES):  # the cache of the most is there for the fewer
            name = f"decoding {batch} at {context}, all batches"
            together = tuple(each % SEQUENCES for each in range(batch))
            steps += [Step(name, together, at, at + 1) for at in range(context, context + FEW_STEPS)]
        made.append(Serving(_tokens(rows), tuple(steps), (context + FEW_STEPS,) * SEQUENCES))
    return made


def _watched(step: Step) -> Step:
    return replace(step, watched=True)


def _spread(start: int, end: int) -> list[int]:
    """All positions of a short call; of a long one its first and last ones, and others evenly between."""
    if end - start <= _COMPARED:
        return list(range(start, end))
    edge = _COMPARED // 4
    between = [start + edge + place * (end - start - 2 * edge) // (2 * edge) for place in range(2 * edge)]
    return [*range(start, start + edge), *between, *range(end - edge, end)]
