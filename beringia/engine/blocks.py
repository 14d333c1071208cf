"""Which block of the paged cache holds what: allocation, and sharing of equal beginnings.

A sequence's cache is a list of blocks of `block_tokens` tokens. Sequences that begin with the same tokens share the
full blocks of that beginning (system prompts, the group of answers to one question). Blocks that nobody uses any more
keep their content until they are needed, so a later sequence may still find it. Knows tokens and numbers of blocks; the
tensors are in `cache.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_ROOT = 0
"""The beginning with no tokens."""


@dataclass
class _Block:
    users: int = 0
    beginning: int | None = None
    """Number of the beginning that ends with this block; None until its last token is scheduled."""
    key: tuple[int, tuple[int, ...]] | None = None


class BlockPool:
    """Blocks 0 to `num_blocks` - 1, each used by any number of sequences."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._blocks = [_Block() for _ in range(num_blocks)]
        # Oldest first: what was freed long ago is overwritten first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        # A beginning is named by a number of its own; its key is the beginning before it and its last block's tokens.
        # So equal keys are equal beginnings: there is no hash that could collide.
        self._found: dict[tuple[int, tuple[int, ...]], int] = {}
        self._last_number = _ROOT

    @property
    def num_blocks(self) -> int:
        """In all."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._free)

    def share(self, tokens: Sequence[int]) -> list[int]:
        """Blocks that hold a beginning of these tokens, now used once more; never all tokens, since the last one's
        logits have to be computed."""
        shared: list[int] = []
        beginning = _ROOT
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            block = self._found.get((beginning, tuple(tokens[start : start + self.block_tokens])))
            if block is None:
                break
            number = self._blocks[block].beginning
            assert number is not None
            beginning = number
            self._use(block)
            shared.append(block)
        return shared

    def needed(self, table: Sequence[int], num_tokens: int) -> int:
        """How many blocks a table lacks for so many tokens."""
        return max(0, -(-num_tokens // self.block_tokens) - len(table))

    def extend(self, table: list[int], num_tokens: int) -> bool:
        """Make the table long enough for so many tokens; False, and nothing done, where too few blocks are free."""
        lacking = self.needed(table, num_tokens)
        if lacking > len(self._free):
            return False
        for _ in range(lacking):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._blocks[block].users = 1
            table.append(block)
        return True

    def remember(self, table: Sequence[int], tokens: Sequence[int], start: int, end: int) -> None:
        """The full blocks between these positions are computed in this step: others may share them from now on, even
        in this step, since every layer writes all of the step's tokens before it reads."""
        size = self.block_tokens
        for index in range(start // size, end // size):
            before = _ROOT if index == 0 else self._blocks[table[index - 1]].beginning
            block = self._blocks[table[index]]
            if before is None or block.beginning is not None:
                continue
            self._last_number += 1
            block.beginning = self._last_number
            block.key = (before, tuple(tokens[index * size : (index + 1) * size]))
            # Of two equal beginnings the first is found; the other is a copy that nobody shares.
            self._found.setdefault(block.key, table[index])

    def free(self, table: list[int]) -> None:
        """A sequence gives its blocks back. The last first, so that beginnings stay longest."""
        for block in reversed(table):
            self._blocks[block].users -= 1
            if self._blocks[block].users == 0:
                self._free[block] = None
        table.clear()

    def forget_all(self) -> None:
        """No block can be shared any more: the weights have changed, or a step failed halfway."""
        self._found.clear()
        for block in self._blocks:
            block.beginning = block.key = None

    def _use(self, block: int) -> None:
        self._free.pop(block, None)
        self._blocks[block].users += 1

    def _forget(self, block: int) -> None:
        held = self._blocks[block]
        if held.key is not None and self._found.get(held.key) == block:
            del self._found[held.key]
        held.beginning = held.key = None
