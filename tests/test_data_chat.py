"""Chats: the template gives transformers' tokens, and the loss covers what the assistant said and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.data import Tokenizer, load_tokenizer, open_stream, write_tokenizer
from beringia.data.chat import encode_chat, render_chat
from beringia.errors import DataError
from beringia.records.recipe import DataSection

# The kinds of thing that templates of well-known models do: a default system turn, namespaces, tojson, trimming,
# loop controls, generation marks.
ELABORATE = """\
{%- set ns = namespace(system='You are helpful.') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% continue %}{% endif -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] == 'system' %}{{ bos_token }}<|im_start|>system
{{ ns.system | trim }}<|im_end|>
{% endif -%}
{%- if message['role'] == 'assistant' -%}
<|im_start|>assistant
{% generation %}{{ message['content'] | trim }}<|im_end|>
{% endgeneration -%}
{%- elif message['role'] == 'user' -%}
<|im_start|>user
{{ message['content'] }}
    {% if message.tag is defined %}
{{ message.tag | tojson }}
    {% endif %}
<|im_end|>
{% else %}{{ raise_exception('no such role') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

contents = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
turns = st.tuples(
    st.lists(st.just("system"), max_size=1),
    st.lists(st.tuples(contents, contents), min_size=1, max_size=3),
)


def conversation(system: list[str], rounds: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief. "} for _ in system]
    for asked, said in rounds:
        messages += [
            {"role": "user", "content": asked, "tag": {"n": 1, "é": None}},
            {"role": "assistant", "content": said, "tag": None},
        ]
    return messages


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer and transformers' with each template, the elaborate one in a file of its own."""
    from transformers import AutoTokenizer

    pairs = {}
    for name in ("chatml", "elaborate"):
        directory = tmp_path_factory.mktemp(name)
        write_tokenizer("bytes", directory)
        if name == "elaborate":
            (directory / "chat_template.jinja").write_text(ELABORATE)
        pairs[name] = (load_tokenizer(directory), AutoTokenizer.from_pretrained(directory))
    return pairs


@pytest.mark.parametrize("name", ["chatml", "elaborate"])
@settings(max_examples=60, deadline=None)
@given(turns=turns, prompt=st.booleans())
def test_tokens_agree_with_apply_chat_template(
    pairs: dict[str, tuple[Tokenizer, Any]],
    name: str,
    turns: tuple[list[str], list[tuple[str, str]]],
    prompt: bool,
) -> None:
    ours, theirs = pairs[name]
    messages = conversation(*turns)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(render_chat(ours, messages, add_generation_prompt=prompt)) == expected
    assert render_chat(ours, messages) == theirs.apply_chat_template(messages, tokenize=False)


@settings(max_examples=60, deadline=None)
@given(turns=turns)
def test_what_is_learned_is_what_generation_marks_enclose(
    pairs: dict[str, tuple[Tokenizer, Any]], turns: tuple[list[str], list[tuple[str, str]]]
) -> None:
    """Transformers reads the assistant's tokens off `{% generation %}`; we find them for templates without it, too."""
    ours, theirs = pairs["elaborate"]
    messages = conversation(*turns)
    tokens, said = encode_chat(ours, messages)
    marked = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    newline = ours.encode("\n")[0]
    end = ours.encode("<|im_end|>")[0]
    # Ours leaves out the white space after the end mark, which transformers' mark here encloses.
    expected = [
        bool(mark) and not (token == newline and before == end)
        for mark, token, before in zip(marked["assistant_masks"], tokens, [0, *tokens], strict=False)
    ]
    assert tokens == marked["input_ids"]
    assert said == expected


def test_only_the_assistants_turns_and_their_ends_carry_loss(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [
        [{"role": "user", "content": f"Number {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(100, 140)
    ]
    path.write_text("\n".join(json.dumps({"messages": messages, "source": "test"}) for messages in chats))
    tokenizer = load_tokenizer("bytes")
    stream = open_stream(
        DataSection(chat=str(path), sequence_length=256), seed=0, directory=tmp_path, split="train", tokenizer=tokenizer
    )
    assert stream.epoch_samples is not None
    batch = stream.samples(0, stream.epoch_samples)
    learned = tokenizer.decode(batch.labels_BT[batch.labels_BT != -100].tolist())
    said = learned.split("<|im_end|>")[:-1]
    text = tokenizer.decode(batch.tokens_BT.flatten().tolist())
    assert len(said) == len(set(said)) > 30
    assert all(f"<|im_start|>assistant\n{turn}<|im_end|>" in text for turn in said)


def test_a_chat_longer_than_a_row_is_cut_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [
        [{"role": "user", "content": "x" * length}, {"role": "assistant", "content": f"{length} it is"}]
        for length in range(10, 90)
    ]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    tokenizer = load_tokenizer("bytes")
    stream = open_stream(
        DataSection(chat=str(path), sequence_length=64), seed=0, directory=tmp_path, split="train", tokenizer=tokenizer
    )
    assert stream.epoch_samples is not None
    assert bool((stream.samples(0, stream.epoch_samples).labels_BT != -100).any(dim=1).all())  # no row without loss
    assert [note.split(" ", 1)[1] for note in stream.notes] == [
        "chats are longer than 65 tokens and were cut.",
        "of them have no turn of the assistant before the cut and were left out.",
    ]
    with pytest.raises(DataError, match="holds nothing to learn"):
        data = DataSection(chat=str(path), sequence_length=8)
        open_stream(data, seed=0, directory=tmp_path, split="train", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: is not a JSON object"),
        ('{"text": "x"}', 'line 2: needs "messages"'),
        ('{"messages": ["x"]}', 'line 2: needs "messages"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: no turn of the assistant"),
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_stream(
            DataSection(chat=str(path)), seed=0, directory=tmp_path, split="train", tokenizer=load_tokenizer("bytes")
        )


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    # As reasoning models do: the thought of all turns but the last is taken out again.
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[-1:] }}\n{% endfor %}"
    )
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "thought b"}]
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode_chat(tokenizer, turn * 2)


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(DataError, match="refuses this chat"):
        render_chat(load_tokenizer(tmp_path), [{"role": "user", "content": "a"}])


def test_a_tokenizer_without_a_template_says_so(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(DataError, match="has no chat template"):
        render_chat(load_tokenizer(tmp_path), [{"role": "user", "content": "a"}])
