"""Whatever files a tokenizer lies in, our tokens are AutoTokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from beringia.data.chat import render_chat
from beringia.data.tokenizer import Tokenizer, _byte_symbol, load_tokenizer
from beringia.data.tokenizer_directory import ROLES as COMMON_ROLES
from beringia.errors import DataError

SPACE = "\u2581"
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("1", "2"), ("12", "3"), ("e", "r"), ("w", "o")]


def byte_level(specials: list[str]) -> Backend:
    names = [*specials, *map(_byte_symbol, range(256)), *map("".join, MERGES)]
    backend = Backend(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def byte_level_in_words(specials: list[str]) -> Backend:
    backend = byte_level(specials)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if specials:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", pair=f"{specials[0]} $A $B", special_tokens=[(specials[0], 0)]
        )
    return backend


def llama_like(specials: list[str]) -> Backend:
    letters = sorted({letter for pair in MERGES for each in pair for letter in each} | {SPACE, "d", "!"})
    names = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, MERGES)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def words(specials: list[str]) -> Backend:
    names = ["<unk>", *specials, "hello", "world", "12"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    backend = Backend(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


BACKENDS = (byte_level, byte_level_in_words, llama_like, words)
NAMES = ["<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_end|>", "hello", "<new>", "<other>"]
ROLES = ["bos_token", "eos_token", "pad_token", "unk_token"]
TEXTS = [
    "hello world 12345",
    "<s>hello</s>",
    " hello  <new> <|im_end|>er!\n",
    "he<pad> llo<other>x",
    "e\u0301 \u00e9 123",
]

names = st.sampled_from(NAMES)
flags = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), st.booleans())
)
as_table = st.builds(lambda name, more: {"content": name, **more}, names, flags)
typed = as_table.map(lambda table: {"__type": "AddedToken", **table, "special": True})
numbered = st.builds(
    lambda token, special: {"normalized": False, "lstrip": False, "rstrip": False, **token, "special": special},
    as_table,
    st.booleans(),
)
decoder = st.dictionaries(st.sampled_from(["0", "1", "2", "263", "270", "300"]), numbered, max_size=3)
configuration = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(ROLES, st.one_of(names, typed, st.none())),
        "tokenizer_class": st.sampled_from(
            ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast"]
            + ["TokenizersBackend", "NoSuchTokenizer"]
        ),
        "added_tokens_decoder": decoder,
        "additional_special_tokens": st.lists(names, max_size=2),
        "extra_special_tokens": st.one_of(st.lists(names, max_size=2), st.just({"image_token": "<other>"})),
        "image_token": names,
        "add_prefix_space": st.sampled_from([None, True, False]),
        "add_bos_token": st.booleans(),
        "legacy": st.booleans(),
        "split_special_tokens": st.booleans(),
        "clean_up_tokenization_spaces": st.booleans(),
    },
)
special_map = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(ROLES, st.one_of(names, as_table)),
        "additional_special_tokens": st.lists(names, max_size=2),
    },
)
added = st.dictionaries(names, st.sampled_from([5, 263, 270, 300]), max_size=2)
layouts = st.fixed_dictionaries(
    {
        "config.json": st.builds(
            lambda kind, more: {"model_type": kind, **more},
            st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"]),
            st.fixed_dictionaries(
                {}, optional={"tokenizer_class": st.sampled_from(["LlamaTokenizer", "Qwen2Tokenizer"])}
            ),
        )
    },
    optional={
        "tokenizer_config.json": configuration,
        "special_tokens_map.json": special_map,
        "added_tokens.json": added,
    },
)


def written(directory: Path, backend: Backend, marked: list[str], files: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in marked])
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def assert_same(ours: Tokenizer, theirs: Any) -> None:
    assert ours.specials == {role: name for role, name in theirs.special_tokens_map.items() if role in COMMON_ROLES}
    for role, name in ours.specials.items():
        assert ours.backend.token_to_id(name) == getattr(theirs, f"{role}_id"), role
    assert ours.backend.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in TEXTS:
        for special in (False, True):
            tokens = ours.encode(text, add_special_tokens=special)
            assert tokens == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (False, True):
                assert ours.decode(tokens, skip_special_tokens=skip) == theirs.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    make=st.sampled_from(BACKENDS),
    specials=st.sampled_from([[], ["<s>", "</s>"], ["<s>", "</s>", "<pad>"]]),
    more=st.lists(names, max_size=2),
    files=layouts,
)
def test_any_layout_gives_the_tokens_of_auto_tokenizer(
    tmp_path: Path, make: Any, specials: list[str], more: list[str], files: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    directory = written(tmp_path / "tokenizer", make(specials), [*specials, *more], files)
    try:
        theirs = AutoTokenizer.from_pretrained(directory)
    except Exception:  # tokenizers raises no narrower class: a layout that transformers does not read
        return
    if make is words and type(theirs).__name__ != "TokenizersBackend":
        return  # these classes make pair merging of a list of words, which reads nothing
    assert_same(load_tokenizer(directory), theirs)


TEMPLATES = {
    name: "{{ bos_token }}" + name + "{% for message in messages %}{{ message.content }}{% endfor %}" for name in "abcd"
}
PLACES: dict[str, dict[str, Any]] = {
    "configuration": {"tokenizer_config.json": {"chat_template": TEMPLATES["a"]}},
    "a list": {
        "tokenizer_config.json": {
            "chat_template": [
                {"name": "default", "template": TEMPLATES["a"]},
                {"name": "tool_use", "template": TEMPLATES["b"]},
            ]
        }
    },
    "a table": {"tokenizer_config.json": {"chat_template": {"default": TEMPLATES["a"], "tool_use": TEMPLATES["b"]}}},
    "a file": {"chat_template.jinja": TEMPLATES["c"]},
    "a file and the configuration": {
        "chat_template.jinja": TEMPLATES["c"],
        "tokenizer_config.json": {"chat_template": TEMPLATES["a"]},
    },
    "files": {"chat_template.jinja": TEMPLATES["c"], "additional_chat_templates/tool_use.jinja": TEMPLATES["d"]},
    "another file and the configuration": {
        "additional_chat_templates/tool_use.jinja": TEMPLATES["d"],
        "tokenizer_config.json": {"chat_template": TEMPLATES["a"]},
    },
    "no place": {},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_chat_template_is_found_wherever_transformers_finds_it(place: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = written(
        tmp_path, byte_level(["<s>", "</s>"]), ["<s>", "</s>"], {"config.json": {"model_type": "llama"}}
    )
    (directory / "additional_chat_templates").mkdir()
    configuration = {"tokenizer_config.json": {}, **PLACES[place]}
    for name, content in configuration.items():
        more = {"bos_token": "<s>", "eos_token": "</s>"}
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content | more))
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "hello"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        try:
            wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        except ValueError:
            with pytest.raises(DataError):
                render_chat(ours, messages, tools=tools)
        else:
            assert render_chat(ours, messages, tools=tools) == wanted


@pytest.mark.parametrize("other", ["tokenizer.model", "vocab.json", "tiktoken.model"])
def test_a_vocabulary_in_another_file_is_said_to_be_not_read(other: str, tmp_path: Path) -> None:
    (tmp_path / other).write_text("{}")
    with pytest.raises(DataError, match=rf"no tokenizer\.json in .*, and {other} is not read: make one of it"):
        load_tokenizer(tmp_path)
