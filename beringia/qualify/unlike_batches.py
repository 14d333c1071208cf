"""What is trained, as people train it: one step over micro-batches of unlike sizes and lengths, with targets that the
loss leaves out, as prompts and padding are.

Whether an angle, a mask or a mean is right past the first tokens, or where rows are not alike, only such a step shows.

B samples, T tokens.
"""

from __future__ import annotations

import torch

from beringia.model import IGNORED
from beringia.qualify.serving import Row, longest

_FIRST_ROW = 1_000
"""Apart from the rows of batches and servings."""


def micro_batches(
    row: Row, context: int, is_large: bool, run_tokens: int | None, *, whole: bool
) -> tuple[dict[str, torch.Tensor], ...]:
    """Tokens and labels of each: one long sample whose first third is a prompt; three short ones, filled up behind."""
    long = _length(context, is_large, run_tokens, whole=whole)
    short = max(8, long // 10)
    return _batch(row, _FIRST_ROW, [long], long, prompt=long // 3), _batch(
        row, _FIRST_ROW + 1, [short, short // 2, short // 4], short, prompt=1
    )


def untried(context: int, is_large: bool, run_tokens: int | None, *, whole: bool) -> tuple[str, ...]:
    """What is not tried of training, a clause each, for who reads a certificate."""
    long = _length(context, is_large, run_tokens, whole=whole)
    wanted = context if run_tokens is None else min(run_tokens, context)
    run = "the model takes" if run_tokens is None else "the run has"
    return (f"training on sequences of more than {long:,} tokens ({run} {wanted:,})",) if long < wanted else ()


def _length(context: int, is_large: bool, run_tokens: int | None, *, whole: bool) -> int:
    """The run's own, where it is known and short enough for a quick qualification."""
    long = longest(context, is_large, whole=whole)
    return long if run_tokens is None else min(context, run_tokens if whole else min(run_tokens, long))


def _batch(row: Row, first: int, lengths: list[int], tokens: int, prompt: int) -> dict[str, torch.Tensor]:
    rows = torch.tensor([row(first + number, tokens + 1) for number in range(len(lengths))])
    labels_BT = rows[:, 1:].clone()
    labels_BT[:, :prompt] = IGNORED
    for number, length in enumerate(lengths):
        rows[number, length + 1 :] = rows[0, 0]
        labels_BT[number, length:] = IGNORED
    return {"tokens": rows[:, :-1].contiguous(), "labels": labels_BT}
