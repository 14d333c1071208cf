"""Probes of integers, of indices and of multiply-and-add: sound chips pass, each kind of wrong kernel is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from wrong_kernels import emulated_with

from beringia.chips.cpu import Cpu
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable
from beringia.processes.command import Command
from beringia.qualify.arithmetic import index_work, indices
from beringia.qualify.arithmetic.index_work import CASES, IndexOrder, IndexReport
from beringia.qualify.arithmetic.indices import probe_indices
from beringia.qualify.arithmetic.integers import probe_integers
from beringia.qualify.arithmetic.multiply_add import numbers_for, probe_multiply_add, rounding_of
from beringia.qualify.arithmetic.transfers import probe_transfers
from beringia.records.certificate import ProbeResult

aten = torch.ops.aten


def of(results: list[ProbeResult], subject: str) -> ProbeResult:
    return next(result for result in results if result.subject == subject)


# ---- integers


@pytest.mark.parametrize("name", ["cpu", "emulated:h800"])
def test_integers_of_sound_chips_are_as_defined(name: str) -> None:
    chip = open_chip(name)
    results = probe_integers(chip)
    chip.close()
    assert {result.outcome for result in results} == {"passed", "told"}
    for result in results:
        assert "efused" not in result.summary, result.summary
        assert (result.outcome == "told") == ("not defined" in result.subject or "past" in result.subject
                                              or "equal numbers" in result.subject)  # fmt: skip
    assert sum(result.outcome == "passed" for result in results) == 7


def to_copy_rounding(x: torch.Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    """Casts to integers that round to nearest instead of toward zero."""
    to_integer = dtype is not None and not dtype.is_floating_point and x.is_floating_point()
    return aten._to_copy.default(x.round() if to_integer else x, dtype=dtype, **options)  # type: ignore[no-any-return]


def to_copy_through_float32(x: torch.Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    narrow = x.float() if dtype == torch.float64 and x.dtype == torch.int64 else x
    return aten._to_copy.default(narrow, dtype=dtype, **options)  # type: ignore[no-any-return]


def add_through_float64(a: torch.Tensor, b: torch.Tensor | int, *, alpha: int = 1) -> torch.Tensor:
    return (a.double() + alpha * b).to(a.dtype)


def add_that_saturates(a: torch.Tensor, b: torch.Tensor | int, *, alpha: int = 1) -> torch.Tensor:
    if a.dtype == torch.int64:
        return a + alpha * b
    limits = torch.iinfo(a.dtype)
    return (a.long() + alpha * b).clamp(limits.min, limits.max).to(a.dtype)


def last_argmax(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.numel() - 1 - torch.argmax(x.flip(0))


def topk_of_one_place(x: torch.Tensor, k: int, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = torch.topk(x, k)
    places[1] = places[0]
    return values, places


WRONG: list[tuple[str, Any, Callable[..., Any], str]] = [
    ("casts to integers", aten._to_copy.default, to_copy_rounding, "int64 of float64 (0.75) is 1, defined as 0"),
    ("casts from integers", aten._to_copy.default, to_copy_through_float32, "float64 of int64 (16777217)"),
    ("numbers beyond 2^53", aten.add.Tensor, add_through_float64, "int64 plus (9007199254740993, 1) is"),
    ("overflow", aten.add.Tensor, add_that_saturates, "int32 plus (2147483647, 1) is 2147483647, defined as -2147"),
    ("division", aten.remainder.Tensor, torch.fmod, "int64 remainder (7, -2) is 1, defined as -1"),
    ("shifts", aten.bitwise_right_shift.Tensor, lambda a, b: (a.abs() >> b) * a.sign(), "right shift (-1, 1) is 0"),
    ("order and sums", aten.argmax.default, last_argmax, "argmax of equal integers"),
    ("order and sums", aten.topk.default, topk_of_one_place, "topk, places once"),
]  # fmt: skip


@pytest.mark.parametrize(("subject", "operator", "kernel", "sentence"), WRONG, ids=[f"{w[0]}-{w[3]}" for w in WRONG])
def test_a_wrong_kernel_fails_its_group_alone_and_rules_both_uses_out(
    subject: str, operator: Any, kernel: Callable[..., Any], sentence: str
) -> None:
    with emulated_with({operator: kernel}) as chip:
        results = probe_integers(chip)
    found = of(results, f"integers: {subject}")
    assert (found.outcome, found.rules_out) == ("failed", "infer")
    assert sentence in found.summary
    assert found.measures[0].used > 1
    failed = {result.subject for result in results if result.outcome == "failed"}
    # An addition or a division by way of float64 is wrong in two groups.
    assert failed <= {found.subject, "integers: overflow", "integers: numbers beyond 2^53"}


def test_what_is_not_defined_is_told_beside_the_cpu_and_never_fails() -> None:
    def as_other_chips(x: torch.Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if dtype == torch.int32 and x.is_floating_point():
            x = x.double().nan_to_num(0.0, torch.inf, -torch.inf).clamp(-(2.0**31), 2.0**31 - 1)
        return aten._to_copy.default(x, dtype=dtype, **options)  # type: ignore[no-any-return]

    with emulated_with({aten._to_copy.default: as_other_chips}) as chip:
        results = probe_integers(chip)
    assert of(results, "integers: casts to integers").outcome == "passed"
    found = of(results, "integers: casts that are not defined")
    assert (found.outcome, found.rules_out) == ("told", "neither")
    assert "int32 of float32 nan inf -inf 2.147484e+09" in found.summary
    assert ": 0 2147483647 -2147483648 2147483647 " in found.summary and "(CPU " in found.summary


def test_an_operator_that_the_chip_lacks_is_no_wrong_number() -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("bincount is not there")

    with emulated_with({aten.bincount.default: refuse}) as chip:
        found = of(probe_integers(chip), "integers: order and sums")
    assert found.outcome == "passed"
    assert "Refused, so not measured: bincount (NotImplementedError: bincount is not there)" in found.summary


# ---- transfers


def losing_bits_of(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A copy that clears the lowest bits of one kind of numbers."""

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if source.dtype == target.dtype == dtype:
            source = (source.view(torch.int32) & ~0xFFF).view(dtype)
        return target.copy_(source)

    return copy


@pytest.mark.parametrize("name", ["cpu", "emulated:h800"])
def test_transfers_of_sound_chips_keep_their_bits(name: str) -> None:
    chip = open_chip(name)
    results = probe_transfers(chip)
    chip.close()
    assert [result.outcome for result in results] == ["passed", "passed"]
    assert not any("efused" in result.summary for result in results)


def test_a_copy_that_loses_bits_of_floats_leaves_training_open_and_is_no_wrong_cast() -> None:
    with emulated_with({aten.copy_.default: losing_bits_of(torch.float32)}) as chip:
        integers, floats = probe_transfers(chip)
        casts = of(probe_integers(chip), "integers: casts to integers")
    assert integers.outcome == "passed"
    assert (floats.outcome, floats.rules_out) == ("inconclusive", "train")
    assert floats.summary.startswith("Numbers come back as others: 4,09") and "in float32." in floats.summary
    assert casts.outcome == "passed", casts.summary


def test_a_copy_that_changes_token_numbers_rules_both_uses_out() -> None:
    with emulated_with({aten.copy_.default: losing_bits_of(torch.int32)}) as chip:
        integers, floats = probe_transfers(chip)
    assert (integers.outcome, integers.rules_out) == ("failed", "infer")
    assert "in int32" in integers.summary and floats.outcome == "passed"


# ---- indices


def test_a_cpu_refuses_indices_that_do_not_exist() -> None:
    results = probe_indices("cpu")
    assert [result.outcome for result in results] == ["passed"] * 5
    assert "out of range" in of(results, "indices: embedding").summary


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, ValueError, TypeError])
def test_a_chip_refuses_an_index_by_whatever_error_its_plugin_raises(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise kind("no such row")

    monkeypatch.setitem(index_work.READS, "gather", refuse)
    found = index_work.read(Cpu(), "gather: negative")
    assert (found.state, found.text) == ("raised", f"{kind.__name__}: no such row")


def test_a_chip_that_reads_garbage_is_not_fit_for_training(tmp_path: Path) -> None:
    script = tmp_path / "garbage.toml"
    script.write_text('summary = "a test"\n[[faults]]\nkind = "garbage-index"\nbeyond = 64\n')
    results = probe_indices("emulated:exact", faults=str(script))
    for operator in ("embedding", "index_select", "gather", "advanced indexing"):
        found = of(results, f"indices: {operator}")
        assert (found.outcome, found.rules_out) == ("failed", "train")
        assert "one past the end (" in found.summary and "far past the end (" in found.summary
        assert "negative" not in found.summary
        assert found.measures[0].value == 2
    assert of(results, "indices: cross-entropy's target").outcome == "passed"


def test_a_refusal_that_breaks_the_context_is_followed_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []

    def run(command: Command, log: Path, time_out_seconds: float, order: IndexOrder) -> list[IndexReport]:
        started.append(order.cases)
        return [IndexReport(case=order.cases[0], state="raised", text="device-side assert")]

    monkeypatch.setattr(indices, "_run", run)
    assert {result.outcome for result in probe_indices("cpu")} == {"passed"}
    assert [len(left) for left in started] == list(range(len(CASES), 0, -1))


def test_a_process_that_ends_without_an_answer_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Command, log: Path, time_out_seconds: float, order: IndexOrder) -> list[IndexReport]:
        return [IndexReport(case=order.cases[0], state="begun")]

    monkeypatch.setattr(indices, "_run", run)
    found = of(probe_indices("cpu"), "indices: gather")
    assert (found.outcome, found.rules_out) == ("inconclusive", "train")
    assert "one past the end, far past the end, negative" in found.summary


def test_an_unknown_chip_is_the_users_mistake() -> None:
    with pytest.raises(ChipUnavailable, match="h801"):
        probe_indices("emulated:h801")


# ---- multiply and add


def once_and_twice(dtype: torch.dtype) -> tuple[float, float]:
    a, c, left = numbers_for(dtype)
    number, addend = torch.tensor(a, dtype=dtype), torch.tensor(c, dtype=dtype)
    assert (float(number), float(addend)) == (a, c)
    exactly = float(number.double() * number.double() + addend.double()) if dtype != torch.float64 else left
    return exactly, float((number * number) + addend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_tell_one_rounding_from_two(dtype: torch.dtype) -> None:
    exactly, twice = once_and_twice(dtype)
    assert exactly == numbers_for(dtype)[2] != 0
    assert twice == 0.0
    assert rounding_of(torch.tensor([exactly]), dtype) == "rounded once"
    assert rounding_of(torch.tensor([twice, exactly]), dtype).startswith("rounded once in some")
    assert rounding_of(torch.tensor([1.0]), dtype) == "neither (1)"


def test_a_kernel_that_rounds_its_product_first_is_told_so() -> None:
    subject = "multiply and add: addcmul"
    with emulated_with({aten.addcmul.default: lambda c, a, b, *, value=1: c + a * b}) as chip:
        apart = of(probe_multiply_add(chip), subject)
    assert "float32: the product rounded first" in apart.summary
    with emulated_with(
        {aten.addcmul.default: lambda c, a, b, *, value=1: (c.double() + a.double() * b).float()}
    ) as chip:
        fused = of(probe_multiply_add(chip), subject)
    assert "float32: rounded once" in fused.summary
    assert (fused.outcome, fused.rules_out) == ("told", "neither")


def test_two_operators_round_twice_and_a_matrix_unit_once() -> None:
    with emulated_with({}, "h800") as chip:
        results = probe_multiply_add(chip)
    assert (
        "bfloat16: the product rounded first" in of(results, "multiply and add: multiplication, then addition").summary
    )
    assert "bfloat16: rounded once" in of(results, "multiply and add: matrix unit").summary
