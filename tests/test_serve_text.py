"""Text that comes token by token: nothing is lost, cut in a character, or said twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beringia.data.tokenizer import load_tokenizer
from beringia.serve.text import AnswerText, Piece

BYTES = load_tokenizer("bytes")


def pieces(text: str, stops: tuple[str, ...] = (), chat: str | None = None) -> tuple[list[Piece], bool]:
    """As a stream of single bytes: every character of more than one comes in parts."""
    answer = AnswerText(BYTES, stops, chat)
    said = []
    for token in BYTES.encode_documents([text])[0]:
        said.append(answer.push(token))
        if answer.stopped:
            break
    return [*said, answer.rest()], answer.stopped


def content(said: list[Piece]) -> str:
    return "".join(piece.content for piece in said)


def reasoning(said: list[Piece]) -> str:
    return "".join(piece.reasoning for piece in said)


@given(st.text(max_size=40))
def test_the_pieces_are_the_text(text: str) -> None:
    said, stopped = pieces(text)
    assert content(said) == text and not stopped
    assert all("�" not in piece.content for piece in said) or "�" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_whatever_its_pieces_are(text: str, stops: list[str]) -> None:
    said, stopped = pieces(text, tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if ends:
        # The one that is complete first; of several that end together the longest.
        begin = min(text[: min(ends)].find(stop) for stop in stops if text[: min(ends)].endswith(stop))
        assert content(said) == text[:begin]
    else:
        assert content(said) == text


@pytest.mark.parametrize(
    ("prompt", "text", "thought", "answer"),
    [
        ("say<think>\n", "two and two</think>four", "two and two", "four"),
        ("say", "<think>hm</think>yes", "hm", "yes"),
        ("say", " \n<think>hm</think>\nyes", "hm", "\nyes"),
        ("say", "no thought, and </think> is text", "", "no thought, and </think> is text"),
        ("say", "<thin", "", "<thin"),
        ("say", "<think>never ends </thin", "never ends </thin", ""),
        ("say<think>", "a <b </t </think>< c", "a <b </t ", "< c"),
        ("say", "", "", ""),
    ],
)
def test_reasoning_is_what_comes_before_its_mark(prompt: str, text: str, thought: str, answer: str) -> None:
    said, _ = pieces(text, chat=prompt)
    assert (reasoning(said), content(said)) == (thought, answer)


def test_a_character_that_never_ends_is_shown_as_unfinished() -> None:
    answer = AnswerText(BYTES, (), None)
    first, second = BYTES.encode_documents(["é"])[0]
    assert answer.push(first) == Piece() and answer.rest().content == "�"
    assert second != first


def test_a_token_s_bytes_are_what_the_text_is_made_of() -> None:
    text = "Zoë: 𝄞\n"
    assert b"".join(map(BYTES.bytes_of, BYTES.encode_documents([text])[0])) == text.encode()
    assert BYTES.bytes_of(BYTES.end) == b"<end>" or BYTES.bytes_of(BYTES.end).decode() == BYTES.specials["eos_token"]
