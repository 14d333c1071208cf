"""What chats and folders hold is learned, told or refused, never lost in silence; transformers is the reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_runs import beringia, of_kind, small_recipe, write_recipe

from beringia.data import Stream, Tokenizer, load_tokenizer, open_stream, write_tokenizer
from beringia.data.chat import encode_chat, render_chat
from beringia.data.pack import Packed, pack
from beringia.errors import DataError
from beringia.records.recipe import DataSection

BYTES = load_tokenizer("bytes")
NO_MARKS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Roles and turns in plain text: nothing keeps an answer's tokens apart from what stands around it."""
SHOWING = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for d in documents or [] %}{{ d.title }}\n{% endfor %}"
    + NO_MARKS.replace(
        "{{ m.content }}\n{% endgen", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endgen"
    )
)
IN_PARTS = (
    "{% for m in messages %}{{ m.role }}{% for part in m.content %}<{{ part.text }}>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "é <b>"}}]
DOCUMENTS = [{"title": "Almanac", "text": "Sun."}]


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


def asked(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tokenizer_with(directory: Path, template: str) -> Tokenizer:
    write_tokenizer("bytes", directory)
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


def add_merges(directory: Path, *merges: tuple[str, str]) -> Tokenizer:
    """The tokenizer with these pairs as tokens of their own."""
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    for pair in merges:
        document["model"]["vocab"]["".join(pair)] = len(document["model"]["vocab"])
    document["model"]["merges"] = list(merges)
    path.write_text(json.dumps(document))
    return load_tokenizer(directory)


def transformers_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def write_chats(path: Path, *chats: Any) -> Path:
    """One line a chat: a list of messages, or the whole line's object."""
    lines = [chat if isinstance(chat, dict) else {"messages": chat} for chat in chats]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def open_chats(path: Path, tokenizer: Tokenizer, split: str = "train", length: int = 64) -> Stream:
    data = DataSection(chat=str(path), sequence_length=length)
    return open_stream(data, seed=0, directory=path.parent / "packed", split=split, tokenizer=tokenizer)  # type: ignore[arg-type]


def ordinary(count: int = 6) -> list[list[dict[str, Any]]]:
    return [[asked(f"Number {n}?"), said(f"It is {n}.")] for n in range(count)]


def test_tokens_that_straddle_the_bounds_of_an_answer_are_learned(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, NO_MARKS)
    tokenizer = add_merges(tmp_path, ("Ġ", "t"), (".", "Ċ"))
    messages = [asked("is it?"), said("the chip."), asked("sure?"), said("yes")]
    tokens, learned = encode_chat(tokenizer, messages)
    theirs = transformers_tokenizer(tmp_path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens == theirs["input_ids"]
    assert tokenizer.decode([token for token, is_said in zip(tokens, learned, strict=True) if is_said]) == (
        " the chip.\nyes"
    )
    last = len(tokens) - 1  # white space alone: transformers' mark encloses it, ours leaves it out
    assert [*map(bool, theirs["assistant_masks"])] == [*learned[:last], True] and not learned[last]


@pytest.mark.parametrize("prompt", [False, True])
def test_tools_and_documents_are_given_to_the_template_as_transformers_does(tmp_path: Path, prompt: bool) -> None:
    tokenizer = tokenizer_with(tmp_path, SHOWING)
    messages = [asked("weather?"), said("sunny")]
    for given in ({"tools": TOOLS}, {"documents": DOCUMENTS}, {"tools": TOOLS, "documents": DOCUMENTS}, {"tools": []}):
        expected = transformers_tokenizer(tmp_path).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **given
        )
        assert render_chat(tokenizer, messages, add_generation_prompt=prompt, **given) == expected


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, NO_MARKS)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(SHOWING)
    ours, theirs = load_tokenizer(tmp_path), transformers_tokenizer(tmp_path)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template([asked("a")], tools=tools, tokenize=False)
        assert render_chat(ours, [asked("a")], tools=tools) == expected


def test_what_is_packed_holds_the_tools_and_learns_the_answer_alone(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SHOWING)
    lines = [{"messages": chat, "tools": TOOLS, "documents": DOCUMENTS} for chat in ordinary()]
    stream = open_chats(write_chats(tmp_path / "chats.jsonl", *lines), tokenizer, length=200)
    assert stream.notes == ()
    batch = stream.samples(0, 1)
    assert tokenizer.decode(batch.tokens_BT[0].tolist()).startswith("TOOLS [{")
    assert tokenizer.decode(batch.labels_BT[batch.labels_BT != -100].tolist()).startswith("It is")


def test_what_a_template_does_not_show_is_counted_and_the_first_is_named(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    path = write_chats(
        tmp_path / "chats.jsonl",
        *ordinary(),
        {"messages": ordinary()[0], "tools": TOOLS},
        {"messages": ordinary()[1], "tools": TOOLS, "documents": DOCUMENTS},
        [asked("a"), said("b", tool_calls=calls)],
    )
    expected = (
        f"The chat template does not use the tools of 2 chats (the first: {path}, line 7).",
        f"The chat template does not use the documents of 1 chats (the first: {path}, line 8).",
        f"The chat template does not use the tool calls in 1 chats (the first: {path}, line 9).",
    )
    assert open_chats(path, BYTES).notes == expected
    assert open_chats(path, BYTES).notes == expected  # found packed, and told again
    assert open_chats(path, tokenizer_with(tmp_path, SHOWING), length=200).notes == ()


@pytest.mark.parametrize("turn", [{"role": "assistant"}, said(None), said(""), said(" "), said([])])
def test_a_turn_of_the_assistant_without_content_is_told(tmp_path: Path, turn: dict[str, Any]) -> None:
    path = write_chats(tmp_path / "chats.jsonl", *ordinary(), [asked("a"), turn])
    assert open_chats(path, BYTES).notes == (
        "In 1 chats the assistant has a turn without content, from which only its end is learned "
        f"(the first: {path}, line 7).",
    )


def test_calls_that_the_template_shows_are_content(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    template = SHOWING.replace("{{ m.content }}", "{{ m.content or '' }}")
    path = write_chats(tmp_path / "chats.jsonl", *ordinary(), [asked("a"), said(None, tool_calls=calls)])
    assert open_chats(path, tokenizer_with(tmp_path, template), length=200).notes == ()


@pytest.mark.parametrize("template", [IN_PARTS, None])
def test_parts_of_text_are_shown_as_the_template_does_or_else_joined(tmp_path: Path, template: str | None) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
    messages = [asked([{"type": "text", "text": "2 + 2?"}]), said(parts)]
    tokenizer = tokenizer_with(tmp_path, template) if template else BYTES
    tokens, learned = encode_chat(tokenizer, messages)
    answer = tokenizer.decode([token for token, is_said in zip(tokens, learned, strict=True) if is_said])
    if template:
        theirs = transformers_tokenizer(tmp_path)
        assert tokens == theirs.apply_chat_template(messages, return_dict=False) and answer == "<It is ><4.>"
    else:
        assert tokens == encode_chat(BYTES, [asked("2 + 2?"), said("It is 4.")])[0] and answer == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"content": "a"}, said("b")]}, 'line 2: message 1 has no "role"'),
        ({"messages": [asked([{"type": "image", "url": "x"}]), said("b")]}, "line 2: message 1 has content other than"),
        ({"messages": [asked("a"), said(["b"])]}, "line 2: message 2 has content other than text"),
        ({"conversations": [{"from": "human", "value": "a"}]}, 'line 2: is in the form of ShareGPT: write "messages"'),
        ({"messages": [asked("a"), said("b")], "tools": "[]"}, 'line 2: "tools" is not a list of objects'),
        ({"messages": [asked("a"), said("\ud800")]}, "line 2: holds half of a surrogate pair"),
        ({"messages": [asked("a"), said("b")], "tools": [{"a": "\udfff"}]}, "line 2: holds half of a surrogate pair"),
        ({"messages": [asked("a"), said("b", score=float("nan"))]}, "line 2: holds NaN"),
        ({"messages": [asked("a"), said("b"), {"role": "alien", "content": "c"}]}, "line 2: The chat template of"),
    ],
)
def test_a_line_that_cannot_be_learned_whole_is_refused_by_name(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    template = "{% for m in messages if m.role == 'alien' %}{{ raise_exception('who?') }}{% endfor %}" + NO_MARKS
    path = write_chats(tmp_path / "chats.jsonl", ordinary()[0], line)
    with pytest.raises(DataError, match=f"chats.jsonl, {message}"):
        open_chats(path, tokenizer_with(tmp_path, template))


def test_a_template_that_fails_by_itself_refuses_the_chat(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ 'a' + messages[0].content.count }}")
    with pytest.raises(DataError, match="refuses this chat"):
        render_chat(tokenizer, [asked("a")])


def test_half_a_surrogate_pair_in_a_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DataError, match="texts.jsonl, line 2: holds half of a surrogate pair"):
        pack(path, BYTES, tmp_path / "packed")


def test_rows_without_anything_to_learn_are_counted_and_stay(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, NO_MARKS)
    chats = [[asked(f"A long question, number {n:02d}, fills the row"), said("" if n % 4 else "ok")] for n in range(40)]
    stream = open_chats(write_chats(tmp_path / "chats.jsonl", *chats), tokenizer, length=72)
    assert stream.epoch_samples is not None
    silent = (stream.samples(0, stream.epoch_samples).labels_BT == -100).all(dim=1)
    assert 20 < int(silent.sum()) < stream.epoch_samples
    assert stream.notes[-1].startswith(f"{int(silent.sum())} of {stream.epoch_samples} rows hold nothing to learn (the")


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_data_in_which_no_row_has_anything_to_learn_is_refused(tmp_path: Path, split: str) -> None:
    path = write_chats(tmp_path / "chats.jsonl", *([asked(f"Number {n}?"), said("")] for n in range(9)))
    with pytest.raises(DataError, match=f"The {split} part of .* holds nothing to learn"):
        open_chats(path, tokenizer_with(tmp_path, NO_MARKS), split)


def paths(packed: Packed) -> dict[str, str | None]:
    return {source.path: source.skipped for source in packed.manifest.sources}


def test_linked_folders_are_read_once_and_links_that_lead_back_are_told(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for number, directory in enumerate((folder, folder / "own", elsewhere, elsewhere / "deep")):
        directory.mkdir()
        (directory / "text.txt").write_text(f"Text {number}")
    (folder / "a-link").symlink_to(elsewhere)
    (folder / "an-own").symlink_to(folder / "own")
    (folder / "own/up").symlink_to(tmp_path)
    (elsewhere / "deep/back").symlink_to(elsewhere)
    packed = pack(folder, BYTES, tmp_path / "packed")
    again = "is a link to a folder that is read already or lies above"
    assert paths(packed) == {
        "a-link/deep/back": again,
        "a-link/deep/text.txt": None,
        "a-link/text.txt": None,
        "an-own": again,
        "own/text.txt": None,
        "own/up": again,
        "text.txt": None,
    }
    assert sum(packed.manifest.documents.values()) == 4
    assert "an-own is a link" in packed.notes[0]
    assert pack(folder, BYTES, tmp_path / "packed").directory == packed.directory


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts/shut").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"texts/{number}.txt").write_text(f"Text {number}")
    listing = os.scandir

    def shut(path: Any) -> Any:  # whoever runs as root may read everything
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", shut)
    packed = pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    assert packed.notes == ("1 of 3 files were left out: shut is a folder that cannot be read.",)


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(),
    reason="only Linux's /proc has what root cannot read",
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / f"texts/{number}.txt").write_text(f"Text {number}")
    (tmp_path / "texts/odd.txt").symlink_to("/proc/self/mem")
    packed = pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    assert packed.notes == ("1 of 3 files were left out: odd.txt cannot be read (Input/output error).",)
    assert pack(tmp_path / "texts", BYTES, tmp_path / "packed").directory == packed.directory


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "texts") + b"/caf\xe9.txt")).write_text("Text")
    with pytest.raises(DataError, match=r"caf\\xe9.txt has a name that is not UTF-8: rename it"):
        pack(tmp_path / "texts", BYTES, tmp_path / "packed")


def test_chats_for_a_tokenizer_without_an_end_are_refused_before_they_are_packed(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path)
    configuration = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del configuration["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    (tmp_path / "special_tokens_map.json").unlink()
    path = write_chats(tmp_path / "chats.jsonl", *ordinary())
    with pytest.raises(DataError, match="names no end token: set eos_token"):
        open_chats(path, load_tokenizer(tmp_path))
    assert not (tmp_path / "packed").exists()


@pytest.mark.slow
def test_a_run_tells_at_its_start_of_both_sides_and_of_rows_longer_than_the_models_positions(tmp_path: Path) -> None:
    long = ([asked("x" * (4200 + number)), said("never seen")] for number in range(10))  # some of them on either side
    path = write_chats(tmp_path / "chats.jsonl", *ordinary(30), *long)
    data = {"chat": str(path), "tokenizer": "bytes", "sequence_length": 4104, "held_out_fraction": 0.5}
    document = small_recipe(train={"steps": 1, "batch": 1, "evaluation_sequences": 1})
    document["data"] = data
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    told = [(event.what, event.reason) for event in of_kind(tmp_path / "run", "fallback")]
    assert any(what == "sequence length" and "has 4096 positions" in reason for what, reason in told)
    notes = [reason for what, reason in told if what == "data"]
    assert sum(note.startswith("Held out: ") for note in notes) == 2 and len(notes) == 4
