"""What a chat holds and its template does not show: counted while packing, told in the packed data's notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from beringia.data.chat import Given, Message, content_text, readable, render_chat
from beringia.data.documents import Document
from beringia.data.tokenizer import Tokenizer
from beringia.errors import DataError

_SENTENCES = {
    "tools": "The chat template does not use the tools of {count} chats",
    "documents": "The chat template does not use the documents of {count} chats",
    "tool_calls": "The chat template does not use the tool calls in {count} chats",
    "empty": "In {count} chats the assistant has a turn without content, from which only its end is learned",
}


class TemplateGaps:
    """How many chats have which gap, and where the first of them is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, chat: Document) -> None:
        """Look at one chat more."""
        for gap in _gaps(self._tokenizer, chat):
            self._counts[gap] = self._counts.get(gap, 0) + 1
            self._first.setdefault(gap, chat.place_in_file)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each kind of gap."""
        return tuple(
            f"{sentence.format(count=self._counts[gap])} (the first: {self._first[gap]})."
            for gap, sentence in _SENTENCES.items()
            if gap in self._counts
        )


def _gaps(tokenizer: Tokenizer, chat: Document) -> Iterator[str]:
    messages = readable(tokenizer, chat.messages, chat.given)
    without_calls = [_without_calls(message) for message in messages]
    if chat.tools and _alike(tokenizer, chat, messages, messages, {**chat.given, "tools": None}):
        yield "tools"
    if chat.documents and _alike(tokenizer, chat, messages, messages, {**chat.given, "documents": None}):
        yield "documents"
    if any(map(_calls, messages)) and _alike(tokenizer, chat, messages, without_calls, chat.given):
        yield "tool_calls"
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not content_text(message).strip():
            # Something else may stand for content: calls, a thought. It is a turn if the template shows it.
            bare = [*messages]
            bare[number] = {key: message[key] for key in ("role", "content") if key in message}
            if _alike(tokenizer, chat, messages, bare, chat.given):
                yield "empty"
                return


def _alike(
    tokenizer: Tokenizer, chat: Document, messages: Sequence[Message], others: Sequence[Message], given: Given
) -> bool:
    """Whether the template shows the chat just so with other messages, or with less beside them."""
    try:
        return render_chat(tokenizer, messages, **chat.given) == render_chat(tokenizer, others, **given)
    except DataError:  # it cannot do without
        return False


def _calls(message: Message) -> bool:
    return bool(message.get("tool_calls"))


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}
