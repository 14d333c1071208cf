"""What clients may ask for: OpenAI's requests, field by field.

A field that is not here is refused, and so is a value that would have to be ignored: penalties, tools, other response
formats. Beyond OpenAI's own, vLLM's names for top_k, min_p, stop_token_ids, ignore_eos, return_token_ids,
return_tokens_as_token_ids and continuous_usage_stats are known.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from beringia.engine import Sampling

UNSUPPORTED = "unsupported"
"""Kind of the error of a field that OpenAI has and this server does not compute; its context names the field."""
MOST_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16

Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1)]


def _one_or_list(value: Any) -> str:
    """Which of the two is meant: what is wrong with a list is not that it is no string."""
    return "[list]" if isinstance(value, list) else "[one]"


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    many = isinstance(value, list)
    return (
        "[lists]"
        if isinstance(first, list)
        else "[texts]"
        if isinstance(first, str)
        else "[tokens]"
        if many
        else "[text]"
    )


Stops = Annotated[
    Annotated[Stop, Tag("[one]")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("[list]")],
    Discriminator(_one_or_list),
]

_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (None,),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "suffix": (None,),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
"""OpenAI's fields that this server does not compute: values that change nothing are taken, others are refused."""


def _check_text(given: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair; in the text of a request it can be neither read nor said back."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("A string has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:  # what was just deep enough to be read is not to be written again
        raise ValueError("The body is nested too deep") from None


class StreamOptions(BaseModel):
    """What a stream has beside its pieces."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: each piece says how many tokens there were until it, too."""
    include_obfuscation: Literal[False] = False

    @model_validator(mode="after")
    def _continuous_is_more_of_the_same(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats is for streams with include_usage: true")
        return self


class _Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """In log-probabilities `token_id:7` stands for a token, not its text."""
    user: str | None = None
    """Who asks, for the client's own records: nothing depends on it."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        _check_text(given)
        for name, harmless in _ONLY.items():
            if name in given and not any(given[name] == value for value in harmless):
                raise PydanticCustomError(UNSUPPORTED, "{field} is not supported by this server", {"field": name})
        return {name: value for name, value in given.items() if name not in _ONLY}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for requests with stream: true")
        return self

    @property
    def choices(self) -> int:
        """How many answers."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each piece of it says so."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self, choice: int, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> Sampling:
        """For the engine. Answers to one request have seeds of their own."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop_tokens=tuple(self.stop_token_ids or ()),
            stops=tuple(self.stops),
            ignore_end=self.ignore_eos,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("[one]")] | Annotated[list[TextPart], Field(min_length=1), Tag("[list]")],
        Discriminator(_one_or_list),
    ]
    name: str | None = None
    # What an answer's message has beside these: it may come back as it was given.
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    # OpenAI's client adds these to it where it writes a message out whole, or puts a stream together.
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    parsed: None = None

    @model_validator(mode="after")
    def _reasoning_is_the_assistant_s_and_one(self) -> ChatMessage:
        both = {self.reasoning, self.reasoning_content} - {None}
        if both and self.role != "assistant":
            raise ValueError("reasoning is for messages of the assistant")
        if len(both) > 1:
            raise ValueError("reasoning and reasoning_content are names for the same, but differ")
        return self

    @property
    def text(self) -> str:
        """The content's."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it; which of them say earlier reasoning again, and when, is theirs."""
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "reasoning_content": self.reasoning_content or self.reasoning}
        return {"role": role, "content": self.text} | {key: value for key, value in more.items() if value is not None}


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for requests with logprobs: true")
        return self

    @property
    def num_prompts(self) -> int:
        """A chat is one."""
        return 1

    @property
    def characters(self) -> int:
        """About as long as what the tokenizer will read; a template writes some around each turn."""
        return sum(len(message.text) + len(message.reasoning_content or "") + 32 for message in self.messages)

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens beside the chosen one; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[str, Tag("[text]")]
        | Annotated[list[Token], Field(min_length=1), Tag("[tokens]")]
        | Annotated[list[str], Tag("[texts]")]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Tag("[lists]")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of 0 is for requests with echo: true")
        return self

    @property
    def num_prompts(self) -> int:
        """How many of them."""
        return len(self.prompts)

    @property
    def characters(self) -> int:
        """That the tokenizer will read."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
