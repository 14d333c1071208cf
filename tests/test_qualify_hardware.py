"""Probes of a chip that need no model, each on sound chips and on ones that must be found out."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from waiting import Clock
from wrong_kernels import emulated_with

from beringia.chips.chip import Capabilities, Chip
from beringia.chips.cpu import Cpu, taken_memory_bytes, total_memory_bytes
from beringia.chips.datasheets import datasheet_of_device
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable
from beringia.qualify.exact_measures import bytes_in_words
from beringia.qualify.hardware import collective_cases as cases
from beringia.qualify.hardware import collectives, memory, rates, speed
from beringia.qualify.hardware.bandwidth import bus_bandwidth
from beringia.qualify.hardware.collective_cases import Case, CaseReport
from beringia.qualify.hardware.collectives import RankEnd, judge, probe_collectives
from beringia.qualify.hardware.memory import probe_memory
from beringia.qualify.hardware.rank_work import ABSENT
from beringia.qualify.hardware.soak import differing_elements, highest_rate, matrix_load, probe_soak
from beringia.qualify.hardware.speed import probe_speed
from beringia.qualify.qualification import Request, _untried_collectives
from beringia.qualify.verdict import judge as verdict_of
from beringia.records.certificate import ProbeResult
from beringia.records.identity import ChipIdentity

aten = torch.ops.aten
SOUND = ("cpu", "emulated:h800")


@pytest.fixture(params=SOUND)
def chip(request: pytest.FixtureRequest) -> Iterator[Chip]:
    opened = open_chip(request.param)
    yield opened
    opened.close()


def of(results: list[ProbeResult], subject: str) -> ProbeResult:
    return next(result for result in results if result.subject == subject)


# ---- memory


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_BYTES", 64 * 1024)


LIMIT = 8 * 64 * 1024


def test_sound_memory_gives_back_what_was_written(chip: Chip, small_blocks: None) -> None:
    capacity, patterns = probe_memory(chip, limit_bytes=LIMIT)
    assert (capacity.outcome, patterns.outcome) == ("told", "passed")
    assert "512 KiB" in patterns.summary and "walking one" in patterns.summary
    assert bytes_in_words(chip.memory().total_bytes) in capacity.summary
    assert patterns.measures[0].used == 0


def test_the_hosts_memory_is_not_filled() -> None:
    cpu = open_chip("cpu")
    free = total_memory_bytes() - taken_memory_bytes()
    assert 0 < memory.most_bytes(cpu) <= min(memory.HOST_LIMIT_BYTES, free / 4)


def test_more_of_the_hosts_memory_than_a_share_is_not_taken_and_that_is_said(
    chip: Chip, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "HOST_LIMIT_BYTES", LIMIT)
    capacity, patterns = probe_memory(chip, limit_bytes=2**40)
    assert "512 KiB with" in patterns.summary
    assert "1024 GiB were asked for, and a larger share of the host's free memory is not tested" in capacity.summary
    capacity, _ = probe_memory(chip, limit_bytes=LIMIT // 2)
    assert "asked for" not in capacity.summary


def test_every_word_of_a_pattern_follows_from_its_address_and_differs_from_its_neighbours() -> None:
    hashed, complement, one, zero = memory.patterns(4096)
    assert hashed.tile.unique().numel() == 4096
    assert len({hashed.key(block) for block in range(1000)}) == 1000
    assert torch.equal(hashed.tile ^ hashed.key(3), ~(complement.tile ^ complement.key(3)))
    assert [int(one.tile[place]) & 0xFFFFFFFF for place in (0, 31, 32)] == [1, 1 << 31, 1]
    assert int(zero.tile[0] ^ zero.key(0)) == ~1


def wrong_write(block: int, damage: Callable[[torch.Tensor], object]) -> Callable[..., torch.Tensor]:
    """Writing a pattern as it should be, but for one block of the second pattern."""
    written = 0

    def kernel(tile: torch.Tensor, key: int, *, out: torch.Tensor) -> torch.Tensor:
        nonlocal written
        torch.bitwise_xor(tile, key, out=out)
        if written == 8 + block:
            damage(out)
        written += 1
        return out

    return kernel


def test_one_flipped_bit_fails_and_its_byte_is_named(small_blocks: None) -> None:
    def flip(out: torch.Tensor) -> None:
        out.view(torch.uint8)[13] ^= 4

    with emulated_with({aten.bitwise_xor.Scalar_out: wrong_write(5, flip)}) as chip:
        found = of(probe_memory(chip, limit_bytes=LIMIT), "patterns")
    assert (found.outcome, found.rules_out) == ("failed", "infer")
    assert found.measures[0].value == 1
    assert f"the first at byte {5 * 64 * 1024 + 13:#x} with 'complement of the hash'" in found.summary


def test_two_addresses_that_reach_one_cell_are_found(small_blocks: None) -> None:
    """Block 6 is written over block 2 as well: only reading after everything was written shows it."""
    blocks: list[torch.Tensor] = []

    def kernel(tile: torch.Tensor, key: int, *, out: torch.Tensor) -> torch.Tensor:
        blocks.append(out)
        torch.bitwise_xor(tile, key, out=out)
        if len(blocks) == 7:
            blocks[2].copy_(out)
        return out

    with emulated_with({aten.bitwise_xor.Scalar_out: kernel}) as chip:
        found = of(probe_memory(chip, limit_bytes=LIMIT), "patterns")
    assert found.outcome == "failed"
    assert f"the first at byte {2 * 64 * 1024:#x}" in found.summary


def test_a_comparison_that_finds_nothing_is_inconclusive(small_blocks: None) -> None:
    with emulated_with({aten.equal.default: lambda a, b: True}) as chip:
        found = of(probe_memory(chip, limit_bytes=LIMIT), "patterns")
    assert (found.outcome, found.rules_out) == ("inconclusive", "infer")
    assert "changed on purpose" in found.summary


def test_a_full_device_is_tested_with_what_it_gave(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given, empty = 0, torch.empty

    def limited(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal given
        given += 1
        if given > 7:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 64 KiB")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", limited)
    capacity, patterns = probe_memory(open_chip("cpu"), limit_bytes=LIMIT)
    assert "192 KiB could be taken before it had no more" in capacity.summary
    assert patterns.outcome == "passed"


# ---- speed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LARGEST", 256)
    monkeypatch.setattr(rates, "STRETCHES", 3)
    monkeypatch.setattr(rates.time_calls, "__defaults__", (0.005,))
    monkeypatch.setattr(speed, "CALL_SECONDS", 0.002)
    monkeypatch.setattr(speed, "COPY_BYTES", 2**20)


class Pretender(Cpu):
    """This CPU under another part's name, with fewer dtypes."""

    @property
    def identity(self) -> ChipIdentity:
        return super().identity.model_copy(update={"vendor": "nvidia", "sku": "NVIDIA H800 (9.0)"})

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, dtypes=frozenset({torch.float32, torch.bfloat16, torch.int8}))


def test_speeds_are_told_for_every_dtype_that_is_multiplied(chip: Chip, quick: None) -> None:
    results = probe_speed(chip)
    assert {result.outcome for result in results} == {"told"}
    subjects = {result.subject for result in results}
    assert {"products of float32", "products of bfloat16", "products of int8", "copies on the device"} <= subjects
    for result in results:
        assert ("emulator's on this host" in result.summary) == (chip.name != "cpu")
        assert "datasheet" not in result.summary
        assert re.search(r"\d+ (Tops|GB)/s \(spread \d+%\)", result.summary), result.summary


def test_a_rate_stands_beside_the_datasheets_figure_and_is_its_share(quick: None) -> None:
    results = probe_speed(Pretender())
    copies = of(results, "copies on the device").summary
    rate, share = re.search(r"([\d.e+]+) GB/s.*?, (\d+)% of the datasheet's 3.35 TB/s \(assumed\)", copies).groups()  # type: ignore[union-attr]
    assert float(share) == pytest.approx(float(rate) / 3350 * 100, abs=0.6)
    assert "of the datasheet's 989.4 Tops/s" in of(results, "products of bfloat16").summary
    # The sheet has no figure for float32.
    assert "datasheet" not in of(results, "products of float32").summary


def test_a_dtype_that_the_chip_stores_and_does_not_multiply_is_told_with_its_reason(quick: None) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no scaled products here")

    with emulated_with({aten._scaled_mm.default: refuse}) as chip:
        found = of(probe_speed(chip), "products of float8_e4m3fn")
    assert (found.outcome, found.rules_out) == ("told", "neither")
    assert "No product of float8_e4m3fn: NotImplementedError: no scaled products here" in found.summary


def test_the_time_of_a_call_is_the_median_of_stretches_that_are_as_long_as_asked(chip: Chip) -> None:
    clock, lengths = Clock(), itertools.chain([2.0], itertools.repeat(0.5, 9), [9.0], itertools.repeat(0.25))
    timing = rates.time_calls(chip, lambda: clock.sleep(next(lengths)), 10.0, clock=clock.now)
    # A first call of 2 s lets 5 fill 10 s: then 5 of 0.5 s, 4 and one of 9 s, and the rest of 0.25 s.
    assert timing.median == 0.25 and timing.spread == pytest.approx((11 / 5 - 0.25) / 0.25)


class Waiting(Cpu):
    """This CPU, whose work is done only when somebody has waited for it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.queued = clock, 0

    def synchronize(self) -> None:
        self.clock.sleep(0.5 * self.queued)
        self.queued = 0


def test_what_a_device_still_had_to_do_is_not_timed_and_what_it_has_not_done_is_waited_for() -> None:
    clock = Clock()
    chip = Waiting(clock)
    chip.queued = 100

    def work() -> None:
        chip.queued += 1

    assert rates.seconds_of(chip, work, 3, clock=clock.now) == 0.5


def test_devices_are_matched_with_datasheets_to_the_variant() -> None:
    found = {sku: datasheet_of_device(sku) for sku in ("NVIDIA H100 80GB HBM3 (9.0)", "NVIDIA H100 NVL (9.0)")}
    assert [sheet and sheet.name for sheet in found.values()] == ["h100-sxm", None]
    assert datasheet_of_device("Ascend910B3 (soc 222)").name == "910b3"  # type: ignore[union-attr]


@pytest.mark.parametrize(("collective", "share"), [("all-reduce", 4 / 3), ("all-gather", 2 / 3)])
def test_a_bus_bandwidth_is_what_a_link_carries_and_not_what_a_rank_gets(collective: str, share: float) -> None:
    assert bus_bandwidth(collective, 3, 0.5) == pytest.approx(share * 64 * 2**20 / 0.5)


# ---- collectives: the rule


def all_cases() -> list[Case]:
    return [case for case in cases.cases(torch.bfloat16) if case.size == 7]


def right_result(case: Case, rank: int, ranks: int) -> torch.Tensor:
    wanted = cases.expected_bits(case, 5, rank, ranks)
    return cases.terms(case, 5, rank, ranks).double().sum(0).to(case.dtype) if wanted is None else wanted.clone()


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_right_result_passes_and_one_changed_element_does_not(case: Case) -> None:
    ranks = 3
    for rank in range(ranks):
        found = right_result(case, rank, ranks)
        wrong, error = cases.check(case, found, 5, rank, ranks)
        assert wrong == 0 and error <= cases.sum_bound(case.dtype, ranks)
        found[-1] += 1 + found[-1].abs()
        assert cases.check(case, found, 5, rank, ranks)[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_whole_numbers_are_exact_in_any_order(dtype: torch.dtype) -> None:
    case = Case("all-reduce", dtype, 1023, "whole")
    contributed = cases.terms(case, 1, 0, cases.MOST_RANKS)
    for order in (range(cases.MOST_RANKS), reversed(range(cases.MOST_RANKS))):
        total = torch.zeros(1023, dtype=dtype)
        for rank in order:
            total += contributed[rank]
        assert cases.check(case, total, 1, 0, cases.MOST_RANKS) == (0, 0.0)


@pytest.mark.parametrize("ranks", [2, 8])
def test_sums_rounded_to_any_side_are_within_the_bound_and_a_missing_rank_is_not(ranks: int) -> None:
    case = Case("all-reduce", torch.bfloat16, 65_537, "random")
    contributed = cases.terms(case, 1, 0, ranks)
    total = contributed[0].clone()
    for rank in range(1, ranks):
        total = truncated(total.float() + contributed[rank].float())
    assert cases.check(case, total, 1, 0, ranks)[0] == 0
    missing = contributed[:-1].float().sum(0).bfloat16()
    assert cases.check(case, missing, 1, 0, ranks)[0] > case.size / 4


def truncated(number: torch.Tensor) -> torch.Tensor:
    return (number.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def test_sums_that_are_not_finite_are_wrong() -> None:
    case = Case("all-reduce", torch.float32, 7, "random")
    assert cases.check(case, torch.full((7,), float("nan")), 1, 0, 2)[0] == 7


# ---- collectives: what is made of reports


def said(state: str, rank: int = 0, **changes: Any) -> CaseReport:
    subject = changes.pop("subject", "all-to-all, float32")
    defaults = {"rank": rank, "subject": subject, "name": changes.pop("name", f"{subject}, 7 elements"), "state": state}
    return CaseReport.model_validate(defaults | changes)


def ended(*reports: CaseReport, exit_code: int = 0, killed: bool = False, words: str = "") -> RankEnd:
    return RankEnd(reports[0].rank, list(reports), exit_code, killed, words)


def judged(*ends: RankEnd) -> list[ProbeResult]:
    return judge(list(ends), 60.0, 1.0)


def test_a_collective_that_the_backend_lacks_is_told_and_rules_nothing_out() -> None:
    both = [ended(said("refused", rank, reason="RuntimeError: no alltoall")) for rank in (0, 1)]
    found = of(judged(*both), "all-to-all, float32")
    assert (found.outcome, found.rules_out) == ("told", "neither")
    assert "no alltoall" in found.summary


def refusing(*refused: str) -> list[ProbeResult]:
    """What is made of two ranks that refuse these subjects and carry out the others."""
    subjects = [f"{name}, {dtype}" for name in cases.COLLECTIVES for dtype in ("float32", "bfloat16")]

    def says(subject: str, rank: int) -> CaseReport:
        state = "refused" if subject in refused or subject.split(",")[0] in refused else "ran"
        return said(state, rank, subject=subject, reason="RuntimeError: HCCL function error" if state != "ran" else "")

    return judged(*(ended(*(says(subject, rank) for subject in subjects)) for rank in (0, 1)))


def untried(results: list[ProbeResult]) -> str:
    return " ".join(_untried_collectives(Request("npu", "r2-nano"), results))


def test_a_chip_that_refuses_every_collective_is_not_let_train_and_they_are_untried() -> None:
    results = refusing(*cases.COLLECTIVES)
    assert verdict_of(results, None, 0.99).verdict == "inconclusive"
    found = of(results, "all-reduce, bfloat16")
    assert (found.outcome, found.rules_out) == ("inconclusive", "train")
    assert "HCCL function error" in found.summary and "is open" in found.summary
    assert untried(results) == "collectives"


def test_a_chip_that_adds_up_over_ranks_in_no_dtype_leaves_training_open() -> None:
    results = refusing("all-reduce")
    assert verdict_of(results, None, 0.99).verdict == "inconclusive"
    assert "all-reduce" in untried(results) and "collectives on more than 2 ranks" in untried(results)


@pytest.mark.parametrize("refused", ["all-reduce, bfloat16", "all-to-all"])
def test_one_collective_or_one_dtype_that_is_refused_leaves_nothing_open(refused: str) -> None:
    results = refusing(refused)
    assert verdict_of(results, None, 0.99).verdict == "train"
    assert {result.outcome for result in results if result.subject.startswith(refused)} == {"told"}
    assert untried(results) == "collectives on more than 2 ranks"


def test_a_collective_that_only_one_rank_refuses_fails() -> None:
    found = of(judged(ended(said("ran", 0)), ended(said("refused", 1, reason="no"))), "all-to-all, float32")
    assert found.outcome == "failed" and "rank 1: it was refused, though not on all ranks (no)" in found.summary


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        ({"wrong": 3}, "wrong elements 3"),
        ({"repeats": False}, "cases that do not repeat 1"),
        ({"digest": "other"}, "cases in which ranks differ 1"),
    ],
)
def test_wrong_unrepeated_and_unlike_results_rule_training_out(changes: dict[str, Any], measure: str) -> None:
    ends = [ended(said("ran", 0, digest="same")), ended(said("ran", 1, **({"digest": "same"} | changes)))]
    found = of(judged(*ends), "all-to-all, float32")
    assert (found.outcome, found.rules_out) == ("failed", "train")
    assert measure in found.summary and "first in all-to-all, float32, 7 elements" in found.summary


def test_a_sum_beyond_its_bound_is_wrong_by_its_measure() -> None:
    report = said("ran", subject="all-reduce, float32", wrong=1, error=1e-3, bound=2e-7)
    found = of(judged(ended(report)), "all-reduce, float32")
    assert found.outcome == "failed" and "largest error of a sum 0.001" in found.summary


def test_a_rank_that_died_is_a_finding_with_its_last_words() -> None:
    found = of(judged(ended(said("begun"), exit_code=-11, words="Segmentation fault")), "processes")
    assert found.outcome == "failed" and "exit code -11: Segmentation fault" in found.summary


def test_waiting_for_a_rank_that_stays_away_on_purpose_is_told_and_no_hang() -> None:
    waiting = said("begun", subject=ABSENT, name=ABSENT)
    results = judged(ended(waiting, exit_code=-9, killed=True))
    assert of(results, "processes").outcome == "passed"
    assert of(results, ABSENT).outcome == "told" and "still waited when it was killed" in of(results, ABSENT).summary


def test_a_chip_with_too_few_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "number_of_devices", lambda name: 1)
    (found,) = probe_collectives("cpu", ranks=4)
    assert (found.outcome, found.rules_out) == ("told", "neither")
    assert "need 4 devices and cpu has 1 here: not tried" in found.summary


# ---- collectives: real processes


def wrong_script(tmp_path: Path, fault: str) -> str:
    path = tmp_path / "script.toml"
    path.write_text(f'summary = "a test"\n[[faults]]\n{fault}\n')
    return str(path)


@pytest.mark.slow
def test_two_real_ranks_of_a_cpu_move_and_add_right() -> None:
    results = probe_collectives("cpu")
    assert {result.subject.split(",")[0] for result in results} == {*cases.COLLECTIVES, ABSENT, "processes"}
    assert {result.outcome for result in results if result.subject != ABSENT} == {"passed"}
    absent = of(results, ABSENT)
    assert absent.outcome == "told" and re.search(r"raised an error after [\d.]+ s", absent.summary)


@pytest.mark.slow
def test_fewer_devices_than_were_asked_for_are_tried_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "number_of_devices", lambda name: 2)
    results = probe_collectives("cpu", ranks=4)
    assert "need 4 devices and cpu has 2 here: tried on 2" in of(results, "devices").summary
    assert "on 2 ranks" in of(results, "all-reduce, float32").summary


@pytest.mark.slow
def test_an_emulated_chip_is_tried_in_its_compute_dtype_too_and_timed_if_wanted() -> None:
    results = probe_collectives("emulated:h800", ranks=3, bandwidth=True)
    assert of(results, "all-reduce, bfloat16").outcome == "passed"
    assert of(results, "all-to-all, float32").outcome == "passed"
    for collective in ("all-reduce", "all-gather"):
        rate = of(results, f"{collective} of 64 MiB, 3 ranks")
        assert (rate.probe, rate.outcome, rate.rules_out) == ("speed", "told", "neither")
        assert re.search(r"^bus bandwidth [\d.e+-]+ GB/s \(spread", rate.summary)


@pytest.mark.slow
def test_one_device_that_computes_sums_wrong_is_found(tmp_path: Path) -> None:
    fault = 'kind = "wrong-collective"\nerror = "missing-rank"\nstrength = 0.1\ndevice = 1'
    results = probe_collectives("emulated:exact", faults=wrong_script(tmp_path, fault))
    for collective in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        found = of(results, f"{collective}, float32")
        assert (found.outcome, found.rules_out) == ("failed", "train"), collective
    assert "cases in which ranks differ" in of(results, "all-reduce, float32").summary
    assert of(results, "broadcast, float32").outcome == "passed"


@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_in_time_and_reported(tmp_path: Path) -> None:
    fault = 'kind = "collective-timeout"\nseconds = 6000\ndevice = 1'
    results = probe_collectives("emulated:ascend-910b", faults=wrong_script(tmp_path, fault), time_out_seconds=30)
    found = of(results, "processes")
    assert (found.outcome, found.rules_out) == ("failed", "train")
    assert "Killed after 30 s without returning" in found.summary and "rank 1 in all-reduce" in found.summary
    assert of(results, "all-reduce, float32").outcome == "failed"


@pytest.mark.slow
def test_an_error_that_the_chip_reports_is_told_in_its_words(tmp_path: Path) -> None:
    results = probe_collectives(
        "emulated:ascend-910b", faults=wrong_script(tmp_path, 'kind = "collective-timeout"\ndevice = 1')
    )
    found = of(results, "all-reduce, float32")
    assert found.outcome == "failed" and "rank 1: the chip reported an error" in found.summary
    assert "Rank 1 ended with exit code 1" in of(results, "processes").summary


@pytest.mark.slow
def test_a_backend_without_a_collective_goes_on_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking_rank.py").write_text(
        "import torch.distributed as dist\n"
        "from beringia.qualify.hardware.rank_work import work\n"
        "def lacking(*args, **kwargs):\n"
        "    raise RuntimeError('This backend does not support alltoall')\n"
        "dist.all_to_all_single = lacking\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(collectives, "RANK_WORK", "lacking_rank")
    results = probe_collectives("cpu")
    assert of(results, "all-to-all, float32").outcome == "told"
    assert of(results, "broadcast, float32").outcome == "passed"


@pytest.mark.slow
def test_a_chip_that_is_not_here_is_the_users_mistake() -> None:
    with pytest.raises(ChipUnavailable, match="h801"):
        probe_collectives("emulated:h801")


# ---- soak


class Ticking:
    """A second passes between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def scripted(*results: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
    waiting = iter(results)
    return lambda: {"sum": next(waiting), "other": torch.ones(3)}


def test_repetitions_that_agree_pass_with_an_upper_limit() -> None:
    right = torch.tensor([1.0, float("nan"), -0.0])
    found = probe_soak(scripted(*[right] * 40), 30, Ticking())
    assert (found.outcome, found.rules_out) == ("passed", "train")
    count = int(re.match(r"(\d+) repetitions", found.summary).group(1))  # type: ignore[union-attr]
    assert 28 <= count <= 31
    assert f"at most {1 - 0.05 ** (1 / count):.2g} of repetitions differ" in found.summary


def test_the_majority_decides_even_against_the_first_repetition() -> None:
    right, wrong = torch.zeros(5), torch.tensor([0.0, 0.0, 2.0**-149, 0.0, 1.0])
    found = probe_soak(scripted(wrong, *[right] * 40), 30, Ticking())
    assert found.outcome == "failed" and found.measures[0].value == 1
    assert "1 differ from the majority" in found.summary
    assert "Differing: sum in up to 2 of 5 elements." in found.summary


def test_a_computation_that_never_repeats_has_no_majority() -> None:
    found = probe_soak(scripted(*(torch.tensor([float(n)]) for n in range(40))), 30, Ticking())
    assert found.outcome == "failed" and "no result has a majority" in found.summary


def test_at_least_two_repetitions_are_compared() -> None:
    assert probe_soak(scripted(torch.zeros(1), torch.ones(1)), 0, Ticking()).outcome == "failed"


def test_a_sign_of_zero_is_a_silent_difference() -> None:
    assert differing_elements(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1


@pytest.mark.parametrize(("seen", "total"), [(0, 100), (1, 100), (7, 20)])
def test_the_upper_limit_is_the_rate_at_which_so_few_are_seen_once_in_twenty(seen: int, total: int) -> None:
    assert stats.binom.cdf(seen, total, highest_rate(seen, total)) == pytest.approx(0.05)
    assert highest_rate(0, 1000) == pytest.approx(3 / 1000, rel=5e-3)
    assert highest_rate(4, 4) == 1.0


def test_a_load_of_matrices_repeats_bit_by_bit_on_a_sound_chip(chip: Chip, quick: None) -> None:
    load = matrix_load(chip, seed=3)
    assert all(tensor.isfinite().all() for tensor in load().values())
    assert probe_soak(load, 0.5).outcome == "passed"


def test_one_flipped_bit_in_one_product_under_load_is_found(tmp_path: Path, quick: None) -> None:
    script = wrong_script(tmp_path, 'kind = "bit-flip"\ntarget = "activations"\nsites = [30]\nbits = [12, 12]')
    chip = open_chip("emulated:exact", faults=script)
    load = matrix_load(chip, seed=3)
    chip.begin_step(1)
    found = probe_soak(load, 1.0)
    chip.close()
    assert found.outcome == "failed" and found.measures[0].value == 1
    assert "products in up to" in found.summary
