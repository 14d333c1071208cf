"""Reading tensors one at a time, of a run or a Hugging Face directory: the values, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from beringia.checkpoint.blocks import content_of, memory_of
from beringia.checkpoint.directory import write_manifest
from beringia.checkpoint.reader import INDEX, SINGLE, TensorReader, open_checkpoint, open_hugging_face
from beringia.checkpoint.store import CheckpointStore
from beringia.checkpoint.tensor_file import PIECE_BYTES, lay_out, write_hashed, write_streamed
from beringia.errors import CheckpointDamaged, ModelError, RunError
from beringia.records.manifest import MANIFEST_SCHEMA, CheckpointManifest, Chunk, TensorEntry

State = dict[str, torch.Tensor]

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def drawn_state() -> State:
    """Every dtype, a scalar, an empty one, one larger than a block, one whose size is no multiple of a block."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(700, 1000, generator=generator)
    return {
        "model.double": torch.randn(3, 5, generator=generator).double(),
        "model.weight": weight,
        "model.brain": weight[:3].bfloat16(),
        "model.half": weight[:5].half(),
        "model.count": torch.arange(7),
        "model.mask": torch.tensor([True, False, True]),
        "model.scalar": torch.tensor(2.5),
        "model.empty": torch.zeros(0, 3),
        "optimizer.exp_avg.model.weight": weight + 1,
    }


STATE = drawn_state()


def write_single(directory: Path, state: State = STATE) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(state, directory / SINGLE, metadata={"format": "pt"})
    return directory


def write_shards(directory: Path, state: State = STATE) -> Path:
    directory.mkdir()
    names = list(state)
    halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, held in halves.items():
        save_file({name: state[name] for name in held}, directory / file)
    edit_index(directory, {name: file for file, held in halves.items() for name in held})
    return directory


def edit_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_run(directory: Path, state: State = STATE) -> Path:
    store = CheckpointStore(directory, epoch=1, epoch_file=None, keep=1, recipe_hash="recipe", chip_identity="chip")
    store.save(7, state, {"step": 7}).result()
    store.close()
    return store.directory.path(7)


WRITERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], TensorReader]]] = {
    "one file": (write_single, open_hugging_face),
    "shards": (write_shards, open_hugging_face),
    "a run": (write_run, open_checkpoint),
}


@pytest.fixture(params=list(WRITERS))
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> TensorReader:
    write, open_reader = WRITERS[request.param]
    found = open_reader(write(tmp_path / "there"))
    request.addfinalizer(lambda: found.__exit__())
    return found


def test_every_tensor_is_listed_with_its_dtype_and_shape(reader: TensorReader) -> None:
    listed = {name: (stored.dtype, stored.shape) for name, stored in reader.tensors.items()}
    assert listed == {name: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in STATE.items()}


def test_every_tensor_is_read_bit_for_bit(reader: TensorReader) -> None:
    for name, expected in STATE.items():
        target = torch.empty_like(expected)
        reader.read(name, target)
        assert torch.equal(target, expected), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_converted_as_torch_converts_them(reader: TensorReader, dtype: torch.dtype) -> None:
    for name, expected in STATE.items():
        target = torch.empty(expected.shape, dtype=dtype)
        reader.read(name, target)
        assert torch.equal(target, expected.to(dtype)), name


def test_a_target_may_lie_anyhow_in_memory(reader: TensorReader) -> None:
    expected = STATE["model.weight"]
    for target in (torch.empty(1000, 700).t(), torch.empty(700, 2000)[:, ::2], torch.empty(2, 700, 1000)[1]):
        reader.read("model.weight", target)
        assert torch.equal(target, expected)


def test_a_parameter_can_be_the_target(reader: TensorReader) -> None:
    weight = torch.nn.Parameter(torch.empty(700, 1000))
    reader.read("model.weight", weight)
    assert torch.equal(weight, STATE["model.weight"]) and weight.grad_fn is None


def test_a_tensor_that_is_in_memory_already_is_compared_with_what_is_stored(reader: TensorReader) -> None:
    expected = STATE["model.weight"].clone()
    assert reader.holds("model.weight", expected)
    assert reader.holds("model.weight", expected.bfloat16())
    expected[-1, -1] += 1
    assert not reader.holds("model.weight", expected)


def test_files_that_are_deleted_while_they_are_read_can_be_read_to_the_end(reader: TensorReader) -> None:
    reader.read("model.scalar", torch.empty(()))
    shutil.rmtree(reader.place)
    target = torch.empty(700, 1000)
    reader.read("model.weight", target)
    assert torch.equal(target, STATE["model.weight"])


def test_the_tensors_are_those_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = LlamaForCausalLM(config).bfloat16()
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / INDEX).exists()
    with open_hugging_face(tmp_path / "saved") as reader:
        assert reader.tensors.keys() == theirs.state_dict().keys()
        assert all(reader.holds(name, tensor) for name, tensor in theirs.state_dict().items())


# A run's checkpoint


def test_pieces_that_ranks_wrote_apart_become_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(35, dtype=torch.float32).view(5, 7)
    cuts = {"a": (0, 0, 2, 7), "b": (2, 0, 3, 4), "c": (2, 4, 3, 3)}
    chunks, files = [], []
    for name, (row, column, rows, columns) in cuts.items():
        piece = whole[row : row + rows, column : column + columns].contiguous()
        layout = lay_out(f"{name}.safetensors", [("w", "float32", (rows, columns))])
        files.append(write_hashed(tmp_path, layout, memory_of(piece)))
        chunks.append(Chunk(offsets=(row, column), sizes=(rows, columns), file=layout.name, key="w"))
    write_manifest(tmp_path, manifest_of(TensorEntry(dtype="float32", shape=(5, 7), chunks=tuple(chunks)), files))
    with open_checkpoint(tmp_path) as reader:
        target = torch.zeros(5, 7, dtype=torch.float64)
        reader.read("w", target)
    assert torch.equal(target, whole.double())


def manifest_of(entry: TensorEntry, files: list[object]) -> CheckpointManifest:
    return CheckpointManifest(
        schema_version=MANIFEST_SCHEMA,
        beringia="0",
        step=1,
        recipe_hash="recipe",
        epoch=1,
        chip_identity="chip",
        state_hash="state",
        progress={},
        tensors={"w": entry},
        files=tuple(files),  # type: ignore[arg-type]  # file entries
    )


def test_a_manifest_whose_pieces_are_not_the_whole_is_refused(tmp_path: Path) -> None:
    layout = lay_out("a.safetensors", [("w", "float32", (2, 7))])
    file = write_hashed(tmp_path, layout, memory_of(torch.zeros(2, 7)))
    chunk = Chunk(offsets=(0, 0), sizes=(2, 7), file="a.safetensors", key="w")
    write_manifest(tmp_path, manifest_of(TensorEntry(dtype="float32", shape=(3, 7), chunks=(chunk,)), [file]))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json is damaged: its pieces of w are not the whole"):
        open_checkpoint(tmp_path)


def test_a_file_that_holds_other_tensors_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    file = write_hashed(tmp_path, lay_out("a.safetensors", [("v", "float32", (2,))]), memory_of(torch.zeros(2)))
    chunk = Chunk(offsets=(0,), sizes=(2,), file="a.safetensors", key="w")
    write_manifest(tmp_path, manifest_of(TensorEntry(dtype="float32", shape=(2,), chunks=(chunk,)), [file]))
    with (
        open_checkpoint(tmp_path) as reader,
        pytest.raises(CheckpointDamaged, match=r"a\.safetensors is damaged: its header does not hold"),
    ):
        reader.read("w", torch.empty(2))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "words"),
    [(flip, "its SHA-256 is not the one"), (truncate, r"bytes instead of"), (Path.unlink, "it is missing")],
)
def test_nothing_is_read_from_a_file_that_is_not_as_it_was_written(
    harm: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    checkpoint = write_run(tmp_path / "there")
    (file,) = checkpoint.glob("*.safetensors")
    harm(file)
    target = torch.zeros(700, 1000)
    with open_checkpoint(checkpoint) as reader:
        with pytest.raises(CheckpointDamaged, match=words) as caught:
            reader.read("model.weight", target)
        assert caught.value.path == str(file)
    assert not target.any()


def test_files_that_nothing_is_asked_of_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beringia.checkpoint.staging.PART_BYTES", 1)
    checkpoint = write_run(tmp_path / "there")
    with open_checkpoint(checkpoint) as reader:
        flip(reader.tensors["optimizer.exp_avg.model.weight"].file)
        reader.read("model.weight", torch.empty(700, 1000))
        with pytest.raises(CheckpointDamaged):
            reader.read("optimizer.exp_avg.model.weight", torch.empty(700, 1000))


def test_where_there_is_no_checkpoint_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="There is no checkpoint at"):
        open_checkpoint(tmp_path / "step-000009")


# A Hugging Face directory


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_shards(tmp_path / "there")
    (directory / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match=rf"{SHARDS[1]} is missing, though the index names it"):
        open_hugging_face(directory)


def test_a_tensor_that_is_not_where_the_index_places_it_is_named_with_the_file(tmp_path: Path) -> None:
    directory = write_shards(tmp_path / "there")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    edit_index(directory, weight_map | {"model.double": SHARDS[1]})
    with pytest.raises(ModelError, match=rf"{SHARDS[1]} lacks model\.double"):
        open_hugging_face(directory)


def test_a_tensor_in_a_format_that_torch_has_not_is_listed_and_refused_by_name_when_it_is_read(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4_X","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with open_hugging_face(tmp_path) as reader:
        assert reader.tensors["w"].dtype == "F4_X"
        with pytest.raises(ModelError, match=rf"{SINGLE}: w is stored as F4_X, which torch does not have"):
            reader.read("w", torch.empty(4))


@pytest.mark.parametrize("weight_map", [[], {"a": 3}, "there", None])
def test_an_index_that_is_none_is_named(weight_map: object, tmp_path: Path) -> None:
    edit_index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=rf"{INDEX} is not an index"):
        open_hugging_face(tmp_path)


def test_a_shard_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    edit_index(tmp_path, {"w": "a.safetensors"})
    with pytest.raises(ModelError, match=r"a\.safetensors cannot be read"):
        open_hugging_face(tmp_path)


def test_a_directory_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"neither {SINGLE} nor {INDEX}"):
        open_hugging_face(tmp_path)


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    small = {name: STATE[name] for name in ("model.double", "model.count", "model.scalar")}
    content = save(small)
    for length in range(len(content)):
        (tmp_path / SINGLE).write_bytes(content[:length])
        with pytest.raises(ModelError, match=rf"{SINGLE} is damaged"):
            open_hugging_face(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    directory = write_single(tmp_path / "there")
    with open_hugging_face(directory) as reader:
        with open(directory / SINGLE, "r+b") as file:
            file.truncate(PIECE_BYTES)
        with pytest.raises(ModelError, match=rf"{SINGLE} is damaged: it ended while"):
            reader.read("model.weight", torch.empty(700, 1000))


SMALL = save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3, dtype=torch.int16)}, metadata={"format": "pt"})
_HEADER_BYTES = 8 + int.from_bytes(SMALL[:8], "little")
_HEADER = json.loads(SMALL[8:_HEADER_BYTES])
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.just(2**70),
    st.text(max_size=3),
    st.just([2, 3]),
    st.just([0, 24]),
)


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + SMALL[_HEADER_BYTES:]


@st.composite
def wrong_headers(draw: st.DrawFn) -> bytes:
    """One field of the header replaced."""
    header = json.loads(json.dumps(_HEADER))
    entry = header[draw(st.sampled_from(["a", "b"]))]
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "0", "1", "a", "__metadata__"]))
    if field in ("0", "1"):
        entry["data_offsets"][int(field)] = draw(_VALUES)
    elif field in ("a", "__metadata__"):
        header[field] = draw(_VALUES)
    else:
        entry[field] = draw(_VALUES)
    return with_header(header)


@st.composite
def altered_bytes(draw: st.DrawFn) -> bytes:
    place = draw(st.integers(0, _HEADER_BYTES - 1))
    return SMALL[:place] + bytes([draw(st.integers(0, 255))]) + SMALL[place + 1 :]


@given(st.one_of(wrong_headers(), altered_bytes()))
@settings(max_examples=300, deadline=None)
def test_what_the_library_refuses_is_refused_and_what_it_reads_is_read_alike(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("altered")
    (directory / SINGLE).write_bytes(content)
    expected, found = theirs(directory), ours(directory)
    if expected is None:
        assert found is None
    elif found is not None:  # we may refuse more
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("offsets", [[18, 24], [0, 6], [25, 31]], ids=["overlapping", "the same place", "a gap"])
def test_tensors_that_do_not_lie_one_behind_the_other_are_refused_as_the_library_refuses_them(
    offsets: list[int], tmp_path: Path
) -> None:
    (tmp_path / SINGLE).write_bytes(with_header(_HEADER | {"b": _HEADER["b"] | {"data_offsets": offsets}}))
    assert theirs(tmp_path) is None
    with pytest.raises(ModelError, match=rf"{SINGLE} is damaged: . begins at byte"):
        open_hugging_face(tmp_path)


def theirs(directory: Path) -> State | None:
    try:
        return load_file(directory / SINGLE)
    except (SafetensorError, KeyError):
        return None


def ours(directory: Path) -> State | None:
    try:
        with open_hugging_face(directory) as reader:
            state = {}
            for name, stored in reader.tensors.items():
                if not isinstance(getattr(torch, stored.dtype, None), torch.dtype):
                    return None
                state[name] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
                reader.read(name, state[name])
            return state
    except ModelError:
        return None


# Writing


def test_a_file_written_block_by_block_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if tensor.is_floating_point()}
    layout = lay_out(
        "ours", [(name, str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in state.items()]
    )
    pieces = (piece for slot in layout.slots for piece in content_of(state[slot.key], state[slot.key].dtype))
    write_streamed(tmp_path, layout, pieces)
    assert (tmp_path / "ours").read_bytes() == save(state, metadata={"format": "pt"})
