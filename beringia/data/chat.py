"""Chats as tokens: the tokenizer's own template applied, and which tokens the assistant said.

The tokens agree with transformers' `apply_chat_template` one by one (tested). A template is code from elsewhere: it
runs in Jinja's immutable sandbox and sees plain data only. `strftime_now` is left undefined on purpose: with a date in
the prompt, tomorrow's data would be other data; templates that use it carry a fixed date for this case.

A message is what the JSON line holds: `role`, `content`, and whatever else the template reads. Content may be a list of
text parts; a template that cannot read lists is given their texts, joined.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, TypedDict, TypeGuard

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from beringia.data.tokenizer import Tokenizer
from beringia.errors import DataError

Message = dict[str, Any]
Extras = list[dict[str, Any]] | None
"""Tools or documents that a template may show beside the messages."""


class Given(TypedDict):
    """What a template is given beside the messages."""

    tools: Extras
    documents: Extras


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Extras = None,
    documents: Extras = None,
    add_generation_prompt: bool = False,
) -> str:
    """The chat as one text. Raises DataError where there is no template, or it refuses these messages."""
    template = tokenizer.chat_template if tools is None else tokenizer.tool_template or tokenizer.chat_template
    if template is None:
        raise DataError(f"The tokenizer of {tokenizer.source} has no chat template: add one as chat_template.jinja.")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        text: str = _compile(template).render(
            messages=present,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.specials,
        )
    except Exception as error:  # code from elsewhere: a text added to a missing one is a TypeError, and so on
        raise DataError(f"The chat template of {tokenizer.source} refuses this chat: {error}.") from None
    return text


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Extras = None, documents: Extras = None
) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which of them the assistant said (its end mark included, white space after it not)."""
    given: Given = {"tools": tools, "documents": documents}
    messages = readable(tokenizer, messages, given)
    text = render_chat(tokenizer, messages, **given)
    spans = assistant_spans(tokenizer, messages, text, given)
    tokens, offsets = tokenizer.encode_with_offsets(text)
    return tokens, [any(_overlap(token, span) for span in spans) for token in offsets]


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """A token may begin with the prompt's last space or end with a newline: what it has of the answer is learned."""
    first, last = max(token[0], span[0]), min(token[1], span[1])
    return first < last or (first == last and token[0] == token[1])  # some tokens cover no character


def readable(tokenizer: Tokenizer, messages: Sequence[Message], given: Given) -> Sequence[Message]:
    """The messages, with text parts joined where the template does not read lists of them.

    A template that reads lists shows each part's text; another fails, shows nothing, or shows the list as Python does.
    """
    lists = [message["content"] for message in messages if _is_parts(message.get("content"))]
    if not lists:
        return messages
    joined = [
        {**message, "content": content_text(message)} if _is_parts(message.get("content")) else message
        for message in messages
    ]
    try:
        text = render_chat(tokenizer, messages, **given)
    except DataError:
        return joined
    read = all(part["text"].strip() in text for parts in lists for part in parts)
    return messages if read and not any(str(parts) in text for parts in lists) else joined


def content_text(message: Message) -> str:
    """What a message says, its text parts joined; empty where it says nothing."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if _is_parts(content) else str(content or "")


def _is_parts(content: object) -> TypeGuard[list[Message]]:
    return isinstance(content, list) and all(is_text_part(part) for part in content)


def is_text_part(part: object) -> bool:
    """Whether this is `{"type": "text", "text": "..."}`."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def assistant_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, given: Given
) -> list[tuple[int, int]]:
    """Characters (start, end) of `text` that are the assistant's turns.

    A turn is what the template adds to the generation prompt when the message is there. Raises DataError for a template
    that rewrites earlier turns, for then no prefix of the text is what the model will see when it must answer.
    """
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = render_chat(tokenizer, messages[:number], add_generation_prompt=True, **given) if number else ""
        after = render_chat(tokenizer, messages[: number + 1], **given)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                f"The chat template of {tokenizer.source} rewrites earlier turns, so turn {number + 1} cannot be told "
                "from its prompt: split such chats so that each ends with its only assistant turn."
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says in some templates; it renders as what it encloses."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model should not learn.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
