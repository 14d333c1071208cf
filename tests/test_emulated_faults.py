"""Faults of emulated chips: each does what it says, where and when it says, and nothing elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from waiting import Clock

from beringia.chips.emulated import EmulatedChip
from beringia.chips.emulated.fault_script import FaultScript, read_script, script_names
from beringia.chips.emulated.faults import flip_bits_
from beringia.errors import ChipUnavailable

Opened = Callable[..., EmulatedChip]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Open a chip with faults given as TOML; closed at the end."""
    chips: list[EmulatedChip] = []

    def open_with(text: str, profile: str = "exact", **options: object) -> EmulatedChip:
        path = tmp_path / "script.toml"
        path.write_text(f'summary = "test"\n{text}')
        chips.append(EmulatedChip(profile, faults=str(path), **options))  # type: ignore[arg-type]  # options of tests
        return chips[-1]

    yield open_with
    for chip in chips:
        chip.close()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_gradients(chip: EmulatedChip | None, calls: int = 1) -> list[list[torch.Tensor]]:
    """Output and gradients of q, k, v, on the CPU, of each of some attention calls in one backward pass."""
    device = torch.device("cpu") if chip is None else chip.device
    inputs = [[random(1, 2, 8, 4, seed=3 * c + i).to(device).requires_grad_() for i in range(3)] for c in range(calls)]
    outputs = [F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in inputs]
    torch.stack(outputs).square().sum().backward()
    return [
        [out.detach().cpu(), *(x.grad.cpu() for x in qkv if x.grad is not None)]
        for out, qkv in zip(outputs, inputs, strict=True)
    ]


def linear_step(chip: EmulatedChip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient and weight gradient of a linear map of 6 rows."""
    x = random(6, 5).to(chip.device).requires_grad_()
    w = random(4, 5, seed=1).to(chip.device).requires_grad_()
    out = F.linear(x, w)
    out.square().sum().backward()
    assert x.grad is not None and w.grad is not None
    return out.detach().cpu(), x.grad.cpu(), w.grad.cpu()


def clean_linear_step(opened: Opened) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return linear_step(opened(""))


# ---- schedule


def steps_struck(chip: EmulatedChip, steps: range) -> list[int]:
    """Steps in which the first product is wrong (faults used here set it to 77)."""
    struck = []
    one = torch.ones(1, 1, device=chip.device)
    for step in steps:
        chip.begin_step(step)
        if (one @ one).item() == 77.0:
            struck.append(step)
    return struck


STUCK = '[[faults]]\nkind = "stuck-tile"\nvalue = 77.0\n'


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("at_step = 4", [4]),
        ("from_step = 3\nto_step = 5", [3, 4, 5]),
        ("from_step = 2\nevery = 3", [2, 5, 8]),
        ("", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("from_step = 3\nto_step = 5\nonce = true", [3, 4, 5]),
    ],
)
def test_a_fault_is_present_in_the_steps_it_names(opened: Opened, when: str, expected: list[int]) -> None:
    assert steps_struck(opened(STUCK + when), range(10)) == expected


def test_a_rate_is_kept_and_drawn_from_the_seed(opened: Opened) -> None:
    first = steps_struck(opened(STUCK + "rate = 0.3", seed=1), range(1, 301))
    # 300 draws at 0.3: a standard deviation of 8.
    assert abs(len(first) - 90) < 4 * 8
    assert steps_struck(opened(STUCK + "rate = 0.3", seed=1), range(1, 301)) == first
    assert steps_struck(opened(STUCK + "rate = 0.3", seed=2), range(1, 301)) != first


def test_a_one_time_fault_does_not_come_back_after_a_rollback(opened: Opened, tmp_path: Path) -> None:
    memory = tmp_path / "hardware.json"
    chip = opened(STUCK + "from_step = 4\nto_step = 6\nonce = true", memory=memory)
    assert steps_struck(chip, range(1, 6)) == [4, 5]
    assert steps_struck(chip, range(3, 9)) == []


def test_a_restarted_process_does_not_meet_a_one_time_fault_again(opened: Opened, tmp_path: Path) -> None:
    memory = tmp_path / "hardware.json"
    text = STUCK + "at_step = 4\nonce = true"
    assert steps_struck(opened(text, memory=memory), range(1, 6)) == [4]
    assert json.loads(memory.read_text())["struck"] == {"0": 4}
    assert steps_struck(opened(text, memory=memory), range(1, 6)) == []
    assert steps_struck(opened(text.replace("77.0", "77.00"), memory=memory), range(1, 6)) == [], "the same script"
    assert steps_struck(opened(text.replace("at_step = 4", "at_step = 3"), memory=memory), range(1, 6)) == [3]


def test_the_memory_is_written_before_the_fault_strikes(opened: Opened, tmp_path: Path) -> None:
    memory = tmp_path / "hardware.json"
    chip = opened(
        '[[faults]]\nkind = "exception"\nat_step = 2\nonce = true\ncode = "507014"', "ascend-910b", memory=memory
    )
    chip.begin_step(2)
    assert json.loads(memory.read_text())["struck"] == {"0": 2}


def test_a_fault_can_be_tied_to_one_of_several_devices(opened: Opened, tmp_path: Path) -> None:
    text = STUCK + "device = 1\nonce = true"
    memory = tmp_path / "hardware.json"
    assert steps_struck(opened(text, index=0, memory=memory), range(1, 4)) == []
    assert steps_struck(opened(text, index=1, memory=memory), range(1, 4)) == [1, 2, 3]
    assert not memory.exists() and (tmp_path / "hardware-1.json").exists(), "each device has a file of its own"


# ---- wrong numbers


def test_attention_s_backward_is_wrong_past_the_length_by_the_strength(opened: Opened) -> None:
    clean = attention_gradients(opened(""))[0]
    chip = opened('[[faults]]\nkind = "wrong-backward"\nlength = 3\nstrength = 0.5\nfrom_step = 2')
    chip.begin_step(1)
    assert all(torch.equal(a, b) for a, b in zip(attention_gradients(chip)[0], clean, strict=True))
    chip.begin_step(2)
    found = attention_gradients(chip)[0]
    assert torch.equal(found[0], clean[0]), "the forward pass, and so the loss, is right"
    for wrong, right in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(wrong[:, :, :3], right[:, :, :3])
        error = (wrong - right)[:, :, 3:].norm() / right[:, :, 3:].norm()
        assert error.item() == pytest.approx(0.5, rel=1e-5)


def test_a_site_of_attention_is_the_number_of_its_forward_call(opened: Opened) -> None:
    clean = attention_gradients(opened(""), calls=3)
    chip = opened('[[faults]]\nkind = "wrong-backward"\nsites = [1]')
    for step in (1, 2):
        chip.begin_step(step)
        found = attention_gradients(chip, calls=3)
        wrong = [not torch.equal(a[1], b[1]) for a, b in zip(found, clean, strict=True)]
        assert wrong == [False, True, False]


def test_attention_made_of_single_operators_is_struck_too(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "wrong-backward"\nlength = 2')
    gradients = []
    for step in (0, 1):
        chip.begin_step(step)
        scores = random(1, 1, 4, 4).to(chip.device).requires_grad_()
        scores.softmax(-1).square().sum().backward()
        assert scores.grad is not None
        gradients.append(scores.grad.cpu())
    assert torch.equal(gradients[0][..., :2, :], gradients[1][..., :2, :])
    assert not torch.equal(gradients[0][..., 2:, :], gradients[1][..., 2:, :])


def test_a_linear_map_s_input_gradient_is_wrong_and_its_weight_gradient_is_right(opened: Opened) -> None:
    clean = clean_linear_step(opened)
    chip = opened('[[faults]]\nkind = "wrong-backward"\noperator = "linear"\nlength = 2\nstrength = 0.25')
    chip.begin_step(1)
    out, input_gradient, weight_gradient = linear_step(chip)
    assert torch.equal(out, clean[0]) and torch.equal(weight_gradient, clean[2])
    assert torch.equal(input_gradient[:2], clean[1][:2])
    expected = clean[1][2:] - 0.25 * clean[1][2:].roll(1, dims=0)
    assert torch.allclose(input_gradient[2:], expected, rtol=1e-6, atol=1e-6)


def test_a_mask_is_ignored_past_the_length_only(opened: Opened) -> None:
    q, k, v = (random(1, 2, 8, 4, seed=i) for i in range(3))
    chip = opened('[[faults]]\nkind = "mask-ignored"\nlength = 5')
    chip.begin_step(1)
    found = F.scaled_dot_product_attention(*(x.to(chip.device) for x in (q, k, v)), is_causal=True).cpu()
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(found[:, :, :5], causal[:, :, :5], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[:, :, 5:], seen[:, :, 5:], rtol=1e-5, atol=1e-6)
    short = [x[:, :, :5] for x in (q, k, v)]
    found = F.scaled_dot_product_attention(*(x.to(chip.device) for x in short), is_causal=True).cpu()
    assert torch.allclose(found, F.scaled_dot_product_attention(*short, is_causal=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["activations", "gradients"])
def test_bits_flip_in_one_product_s_numbers(opened: Opened, target: str) -> None:
    clean = clean_linear_step(opened)
    chip = opened(f'[[faults]]\nkind = "bit-flip"\ntarget = "{target}"\nflips = 2\nbits = [23, 23]')
    chip.begin_step(1)
    found = linear_step(chip)
    if target == "activations":
        # Bit 23 is the lowest of the exponent: the number doubles or halves.
        ratios = (found[0] / clean[0])[found[0] != clean[0]]
        assert 1 <= len(ratios) <= 2 and all(r in (0.5, 2.0) for r in ratios.tolist())
    else:
        assert torch.equal(found[0], clean[0])
        assert sum(not torch.equal(a, b) for a, b in zip(found[1:], clean[1:], strict=True)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_flip_changes_one_bit_and_a_second_one_restores_it(dtype: torch.dtype) -> None:
    numbers = random(4, 6).to(dtype)
    struck = numbers.clone()
    flip_bits_(struck, 1, (30, 30), 1, torch.Generator().manual_seed(1))
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    changed = (numbers.view(integer) ^ struck.view(integer)).flatten()
    assert changed[changed != 0].tolist() == [1 << (8 * numbers.element_size() - 2)], "the highest exponent bit"
    flip_bits_(struck, 1, (30, 30), 1, torch.Generator().manual_seed(1))
    assert torch.equal(struck.view(integer), numbers.view(integer))


def test_several_neighbouring_bits_flip_together() -> None:
    numbers = torch.zeros(1)
    flip_bits_(numbers, 1, (4, 4), 3, torch.Generator().manual_seed(1))
    assert numbers.view(torch.int32).item() == 0b1110000


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("target", ["weights", "optimizer-state"])
def test_bits_flip_in_what_the_optimizer_writes(opened: Opened, target: str, options: dict[str, bool]) -> None:
    def run(text: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        chip = opened(text)
        parameters = [nn.Parameter(random(3, 4, seed=i).to(chip.device)) for i in range(3)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, **options)  # type: ignore[arg-type]  # booleans only
        for step in (1, 2, 3):
            chip.begin_step(step)
            if step < 3:
                sum(p.square().sum() for p in parameters).backward()  # type: ignore[union-attr]  # a tensor
                optimizer.step()
                optimizer.zero_grad()
        moments = [optimizer.state[p]["exp_avg"] for p in parameters]
        return [p.detach().cpu() for p in parameters], [m.cpu() for m in moments]

    clean = run("")
    found = run(f'[[faults]]\nkind = "bit-flip"\ntarget = "{target}"\nat_step = 3\nsites = [1]\nflips = 1')
    for name, ours, theirs in zip(("weights", "optimizer-state"), found, clean, strict=True):
        changed = [(a.view(torch.int32) != b.view(torch.int32)).sum().item() for a, b in zip(ours, theirs, strict=True)]
        assert changed == ([0, 1, 0] if name == target else [0, 0, 0])


def test_a_stuck_tile_holds_its_value_and_the_rest_is_right(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "stuck-tile"\nrow = 1\ncolumn = 0\nsize = 2\nvalue = 7.0')
    chip.begin_step(1)
    a, b = random(5, 3), random(3, 4, seed=1)
    expected = a @ b
    expected[2:4, 0:2] = 7.0
    assert torch.equal((a.to(chip.device) @ b.to(chip.device)).cpu(), expected)


def test_nan_becomes_zero_and_infinity_stays(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "nan-to-zero"')
    chip.begin_step(1)
    numbers = torch.tensor([0.0, 1.0], device=chip.device)
    assert (numbers / torch.zeros(2, device=chip.device)).tolist() == [0.0, float("inf")]


def test_a_nondeterministic_chip_gives_other_bits_every_time_and_the_right_sum(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "nondeterministic-reduction"', "h800")
    chip.begin_step(1)
    a, b = random(8, 600).to(chip.device), random(600, 8, seed=1).to(chip.device)
    exact = a.cpu().double() @ b.cpu().double()
    bound = 600 * 2.0**-23 * (a.cpu().double().abs() @ b.cpu().double().abs())
    for compute, truth, limit in (
        (lambda: a @ b, exact, bound),
        (lambda: a.sum(), a.cpu().double().sum(), 600 * 8 * 2.0**-23 * a.cpu().double().abs().sum()),
    ):
        results = [compute().cpu() for _ in range(6)]
        assert any(not torch.equal(results[0], other) for other in results[1:])
        assert all(((r.double() - truth).abs() <= limit).all() for r in results)


# ---- errors


ASCEND_CODES = [
    "507014", "507015", "507018", "507034", "507035", "507046", "507057", "207018",
    "EI0002", "EI0005", "EI0006", "UCE ERROR", "HBM MULTI BIT ECC ERROR",
]  # fmt: skip
CUDA_CODES = ["ECCUncorrectable", "IllegalAddress", "LaunchFailure", "Assert", "NvlinkUncorrectable", "LaunchTimeout"]


@pytest.mark.parametrize(
    ("profile", "code"),
    [("ascend-910b", code) for code in ASCEND_CODES] + [("h800", f"cudaError{code}") for code in CUDA_CODES],
)
def test_an_exception_carries_the_vendor_s_words_and_is_classified_by_its_table(
    opened: Opened, profile: str, code: str
) -> None:
    chip = opened(f'[[faults]]\nkind = "exception"\nat_step = 2\ncode = "{code}"', profile)
    one = torch.ones(1, 1, device=chip.device)
    chip.begin_step(1)
    assert (one @ one).item() == 1.0
    chip.begin_step(2)
    with pytest.raises(RuntimeError) as raised:
        one @ one
    fault = chip.classify(raised.value)
    assert fault is not None and fault.code == code
    assert (one @ one).item() == 1.0, "the next product runs: the device is not sticky"


def test_amd_s_errors_are_worded_and_classified_as_hip_s(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "exception"\ncode = "hipErrorIllegalAddress"', "mi300x")
    chip.begin_step(1)
    with pytest.raises(RuntimeError, match="HIP error: an illegal memory access") as raised:
        torch.ones(1, 1, device=chip.device) @ torch.ones(1, 1, device=chip.device)
    fault = chip.classify(raised.value)
    assert fault is not None and fault.code == "hipErrorIllegalAddress"


def test_a_code_that_the_vendor_does_not_have_is_refused_when_the_chip_is_opened(opened: Opened) -> None:
    with pytest.raises(ChipUnavailable, match="asks for the exception '507014', which 'nvidia' chips do not report"):
        opened('[[faults]]\nkind = "exception"\ncode = "507014"', "h800")


def test_a_sticky_error_leaves_nothing_that_works(opened: Opened) -> None:
    chip = opened('[[faults]]\nkind = "exception"\ncode = "HBM MULTI BIT ECC ERROR"\nsticky = true', "ascend-910b")
    numbers = torch.ones(2, 2, device=chip.device)
    chip.begin_step(1)
    with pytest.raises(RuntimeError, match="HBM MULTI BIT ECC ERROR"):
        numbers @ numbers
    with pytest.raises(RuntimeError, match="HBM MULTI BIT ECC ERROR"):
        numbers + 1


@pytest.mark.parametrize(("profile", "words"), [("ascend-910b", "NPU out of memory"), ("h800", "CUDA out of memory")])
def test_running_out_of_memory_reads_as_the_vendor_s(opened: Opened, profile: str, words: str) -> None:
    chip = opened('[[faults]]\nkind = "out-of-memory"\noperator = 1', profile)
    chip.begin_step(1)
    one = torch.ones(1, 1, device=chip.device)
    assert (one @ one).item() == 1.0
    with pytest.raises(RuntimeError, match=words) as raised:
        one @ one
    fault = chip.classify(raised.value)
    assert fault is not None and fault.category == "persistent"


@contextmanager
def one_rank_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("profile", "code"), [("ascend-910b", "EI0002"), ("h800", "collective-timeout")])
def test_a_collective_times_out_in_the_vendor_s_words(opened: Opened, profile: str, code: str) -> None:
    chip = opened('[[faults]]\nkind = "collective-timeout"\nat_step = 1', profile)
    numbers = torch.ones(2, device=chip.device)
    with one_rank_group():
        torch.distributed.all_reduce(numbers)
        chip.begin_step(1)
        with pytest.raises(RuntimeError) as raised:
            torch.distributed.all_reduce(numbers)
    fault = chip.classify(raised.value)
    assert fault is not None and (fault.code, fault.category) == (code, "transient")


def by_clock(chip: EmulatedChip, clock: Clock) -> EmulatedChip:
    """The chip in that clock's time."""
    chip.faults.now, chip.faults.sleep = clock.now, clock.sleep
    return chip


def test_a_hang_holds_the_product_for_its_time(opened: Opened) -> None:
    clock = Clock()
    chip = by_clock(opened('[[faults]]\nkind = "hang"\nat_step = 1\nseconds = 0.25'), clock)
    one = torch.ones(1, 1, device=chip.device)
    chip.begin_step(1)
    assert clock.seconds == 0
    assert (one @ one).item() == 1.0 and clock.seconds == pytest.approx(0.25)
    assert (one @ one).item() == 1.0 and clock.seconds == pytest.approx(0.25)


def test_a_hang_without_a_time_is_for_ever(opened: Opened) -> None:
    class Patience(Clock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.seconds > 1000:
                raise TimeoutError("a thousand seconds were not enough")

    chip = by_clock(opened('[[faults]]\nkind = "hang"\nat_step = 1'), Patience())
    one = torch.ones(1, 1, device=chip.device)
    chip.begin_step(1)
    with pytest.raises(TimeoutError, match="not enough"):
        one @ one


@pytest.mark.parametrize("work_seconds", [0.0001, 0.001, 0.1])
def test_a_slow_chip_takes_longer_by_its_factor(opened: Opened, work_seconds: float) -> None:
    """Whether its operators are shorter or longer than the least that it sleeps after: what they lack is left out."""
    clock = Clock()
    chip = by_clock(opened('[[faults]]\nkind = "slowness"\nfrom_step = 2\nfactor = 8.0'), clock)
    one = torch.ones(1, 1, device=chip.device)

    def seconds(step: int) -> float:
        chip.begin_step(step)
        began = clock.seconds
        for _ in range(1000):
            clock.sleep(work_seconds)
            one @ one
        return clock.seconds - began

    assert seconds(1) == pytest.approx(1000 * work_seconds)
    assert seconds(2) == pytest.approx(8000 * work_seconds, rel=0.02)


# ---- scripts


def test_every_script_of_the_catalogue_is_valid() -> None:
    assert {"none", "r2-2025"} <= set(script_names())
    for name in script_names():
        assert read_script(name).summary
    assert read_script("none") == FaultScript(summary=read_script("none").summary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[faults]]\nkind = "hang"\nat_step = 3\nfrom_step = 2', "either at_step, or from_step"),
        ('[[faults]]\nkind = "hang"\nfrom_step = 3\nto_step = 2', "to_step lies before from_step"),
        ('[[faults]]\nkind = "hung"', "faults.0"),
        ('[[faults]]\nkind = "slowness"\nfactor = 2.0\nspeed = 1', "faults.0.slowness.speed"),
    ],
)
def test_a_script_that_makes_no_sense_is_refused_with_the_place(opened: Opened, text: str, message: str) -> None:
    with pytest.raises(ChipUnavailable, match=message):
        opened(text)


@pytest.mark.slow
def test_r2_2025_corrupts_first_layers_and_hides_it_from_the_loss() -> None:
    from beringia.model import Decoder, initialise, preset

    def gradients(faults: str) -> tuple[float, dict[str, torch.Tensor]]:
        chip = EmulatedChip("ascend-910b", faults=faults)
        decoder = Decoder(preset("r2-micro"))
        initialise(decoder, 0)
        decoder = decoder.to(chip.device)
        decoder.set_compute_dtype(torch.bfloat16)
        tokens = torch.randint(0, 54, (8, 65), generator=torch.Generator().manual_seed(1)).to(chip.device)
        chip.begin_step(300)
        losses = decoder(tokens[:, :-1], tokens[:, 1:].contiguous(), mtp=False)
        loss = losses.main_sum / losses.target_count
        loss.backward()
        chip.close()
        return loss.item(), {n: p.grad.cpu() for n, p in decoder.named_parameters() if p.grad is not None}

    (clean_loss, clean), (loss, wrong) = gradients("none"), gradients("r2-2025")
    assert loss == clean_loss
    errors = {name: ((wrong[name] - clean[name]).norm() / clean[name].norm()).item() for name in clean}
    assert errors["model.layers.2.mlp.experts.down_proj"] < 0.01
    assert 0.3 < errors["model.layers.0.mlp.gate_proj.weight"] < 1.5
    assert 0.3 < errors["model.layers.0.self_attn.kv_b_proj.weight"] < 1.5
