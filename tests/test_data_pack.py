"""Packing: every document once, on one side, whatever the files; reused while the sources are the same."""

from __future__ import annotations

import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until, waiters

from beringia.data import load_tokenizer
from beringia.data.documents import PASSAGE_CHARACTERS, read_documents
from beringia.data.pack import Packed, pack
from beringia.data.shards import open_shards
from beringia.errors import DataError, StorageFull

BYTES = load_tokenizer("bytes")


def write_texts(folder: Path, count: int = 40) -> Path:
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        (folder / ("deep" if number % 2 else ".") / f"{number}.txt").write_text(f"Text number {number}, ünïcode.\n")
    lines = [json.dumps({"text": f"Line {number}", "id": number}) for number in range(count)]
    (folder / "lines.jsonl").write_text("\n".join([*lines, ""]))
    return folder


def documents(packed: Packed, split: str) -> list[str]:
    """What the shards of one split hold, read back."""
    tokens = np.concatenate([shard.tokens for shard in open_shards(packed.directory, packed.manifest, split)])  # type: ignore[arg-type]
    *texts, rest = BYTES.decode(tokens.tolist()).split("<end>")
    assert rest == ""
    return texts


def expected_documents(count: int = 40) -> set[str]:
    return {f"Text number {n}, ünïcode.\n" for n in range(count)} | {f"Line {n}" for n in range(count)}


def test_every_document_is_on_one_side_once(tmp_path: Path) -> None:
    packed = pack(write_texts(tmp_path / "texts"), BYTES, tmp_path / "packed", held_out_fraction=0.3)
    train, held_out = documents(packed, "train"), documents(packed, "held-out")
    assert sorted(train + held_out) == sorted(expected_documents())
    assert 10 < len(held_out) < 40  # 0.3 of 80
    assert packed.manifest.documents == {"train": len(train), "held-out": len(held_out)}


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    before = set(documents(pack(folder, BYTES, tmp_path / "packed", held_out_fraction=0.3), "held-out"))
    for number in range(50):
        (folder / f"new{number}.txt").write_text(f"Something else {number}")
    after = set(documents(pack(folder, BYTES, tmp_path / "packed", held_out_fraction=0.3), "held-out"))
    assert before < after


def test_equal_documents_are_on_the_same_side(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    for number in range(40):
        (folder / f"again{number}.txt").write_text(f"Text number {number}, ünïcode.\n")
    packed = pack(folder, BYTES, tmp_path / "packed", held_out_fraction=0.3)
    assert not set(documents(packed, "train")) & set(documents(packed, "held-out"))


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("One")
    with pytest.raises(DataError, match="only one document"):
        pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    (tmp_path / "texts/b.txt").write_text("Two")
    packed = pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    assert sorted(documents(packed, "train") + documents(packed, "held-out")) == ["One", "Two"]


@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=30)))
def test_passages_of_a_file_are_the_file(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("file") / "file.txt"
    text = "start\n" + "\n".join(lines * 400) + "end"
    path.write_bytes(text.encode())
    passages = [document.text for document in read_documents(path, "text")]
    # Passages of white space alone are left out.
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(len(passage) <= PASSAGE_CHARACTERS for passage in passages)


def test_one_large_file_is_split_and_bytes_across_chunks_are_whole(tmp_path: Path) -> None:
    text = "".join(f"Zeile {number} – äöü €\n" for number in range(100_000))  # over 2 MiB, characters of 1 to 3 bytes
    (tmp_path / "large.txt").write_text(text)
    packed = pack(tmp_path / "large.txt", BYTES, tmp_path / "packed")
    parts = documents(packed, "train") + documents(packed, "held-out")
    assert sum(map(len, parts)) == len(text)
    assert packed.manifest.documents["held-out"] >= 1


def test_files_that_are_no_text_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes("Füße".encode("latin-1"))
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / ".hidden.txt").write_text("not read")
    packed = pack(folder, BYTES, tmp_path / "packed")
    skipped = {source.path: source.skipped for source in packed.manifest.sources if source.skipped}
    assert skipped == {
        "picture.png": "holds NUL bytes",
        "latin.txt": "is not UTF-8",
        "broken": "is not a regular file",
    }
    assert packed.notes[0].startswith("3 of 44 files were left out: ")
    assert packed.notes[1] == "1 hidden files or directories were left out."
    assert set(documents(packed, "train") + documents(packed, "held-out")) == expected_documents()
    assert pack(folder, BYTES, tmp_path / "packed").directory == packed.directory


def test_packed_data_is_reused_until_a_source_changes(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    first = pack(folder, BYTES, tmp_path / "packed")
    made = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    os.utime(folder / "0.txt", ns=(1, 1))  # another time, the same content
    again = pack(folder, BYTES, tmp_path / "packed")
    assert again.directory == first.directory
    assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == made
    (folder / "0.txt").write_text("Text number X, ünïcode.\n")  # the same size, another content
    changed = pack(folder, BYTES, tmp_path / "packed")
    assert changed.directory != first.directory
    assert changed.manifest.identity != first.manifest.identity
    assert first.directory.exists()  # a run may still read it
    (folder / "2.txt").rename(folder / "renamed.txt")
    assert pack(folder, BYTES, tmp_path / "packed").directory != changed.directory


def test_other_settings_pack_anew_beside_it(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    packs = [
        pack(folder, BYTES, tmp_path / "packed"),
        pack(folder, BYTES, tmp_path / "packed", held_out_fraction=0.2),
        pack(folder, load_tokenizer("digits"), tmp_path / "packed"),
    ]
    assert len({packed.directory for packed in packs}) == len({packed.manifest.identity for packed in packs}) == 3


def test_the_same_sources_elsewhere_have_the_same_identity(tmp_path: Path) -> None:
    one = pack(write_texts(tmp_path / "one"), BYTES, tmp_path / "packed1")
    other = pack(write_texts(tmp_path / "other"), BYTES, tmp_path / "packed2")
    assert one.manifest.identity == other.manifest.identity


def test_without_its_sources_packed_data_is_used_and_said_so(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    first = pack(folder, BYTES, tmp_path / "packed")
    folder.rename(tmp_path / "moved")
    again = pack(folder, BYTES, tmp_path / "packed")
    assert again.directory == first.directory
    assert "is not here" in again.notes[-1]


@pytest.mark.parametrize("damage", ["alter", "truncate", "delete"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    packed = pack(write_texts(tmp_path / "texts"), BYTES, tmp_path / "packed")
    path = packed.directory / "train-00000.tokens"
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-2] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match="train-00000.tokens is missing or damaged"):
        open_shards(packed.directory, packed.manifest, "train")


def test_an_unfinished_or_damaged_manifest_is_packed_again(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    first = pack(folder, BYTES, tmp_path / "packed")
    manifest = first.directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    again = pack(folder, BYTES, tmp_path / "packed")
    assert again.manifest == first.manifest
    assert sorted(documents(again, "train")) == sorted(documents(first, "train"))


def test_shards_end_with_documents_and_hold_the_same_tokens(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    one = pack(folder, BYTES, tmp_path / "one")
    many = pack(folder, BYTES, tmp_path / "many", shard_tokens=100)
    assert len(many.manifest.shards["train"]) > 5
    assert documents(one, "train") == documents(many, "train")
    shards = open_shards(many.directory, many.manifest, "train")
    assert all(shard.tokens[-1] == BYTES.end for shard in shards)


def test_who_finds_another_packing_waits_for_it(tmp_path: Path) -> None:
    folder, directory = write_texts(tmp_path / "texts"), tmp_path / "packed"
    directory.mkdir()
    with ThreadPoolExecutor(2) as pool:
        with open(directory / ".lock", "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            packing = [pool.submit(pack, folder, BYTES, directory) for _ in range(2)]
            until(lambda: waiters(directory / ".lock") == 2 or wait(packing, timeout=0).done, "both wait for the lock")
            assert wait(packing, timeout=0).done == set()
            assert [path.name for path in directory.iterdir()] == [".lock"]
        assert len({future.result().directory for future in packing}) == 1
    assert sorted(path.name[:5] for path in directory.iterdir()) == [".lock", "text-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no text"),
        ({"a.txt": " \n"}, "holds no text"),
        ({"a.jsonl": "{"}, "line 1: is not JSON"),
        ({"a.jsonl": '{"text": "x"}\n{"txt": "x"}'}, 'line 2: needs "text"'),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path: Path, content: dict[str, str], message: str) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in content.items():
        (tmp_path / "texts" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "texts", BYTES, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [".lock"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file or directory"):
        pack(tmp_path / "nowhere", BYTES, tmp_path / "packed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beringia.data import shards

    monkeypatch.setattr(shards.ShardWriter, "_path", lambda self, part: Path("/dev/full"))
    with pytest.raises(StorageFull):
        pack(write_texts(tmp_path / "texts"), BYTES, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [".lock"]
