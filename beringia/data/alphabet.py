"""The 54 symbols in which the checkable tasks are written, one token each, and their numbers.

The special symbols come first, in the order in which the configurations of the deepseek_v3 family count them (begin 0,
end 1). Digits and letters are contiguous, so that token = ZERO + value holds up to base 36.
"""

from __future__ import annotations

BEGIN, END, PAD, UNKNOWN = "<begin>", "<end>", "<pad>", "<unknown>"
SPECIALS = (BEGIN, END, PAD, UNKNOWN)
SYMBOLS = SPECIALS + tuple("0123456789" + "abcdefghijklmnopqrstuvwxyz" + "+-*/%=:<>?,() ")
TOKENS = {symbol: number for number, symbol in enumerate(SYMBOLS)}

END_TOKEN = TOKENS[END]
PAD_TOKEN = TOKENS[PAD]
ZERO = TOKENS["0"]
ANSWER_MARK = TOKENS["="]
THOUGHT_MARK = TOKENS[":"]


def spell(tokens: list[int]) -> str:
    """Tokens as text."""
    return "".join(SYMBOLS[token] for token in tokens)


def tokens_of(text: str) -> list[int]:
    """Text without special symbols as tokens. Raises KeyError for a character that is not in the alphabet."""
    return [TOKENS[character] for character in text]
