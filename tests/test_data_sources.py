"""Compressed files and Parquet: the same documents as from plain files, as streams, and damage that is told."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.data import load_tokenizer
from beringia.data.documents import DataKind, Document, read_documents
from beringia.data.pack import pack
from beringia.errors import DataError

BYTES = load_tokenizer("bytes")
TEXTS = [{"text": f"Text {number}, ünïcode.\nSecond line."} for number in range(600)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"{number}!", "tool_calls": [{"name": "f", "a": {"x": 1}}]}
            if number % 3
            else {"role": "assistant", "content": f"{number}!"},
        ]
    }
    | ({"tools": [{"type": "function", "function": {"name": "f"}}]} if number % 2 else {})
    for number in range(600)
]


def lines(objects: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in objects).encode()


def read(path: Path, kind: DataKind = "text") -> list[Document]:
    return list(read_documents(path, kind))


def contents(found: list[Document]) -> list[Any]:
    return [(one.text, one.messages, one.tools, one.documents) for one in found]


def write_gz(path: Path, content: bytes, *, members: int = 1) -> Path:
    size = -(-len(content) // members)
    path.write_bytes(b"".join(gzip.compress(content[n * size : (n + 1) * size]) for n in range(members)))
    return path


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("kind", "objects"), [("text", TEXTS), ("chat", CHATS)])
def test_a_compressed_jsonl_file_is_read_as_the_plain_one(
    tmp_path: Path, kind: DataKind, objects: list[dict[str, Any]], members: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(objects))
    compressed = write_gz(tmp_path / "a.jsonl.gz", lines(objects), members=members)
    assert contents(read(compressed, kind)) == contents(read(tmp_path / "a.jsonl", kind))


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_compressed_text_is_cut_and_packed_as_the_plain_one(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"Line {number} of a text that is cut into passages.\n" for number in range(2000)).encode()
    for place in ("plain", "packed"):
        (tmp_path / place).mkdir()
    (tmp_path / "plain" / f"a{suffix}").write_bytes(text)
    write_gz(tmp_path / "packed" / f"a{suffix}.gz", text)
    plain, packed = (pack(tmp_path / place, BYTES, tmp_path / f"{place}-out") for place in ("plain", "packed"))
    assert plain.manifest.identity == packed.manifest.identity and packed.manifest.documents["train"] > 3


@settings(max_examples=40)
@given(data=st.data())
def test_a_compressed_file_that_is_cut_off_anywhere_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = gzip.compress(lines(TEXTS))
    path = tmp_path_factory.mktemp("cut") / "a.jsonl.gz"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz (ends in the middle|is not a sound gzip file)"):
        read(path)


@settings(max_examples=40)
@given(place=st.integers(10, 10**6), bit=st.integers(0, 7))
def test_a_compressed_file_in_which_any_bit_has_turned_is_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    content = bytearray(gzip.compress(lines(TEXTS)))
    content[10 + place % (len(content) - 10)] ^= 1 << bit  # behind the header: what it says of times changes nothing
    path = tmp_path_factory.mktemp("bit") / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [b"plain text under a wrong name\n", gzip.compress(b"sound", mtime=0) + b"and more"],
    ids=["plain text", "more behind the end"],  # without the time of compression, which two processes have unlike
)
def test_what_is_not_compressed_under_that_name_is_an_error_of_the_whole_folder(tmp_path: Path, content: bytes) -> None:
    """Not left out like a picture: part of a data set would be missing without anybody's having to look."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text("one\n" * 10_000)
    (tmp_path / "texts" / "bad.txt.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.txt\.gz is not a sound gzip file"):
        pack(tmp_path / "texts", BYTES, tmp_path / "packed")


def test_what_is_compressed_and_no_text_is_left_out_and_named_as_a_plain_one_is(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text("one\n" * 10_000)
    write_gz(tmp_path / "texts" / "archive.tar.gz", b"\0" * 512)
    packed = pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    assert packed.notes == ("1 of 2 files were left out: archive.tar.gz holds NUL bytes.",)


def test_a_line_of_a_compressed_file_is_named_like_one_of_a_plain_file(tmp_path: Path) -> None:
    path = write_gz(tmp_path / "a.jsonl.gz", lines(TEXTS[:3]) + b'{"text": 3}\n')
    with pytest.raises(DataError, match=r'a\.jsonl\.gz, line 4: needs "text" with a string'):
        read(path)


PEAK = """
import sys, resource
from pathlib import Path
from beringia.data.documents import read_documents
for warm in read_documents(Path(sys.argv[1]), "text"): pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_documents(Path(sys.argv[2]), "text"))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def peak_of_reading(small: Path, large: Path) -> tuple[int, int]:
    """Documents of the large file, and how far reading it goes beyond what reading the small one took."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large)], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    return count, peak


BLOCK = [{"text": f"{number} " + "word " * 200} for number in range(1000)]
"""A megabyte, in rows of a kilobyte."""


@pytest.mark.slow
def test_a_compressed_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    small, large = (tmp_path / f"{name}.jsonl.gz" for name in ("small", "large"))
    write_gz(small, lines(BLOCK) * 4)
    write_gz(large, lines(BLOCK) * 64)
    count, peak = peak_of_reading(small, large)
    assert count == 64_000 and peak < 16 << 20, "64 MB of text"


# Parquet


def write_parquet(path: Path, objects: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = dict.fromkeys(name for one in objects for name in one)
    table = pyarrow.table({name: [one.get(name) for one in objects] for name in names})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("rows", [7, 100_000])
@pytest.mark.parametrize(("kind", "objects"), [("text", TEXTS), ("chat", CHATS)])
def test_a_parquet_file_is_read_as_the_jsonl_file_with_the_same_objects(
    tmp_path: Path, kind: DataKind, objects: list[dict[str, Any]], rows: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(objects))
    path = write_parquet(tmp_path / "a.parquet", objects, row_group_size=rows)
    assert contents(read(path, kind)) == contents(read(tmp_path / "a.jsonl", kind))


def test_only_columns_that_are_asked_for_are_read_and_each_row_has_its_number(tmp_path: Path) -> None:
    rows = [{"id": number, "text": f"Row {number}", "score": 0.5} for number in range(600)]
    path = write_parquet(tmp_path / "a.parquet", [*rows, {"id": 601, "text": None}])
    found = read_documents(path, "text")
    assert [next(found).text for _ in rows] == [row["text"] for row in rows]
    with pytest.raises(DataError, match=r'a\.parquet, row 601: needs "text" with a string'):
        next(found)


def test_a_parquet_file_without_the_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"body": "a"}])
    with pytest.raises(DataError, match=r'row 1: needs "text"'):
        read(path)
    with pytest.raises(DataError, match=r'row 1: needs "messages"'):
        read(path, "chat")


def test_a_parquet_file_that_is_cut_off_or_is_none_is_named(tmp_path: Path) -> None:
    content = write_parquet(tmp_path / "whole.parquet", TEXTS).read_bytes()
    path = tmp_path / "a.parquet"
    for part in (b"", content[:3], content[: len(content) // 2], content[:-1], b"no Parquet at all"):
        path.write_bytes(part)
        with pytest.raises(DataError, match=r"a\.parquet is not a sound Parquet file"):
            read(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_page_of_parquet_that_was_altered_is_named(tmp_path: Path, place: float) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # where the footer begins
    content[int(place * end)] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a sound Parquet file"):
        read(path)


def test_values_that_json_does_not_have_are_named(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a", "when": b"bytes"}, {"role": "assistant", "content": "b"}]
    path = write_parquet(tmp_path / "a.parquet", [{"messages": chat}])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: holds what JSON does not have"):
        read(path, "chat")


@pytest.mark.slow
def test_a_parquet_file_of_one_row_group_is_never_whole_in_memory(tmp_path: Path) -> None:
    small = write_parquet(tmp_path / "small.parquet", BLOCK * 8, use_dictionary=False)
    large = write_parquet(tmp_path / "large.parquet", BLOCK * 128, use_dictionary=False, row_group_size=10**9)
    count, peak = peak_of_reading(small, large)
    assert count == 128_000 and peak < 32 << 20, "128 MB of text"


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import that finds nothing raises
    with pytest.raises(DataError, match=r"a\.parquet is a Parquet file: install pyarrow .*beringia\[parquet\]") as told:
        read(path)
    assert "\n" not in str(told.value)
