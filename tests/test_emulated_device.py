"""The emulated device as a torch device: what a user does with a device works on it, with the values of the CPU."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from waiting import GIVE_UP_SECONDS

from beringia.chips.arithmetic.profile import profile_names, read_profile
from beringia.chips.emulated import EmulatedChip, register_device
from beringia.chips.emulated.device import _backward_works
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable


@pytest.fixture
def chip() -> Iterator[EmulatedChip]:
    chip = EmulatedChip("exact")
    yield chip
    chip.close()


def small_model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 7))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def train(model: nn.Module, device: torch.device, **options: bool | None) -> list[float]:
    tokens = (torch.arange(30).view(5, 6) * 3 % 7).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]  # booleans only
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_training_with_every_adamw_equals_the_cpu_bit_for_bit(chip: EmulatedChip, options: dict[str, bool]) -> None:
    on_cpu, on_chip = small_model(), small_model().to(chip.device)
    assert train(on_chip, chip.device, **options) == train(on_cpu, torch.device("cpu"), **options)
    for ours, theirs in zip(on_chip.parameters(), on_cpu.parameters(), strict=True):
        assert ours.device == chip.device and torch.equal(ours.detach().cpu(), theirs)


def test_tied_weights_stay_one_parameter_on_the_device_and_add_up_both_gradients(chip: EmulatedChip) -> None:
    """`module.to` makes a new parameter for each name of a tensor subclass, unless it is told to swap."""

    def gradient(device: torch.device) -> torch.Tensor:
        torch.manual_seed(0)
        embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, head).to(device)
        assert embedding.weight is head.weight
        model(torch.tensor([[1, 2, 3]]).to(device)).square().sum().backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad.cpu()

    torch.testing.assert_close(gradient(chip.device), gradient(torch.device("cpu")))


def test_factories_make_tensors_on_the_device_with_the_cpu_s_values(chip: EmulatedChip) -> None:
    device = chip.device
    for make in (
        lambda d: torch.arange(6, device=d).view(2, 3),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.full((2, 2), 3.5, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, device=d),
        lambda d: torch.zeros(3, dtype=torch.int64, device=d).scatter_(0, torch.tensor([1], device=d), 4),
        lambda d: torch.ones(3, device=d).new_full((2,), 7.0),
        lambda d: torch.tril(torch.ones(3, 3, device=d)),
    ):
        assert make(device).device == device and torch.equal(make(device).cpu(), make("cpu"))


def test_views_share_memory_and_writes_through_them_are_seen(chip: EmulatedChip) -> None:
    matrix = torch.zeros(4, 4, device=chip.device)
    matrix[1:3, 2].add_(5.0)
    matrix.t()[0].fill_(1.0)
    matrix.view(16)[15] = 9.0
    expected = torch.zeros(4, 4)
    expected[1:3, 2], expected[:, 0], expected[3, 3] = 5.0, 1.0, 9.0
    assert torch.equal(matrix.cpu(), expected)


COMPLEX = {
    "product": lambda x, y: x * y.conj(),
    "imaginary part": lambda x, y: y.conj().imag,
    "negative": lambda x, y: (-y.conj()).real,
    "matrix product": lambda x, y: x.reshape(2, 2) @ y.reshape(2, 2).mH,
    "inner product": torch.vdot,
    "joined": lambda x, y: torch.cat([x, y.conj()]),
    "angle": lambda x, y: (x * y.conj()).angle(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_a_conjugate_is_one_for_every_operator_that_reads_it(chip: EmulatedChip, name: str) -> None:
    x, y = torch.randn(2, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    here, there = (
        [one.clone().requires_grad_() for one in (x, y)],
        [one.to(chip.device).requires_grad_() for one in (x, y)],
    )
    ours, theirs = COMPLEX[name](*there), COMPLEX[name](*here)
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach().resolve_neg())
    ours.abs().sum().backward()
    theirs.abs().sum().backward()
    for one, other in zip(there, here, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.cpu(), other.grad)


def test_operators_that_change_a_tensor_s_shape_in_place_are_followed(chip: EmulatedChip) -> None:
    tensor = torch.arange(6.0, device=chip.device).view(1, 2, 3)
    assert tensor.squeeze_(0).t_().shape == (3, 2)
    assert torch.equal(tensor.cpu(), torch.arange(6.0).view(2, 3).t())
    out = torch.empty(0, device=chip.device)
    torch.add(tensor, 1.0, out=out)
    assert out.shape == (3, 2) and torch.equal(out.cpu(), tensor.cpu() + 1.0)


def test_selection_and_sorting_equal_the_cpu(chip: EmulatedChip) -> None:
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([4, 0, 4])
    for compute in (
        lambda v, i: v.topk(3, dim=-1).values,
        lambda v, i: v.sort(dim=0).indices,
        lambda v, i: v[i],
        lambda v, i: v.index_select(0, i),
        lambda v, i: v.gather(1, i.view(1, 3)),
        lambda v, i: torch.zeros_like(v).index_add(0, i, v[:3]),
        lambda v, i: torch.where(v > 0, v, 0.0).cumsum(1),
        lambda v, i: v.argmax(1),
        lambda v, i: torch.bincount(i),
        lambda v, i: torch.cat([v, v[:1]]).chunk(2, dim=1)[1],
    ):
        assert torch.equal(compute(values.to(chip.device), index.to(chip.device)).cpu(), compute(values, index))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_inference_equals_the_cpu(chip: EmulatedChip, inference: type) -> None:
    tokens = torch.arange(7).view(1, 7)
    model = small_model()
    with inference():
        expected = model(tokens)
        assert torch.equal(model.to(chip.device)(tokens.to(chip.device)).cpu(), expected)


def test_printing_shows_the_numbers_and_the_device(chip: EmulatedChip) -> None:
    assert repr(torch.tensor([1.0, 2.0], device=chip.device)) == "tensor([1., 2.], device='emu:0')"
    weight = nn.Parameter(torch.zeros(1)).to(chip.device)
    assert "device='emu:0'" in repr(nn.Linear(1, 1).to(chip.device).weight) and weight.tolist() == [0.0]


def test_copies_and_state_dicts_are_independent_and_equal(chip: EmulatedChip) -> None:
    model = small_model().to(chip.device)
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    with torch.no_grad():
        model[1].weight.add_(1.0)
    assert not torch.equal(model[1].weight, copied[1].weight)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(model[1].weight, copied[1].weight)


def test_safetensors_carry_weights_to_a_file_and_back(chip: EmulatedChip, tmp_path: Path) -> None:
    model = small_model().to(chip.device)
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    other = small_model().to(chip.device)
    with torch.no_grad():
        other[1].weight.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other[1].weight.cpu(), small_model()[1].weight)


def test_a_tensor_of_another_device_is_refused_as_on_hardware(chip: EmulatedChip) -> None:
    with pytest.raises(RuntimeError, match="at least two devices, emu:0 and cpu"):
        torch.ones(2, device=chip.device) + torch.ones(2)
    assert (torch.ones(2, device=chip.device) * torch.tensor(3.0)).tolist() == [3.0, 3.0]


def test_the_device_s_random_state_is_its_own_and_follows_the_seed(chip: EmulatedChip) -> None:
    torch.manual_seed(5)
    host = torch.get_rng_state()
    first = torch.randn(4, device=chip.device)
    assert torch.equal(torch.get_rng_state(), host)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(4, device=chip.device), first)


def attention_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 9, 16), (2, 2, 11, 16), (2, 2, 11, 24))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("profile", ["exact", "h800"])
def test_attention_and_its_gradients_equal_float64_within_roundoff(profile: str, mask: str, dtype: torch.dtype) -> None:
    chip = EmulatedChip(profile)
    hidden = torch.rand(9, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    results = []
    for device, wide in ((torch.device("cpu"), torch.float64), (chip.device, dtype)):
        q, k, v = (x.to(wide).to(device).requires_grad_() for x in attention_inputs(dtype))
        bias = {"none": None, "boolean": hidden, "additive": hidden.to(wide)}[mask]
        bias = None if bias is None else bias.to(device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        out.square().sum().backward()
        results.append([x.detach().cpu().double() for x in (out, q.grad, k.grad, v.grad)])  # type: ignore[union-attr]
    chip.close()
    for expected, found in zip(*results, strict=True):
        # Norm-wise: a handful of roundings of the narrow format (probabilities, output, its square's gradient, ...)
        # and, in float32, sums of up to 24 terms and the exponential's two units in the last place.
        assert (found - expected).norm() <= 8 * ROUNDOFF[dtype] * expected.norm()


def test_attention_with_dropout_drops_and_keeps_the_mean(chip: EmulatedChip) -> None:
    q = torch.zeros(1, 1, 64, 8, device=chip.device)
    v = torch.ones(1, 1, 64, 8, device=chip.device)
    out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
    # Each output is the mean of 64 terms that are 0 or 2: a standard error of 1/8, and 1/64 over 64 rows.
    assert out.std() > 0 and abs(out.mean().item() - 1.0) < 6 / 64


def test_an_operator_that_would_hide_its_products_is_refused() -> None:
    chip = EmulatedChip("h800")
    with pytest.raises(NotImplementedError, match="convolution.* is not emulated"):
        F.conv1d(torch.ones(1, 1, 4, device=chip.device), torch.ones(1, 1, 2, device=chip.device))
    chip.close()


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch import nn
from beringia.chips.emulated import EmulatedChip
rank, port = int(sys.argv[1]), sys.argv[2]
device = EmulatedChip("exact").device
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
total = torch.full((3,), rank + 1.0, device=device)
dist.all_reduce(total)
assert total.tolist() == [3.0] * 3 and total.device == device
parts = [torch.zeros(2, device=device) for _ in range(2)]
dist.all_gather(parts, torch.full((2,), float(rank), device=device))
assert [part.tolist() for part in parts] == [[0.0, 0.0], [1.0, 1.0]]
sent = torch.full((2,), rank + 5.0, device=device)
dist.broadcast(sent, 0)
assert sent.tolist() == [5.0, 5.0]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
inputs = torch.arange(20.0, device=device).view(5, 4) * 0.1 * (rank + 1)
model(inputs).square().mean().backward()
alone = model[0].weight.grad.clone()
dist.all_reduce(alone)
model.zero_grad()
parallel = nn.parallel.DistributedDataParallel(model)
parallel(inputs).square().mean().backward()
assert torch.equal(model[0].weight.grad, alone / 2), (model[0].weight.grad, alone / 2)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_average_gradients_over_gloo() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), port], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=GIVE_UP_SECONDS) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_one_emulated_chip_is_open_at_a_time() -> None:
    chip = EmulatedChip("exact")
    with pytest.raises(ChipUnavailable, match="emulated:h800 was asked for, but emulated:exact is open"):
        EmulatedChip("h800")
    again = EmulatedChip("exact")
    again.close()
    chip.close()
    EmulatedChip("h800").close()


def test_unknown_names_are_answered_with_a_suggestion_and_the_list(tmp_path: Path) -> None:
    with pytest.raises(ChipUnavailable, match="no arithmetic profile called 'h80'. Did you mean 'h800'.*ascend-910b"):
        EmulatedChip("h80")
    with pytest.raises(ChipUnavailable, match="no fault script called 'r2-2026'. Did you mean 'r2-2025'.*none"):
        EmulatedChip("exact", faults="r2-2026")
    (tmp_path / "script.toml").mkdir()
    with pytest.raises(ChipUnavailable, match="script.toml cannot be read: Is a directory"):
        EmulatedChip("exact", faults=str(tmp_path / "script.toml"))
    with pytest.raises(ChipUnavailable, match="Fidelity 'slow' was asked for; emulated chips compute in fast or exact"):
        open_chip("emulated:h800@slow")


def test_a_second_device_name_in_a_process_is_refused(chip: EmulatedChip) -> None:
    with pytest.raises(ChipUnavailable, match="called 'npu' was asked for, but this process already has 'emu'"):
        register_device("npu", "exact")


def test_the_identity_says_emulated_and_changes_with_the_profile() -> None:
    hashes = set()
    for name in ("h100", "h800", "ascend-910b"):
        chip = EmulatedChip(name)
        identity = chip.identity
        assert (identity.truth, identity.vendor, identity.sku) == ("emulated", "emulated", read_profile(name).part)
        assert identity.switches["fidelity"] == "fast" and identity.switches["profile"] == read_profile(name).hash
        hashes.add(identity.hash)
        chip.close()
    assert len(hashes) == 3


def test_every_profile_is_complete_and_says_what_it_assumes() -> None:
    for name in profile_names():
        profile = read_profile(name)
        assert profile.part and profile.summary and profile.hash
    assert "units.bfloat16" in read_profile("ascend-910b").assumed()
    assert read_profile("h800").units == read_profile("h200").units == read_profile("h100").units


def test_a_profile_with_an_unknown_key_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('part = "mine"\ncolour = "red"\n')
    with pytest.raises(ChipUnavailable, match=r"mine\.toml: "):
        EmulatedChip(str(path))


def test_capabilities_follow_the_profile() -> None:
    computes = {"ascend-910b": torch.bfloat16, "v100": torch.float16, "exact": torch.float32}
    for name, dtype in computes.items():
        chip = EmulatedChip(name)
        capabilities = chip.capabilities
        assert capabilities.compute_dtype == dtype and capabilities.sharding == "ddp" and not capabilities.compile
        assert (torch.bfloat16 in capabilities.dtypes) == (name != "v100")
        assert chip.memory().total_bytes == read_profile(name).memory.gibibytes * 2**30
        assert chip.collective_backend == "gloo"
        chip.close()


def test_a_chip_may_be_opened_where_no_gradients_are_wanted() -> None:
    with torch.no_grad():
        assert _backward_works()
    with torch.inference_mode():
        assert _backward_works()
