"""Saving and loading in one process: what comes back, what is on the disk, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from waiting import Clock

from beringia.checkpoint import staging as staging_module
from beringia.checkpoint import store as store_module
from beringia.checkpoint.directory import CheckpointDirectory
from beringia.checkpoint.plan import load_planner, metadata_of
from beringia.checkpoint.staging import Staging, copying_pool
from beringia.checkpoint.storage import StagedWriter, VerifiedReader
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import CheckpointDamaged, RunError
from beringia.numerics.state_hash import hash_state
from beringia.records.manifest import CheckpointManifest, CleanCheck, TensorEntry, TrustMark

State = dict[str, torch.Tensor]
PROGRESS = {"step": 400, "cursor": 12_800, "seeds": {"data": 7}}


def training_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(54, 128, generator=generator),
        "model.norm.weight": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.exp_avg.model.embed.weight": torch.randn(54, 128, generator=generator),
        "optimizer.step": torch.tensor(400.0),
        "model.counts": torch.randint(0, 9, (3, 5), generator=generator),
        "random.host": torch.randint(0, 256, (5056,), dtype=torch.uint8, generator=generator),
        "model.mask": torch.tensor([True, False, True]),
        "model.empty": torch.zeros(0, 3),
        "model.strided": torch.randn(6, 9, generator=generator).t(),
    }


def blank(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def assert_equal(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def open_store(directory: Path, *, keep: int = 2, epoch: int = 1) -> CheckpointStore:
    return CheckpointStore(
        directory, epoch=epoch, epoch_file=None, keep=keep, recipe_hash="recipe", chip_identity="chip"
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return open_store(tmp_path / "checkpoints")


def trust(store: CheckpointStore, step: int) -> None:
    mark = TrustMark(
        step=step,
        state_hash=store.manifest(step).state_hash,
        checks=(CleanCheck(site="layers.0", replica=0, step=step + 3),),
    )
    store.mark_trusted(step, mark)


def test_what_was_saved_comes_back_bit_for_bit_with_its_progress_and_hash(store: CheckpointStore) -> None:
    state = training_state()
    manifest = store.save(400, state, PROGRESS).result()
    loaded = blank(state)
    assert store.load(400, loaded) == PROGRESS
    assert_equal(loaded, state)
    assert manifest == store.manifest(400)
    assert manifest.state_hash == hash_state(state, PROGRESS) == store.state_hash(loaded, PROGRESS)
    store.close()


def test_a_save_holds_the_state_of_the_moment_it_was_called(store: CheckpointStore) -> None:
    state = training_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    pending = store.save(400, state, PROGRESS)
    for tensor in state.values():
        tensor.zero_()
    pending.result()
    loaded = blank(state)
    store.load(400, loaded)
    assert_equal(loaded, before)
    store.close()


def test_a_second_save_reuses_the_buffers_and_holds_the_new_state(store: CheckpointStore) -> None:
    state = training_state()
    store.save(400, state, PROGRESS).result()
    assert store._staging is not None
    addresses = [buffer.data_ptr() for buffer in store._staging.buffers]
    later = {name: tensor.clone() for name, tensor in training_state(1).items()}
    second = store.save(401, later, PROGRESS)
    assert [buffer.data_ptr() for buffer in store._staging.buffers] == addresses
    assert second.result().state_hash == hash_state(later, PROGRESS)
    loaded = blank(state)
    store.load(401, loaded)
    assert_equal(loaded, later)
    store.load(400, loaded)
    assert_equal(loaded, state)
    store.close()


def test_a_save_waits_for_the_one_before(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, order, clock = threading.Event(), [], Clock()
    write_hashed = store_module.StagedWriter.write_data

    def slow(self: StagedWriter, plan: SavePlan, planner: torch_checkpoint.SavePlanner) -> object:
        gate.wait()
        clock.sleep(3.0)
        order.append("written")
        return write_hashed(self, plan, planner)

    monkeypatch.setattr(store_module.StagedWriter, "write_data", slow)
    store.save(400, training_state(), PROGRESS)

    def now() -> float:
        """Read when the second save begins: the first one goes on writing only then."""
        began = clock.now()
        gate.set()
        return began

    store.clock = now
    second = store.save(401, training_state(), PROGRESS)
    assert order[:1] == ["written"]
    assert second.pause_seconds == 3.0
    store.close()
    assert store.steps() == [400, 401]


def test_an_error_that_nobody_collected_is_raised_by_the_next_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise RunError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(store_module.StagedWriter, "write_data", fail)
        store.save(400, training_state(), PROGRESS)
        with pytest.raises(RunError, match="planted"):
            store.save(401, training_state(), PROGRESS)
    store.save(402, training_state(), PROGRESS)
    store.close()
    assert store.steps() == [402]


def test_the_safetensors_library_reads_the_files(store: CheckpointStore) -> None:
    state = training_state()
    manifest = store.save(400, state, PROGRESS).result()
    found: State = {}
    for entry in manifest.files:
        found |= safetensors.torch.load_file(store.directory.path(400) / entry.name)
    assert found.keys() == state.keys()
    assert_equal(found, state)
    store.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_load_reads_a_checkpoint_through_our_reader(store: CheckpointStore) -> None:
    state = training_state()
    store.save(400, state, PROGRESS).result()
    loaded = blank(state)
    torch_checkpoint.load(
        loaded, storage_reader=VerifiedReader(store.directory.path(400)), planner=load_planner(), no_dist=True
    )
    assert_equal(loaded, state)
    store.close()


def test_a_large_state_is_split_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "PART_BYTES", 10_000)
    store, state = open_store(tmp_path), training_state()
    manifest = store.save(400, state, PROGRESS).result()
    assert len(manifest.files) >= 3
    loaded = blank(state)
    store.load(400, loaded)
    assert_equal(loaded, state)
    store.close()


def test_numpy_saves_what_the_compiled_kernel_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beringia.numerics.keyed_sum import KeyedSumKernel

    state = training_state()
    monkeypatch.setattr(staging_module, "open_kernel", lambda: KeyedSumKernel(compiled=False, reason="a test"))
    store = open_store(tmp_path)
    assert store.save(400, state, PROGRESS).result().state_hash == hash_state(state, PROGRESS)
    loaded = blank(state)
    store.load(400, loaded)
    assert_equal(loaded, state)
    store.close()


def test_loading_into_strided_tensors_keeps_their_strides(store: CheckpointStore) -> None:
    state = training_state()
    store.save(400, state, PROGRESS).result()
    loaded = blank(state)
    loaded["model.embed.weight"] = torch.zeros(128, 54).t()
    store.load(400, loaded)
    assert_equal(loaded, state)
    assert loaded["model.embed.weight"].stride() == (1, 54)
    store.close()


def test_a_state_with_other_names_shapes_or_dtypes_is_refused_and_named(store: CheckpointStore) -> None:
    state = training_state()
    store.save(400, state, PROGRESS).result()
    renamed = blank(state)
    renamed["model.new.weight"] = renamed.pop("model.embed.weight")
    with pytest.raises(RunError, match=r"model\.new\.weight not in the checkpoint, model\.embed\.weight only there"):
        store.load(400, renamed)
    with pytest.raises(
        RunError, match=r"model\.embed\.weight as float32 \[54, 128\], this model as float32 \[128, 54\]"
    ):
        store.load(400, {**blank(state), "model.embed.weight": torch.zeros(128, 54)})
    with pytest.raises(RunError, match=r"model\.norm\.weight as bfloat16 \[7\], this model as float32 \[7\]"):
        store.load(400, {**blank(state), "model.norm.weight": torch.zeros(7)})
    with pytest.raises(RunError, match="There is no checkpoint"):
        store.load(399, state)
    store.close()


def test_a_dtype_that_safetensors_lacks_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(RunError, match=r"model\.c has dtype complex64"):
        store.save(1, {"model.c": torch.zeros(2, dtype=torch.complex64)}, {})
    store.close()


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_bit_in_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def flip_bit_in_header_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [truncate, lengthen, flip_last_bit, flip_bit_in_header, flip_bit_in_header_length, Path.unlink]
)
@pytest.mark.parametrize("name", ["rank00000-part00000.safetensors", "manifest.json"])
def test_a_harmed_file_is_found_and_named_by_load_and_verify(store: CheckpointStore, harm: object, name: str) -> None:
    assert callable(harm)
    state = training_state()
    store.save(400, state, PROGRESS).result()
    path = store.directory.path(400) / name
    harm(path)
    for look in (lambda: store.load(400, blank(state)), lambda: store.verify(400)):
        with pytest.raises(CheckpointDamaged, match=name) as raised:
            look()
        assert raised.value.path == str(path)
    store.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_in_a_tensor_file_is_found(tmp_path: Path, where: float, bit: int) -> None:
    directory = CheckpointDirectory(tmp_path)
    state = {"w": torch.arange(300.0)}
    if not directory.steps():
        store = open_store(tmp_path)
        store.save(1, state, {}).result()
        store.close()
    path = directory.path(1) / "rank00000-part00000.safetensors"
    intact = path.read_bytes()
    content = bytearray(intact)
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    store = open_store(tmp_path)
    with pytest.raises(CheckpointDamaged):
        store.load(1, blank(state))
    path.write_bytes(intact)
    store.load(1, blank(state))
    store.close()


def test_a_manifest_that_was_edited_is_damaged_though_it_can_be_read(store: CheckpointStore) -> None:
    store.save(400, training_state(), PROGRESS).result()
    path = store.directory.path(400) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"cursor":12800', b'"cursor":12801'))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json is damaged: its SHA-256"):
        store.load(400, training_state())
    path.with_name("manifest.json.sha256").unlink()
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json\.sha256 is damaged: it is missing"):
        store.manifest(400)
    store.close()


def test_a_manifest_changed_together_with_its_digest_still_cannot_move_tensors(store: CheckpointStore) -> None:
    from beringia.checkpoint.directory import digest_line

    state = training_state()
    store.save(400, state, PROGRESS).result()
    path = store.directory.path(400) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    tensors = manifest["tensors"]
    one, other = "model.embed.weight", "optimizer.exp_avg.model.embed.weight"
    tensors[one]["chunks"], tensors[other]["chunks"] = tensors[other]["chunks"], tensors[one]["chunks"]
    path.write_bytes(json.dumps(manifest).encode())
    path.with_name("manifest.json.sha256").write_bytes(digest_line(path.read_bytes()))
    loaded = blank(state)
    progress = store.load(400, loaded)
    assert store.state_hash(loaded, progress) != store.manifest(400).state_hash
    store.close()


# What is kept


def test_the_last_two_the_last_two_trusted_and_the_oldest_pending_are_kept(store: CheckpointStore) -> None:
    for step in range(1, 9):
        store.save(step, {"w": torch.full((3,), float(step))}, {"step": step}).result()
        if step in (2, 3, 5):
            trust(store, step)
    assert store.trusted_steps() == [3, 5]
    # 6 may still become trusted; were it pruned for being old, a guard that is slow to clear would never clear any.
    assert store.steps() == [3, 5, 6, 7, 8]
    trust(store, 6)
    assert store.prune() == [3]
    assert store.steps() == [5, 6, 7, 8]
    store.close()


def test_after_a_rollback_the_new_line_is_kept_and_what_was_pending_on_the_old_one_goes(store: CheckpointStore) -> None:
    def save(step: int, trusted: bool = False) -> None:
        store.save(step, {"w": torch.full((3,), float(step))}, {"step": step}).result()
        if trusted:
            trust(store, step)

    for step in (10, 20, 30, 40, 50):
        save(step, trusted=step <= 30)
    assert store.steps() == [20, 30, 40, 50]
    save(25)
    assert store.steps() == [20, 25, 30]
    trust(store, 25)
    save(28, trusted=True)
    assert store.steps() == [20, 25, 28, 30]
    save(31)
    assert store.steps() == [28, 30, 31]


def test_a_mark_of_trust_must_speak_of_the_checkpoint_that_it_is_put_on(store: CheckpointStore) -> None:
    store.save(400, training_state(), PROGRESS).result()
    with pytest.raises(RunError, match="cannot go to"):
        store.mark_trusted(400, TrustMark(step=400, state_hash="0" * 64, checks=()))
    assert store.trusted_steps() == []
    trust(store, 400)
    mark = store.directory.trust_mark(400)
    assert mark is not None and mark.checks[0].site == "layers.0"
    store.close()


def test_a_step_saved_again_replaces_the_checkpoint_and_its_trust(store: CheckpointStore) -> None:
    store.save(400, {"w": torch.zeros(3)}, {}).result()
    trust(store, 400)
    store.save(400, {"w": torch.ones(3)}, {}).result()
    loaded = {"w": torch.zeros(3)}
    store.load(400, loaded)
    assert loaded["w"].tolist() == [1, 1, 1]
    assert store.trusted_steps() == []
    assert sorted(path.name for path in store.directory.root.iterdir()) == ["step-000400"]
    store.close()


def test_a_death_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(400, {"w": torch.zeros(3)}, {}).result()
    store.close()
    (tmp_path / "step-000400").rename(tmp_path / ".step-000400.replaced")
    directory = CheckpointDirectory(tmp_path)
    assert directory.steps() == []
    directory.clean(epoch=2)
    assert directory.steps() == [400]
    directory.verify(400)


def test_a_step_that_was_pruned_before_its_mark_is_not_marked(store: CheckpointStore) -> None:
    """The thread that writes prunes while the loop finds checks clean: the mark is for what is still there."""
    manifest = store.save(400, {"w": torch.zeros(3)}, {"step": 400}).result()
    mark = TrustMark(step=400, state_hash=manifest.state_hash, checks=())
    assert store.trust_if_kept(400, mark) and store.trusted_steps() == [400]
    store.directory.discard(400)
    assert not store.trust_if_kept(400, mark)
    store.close()


def test_a_discarded_checkpoint_is_gone(store: CheckpointStore) -> None:
    store.save(400, {"w": torch.zeros(3)}, {}).result()
    store.directory.discard(400)
    assert list(store.directory.root.iterdir()) == []
    store.close()


# Resharding: any division into pieces is read back into any other


def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    pieces: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in shape:
        marks = [0, *sorted(draw(st.sets(st.integers(0, size), max_size=2))), size]
        spans = [(a, b - a) for a, b in zip(marks, marks[1:], strict=False)]
        pieces = [((*o, a), (*s, length)) for o, s in pieces for a, length in spans]
    # Cuts at the ends make empty pieces, which may coincide; the planner keeps one of those.
    return list(dict(pieces).items()) if 0 not in shape else [((0,) * len(shape), shape)]


@st.composite
def resharding(
    draw: st.DrawFn,
) -> tuple[
    torch.Tensor, list[tuple[tuple[int, ...], tuple[int, ...]]], list[tuple[tuple[int, ...], tuple[int, ...]]], int
]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    whole = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    return whole, cuts(draw, shape), cuts(draw, shape), draw(st.integers(1, 3))


def write_pieces(
    directory: Path, whole: torch.Tensor, pieces: list[tuple[tuple[int, ...], tuple[int, ...]]], ranks: int
) -> CheckpointManifest:
    """A checkpoint directory as `ranks` ranks would write it, the pieces dealt out to them."""
    chunks, files = [], []
    for rank in range(ranks):
        items = [
            WriteItem(
                MetadataIndex("w", torch.Size(offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    TensorProperties(dtype=whole.dtype),
                    whole.size(),
                ),
            )
            for offsets, sizes in pieces[rank::ranks]
        ]
        staging = Staging(SavePlan(items), rank, None)
        with copying_pool() as pool:
            staging.take([cut(whole, *piece) for piece in pieces[rank::ranks]], pool)
        writer = StagedWriter(directory, staging)
        writer.write_data(SavePlan(items), torch_checkpoint.DefaultSavePlanner()).wait()
        chunks += writer.chunks()
        files += writer.entries
    dtype = str(whole.dtype).removeprefix("torch.")
    return CheckpointManifest(
        schema_version=1,
        beringia="",
        step=1,
        recipe_hash="",
        epoch=1,
        chip_identity="",
        state_hash="",
        progress={},
        tensors={"w": TensorEntry(dtype=dtype, shape=tuple(whole.shape), chunks=tuple(chunks))},
        files=tuple(files),
    )


def cut(whole: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


class PiecesPlanner(torch_checkpoint.DefaultLoadPlanner):
    """Torch's load planner for the pieces of a rank, held in a dictionary instead of a DTensor."""

    def __init__(self, held: dict[tuple[int, ...], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.held = held

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.held[tuple(index.offset or ())]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(resharding())
def test_any_division_into_pieces_is_read_into_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[
        torch.Tensor, list[tuple[tuple[int, ...], tuple[int, ...]]], list[tuple[tuple[int, ...], tuple[int, ...]]], int
    ],
) -> None:
    whole, saved, wanted, ranks = case
    directory = tmp_path_factory.mktemp("reshard")
    manifest = write_pieces(directory, whole, saved, ranks)
    held = {offsets: torch.zeros(sizes, dtype=whole.dtype) for offsets, sizes in wanted}
    metadata = metadata_of(manifest)
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in wanted]
    reader = VerifiedReader(directory, manifest)
    reader.set_up_storage_reader(metadata, True)
    plan = LoadPlan(create_read_items_for_chunk_list("w", metadata.state_dict_metadata["w"], chunks))
    reader.read_data(plan, PiecesPlanner(held)).wait()
    for offsets, sizes in wanted:
        assert torch.equal(held[offsets], cut(whole, offsets, sizes))


# What the supervisor may import


def test_the_supervisors_modules_do_not_load_torch() -> None:
    modules = "beringia.checkpoint, beringia.checkpoint.directory, beringia.checkpoint.epoch"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
