"""Does a chip compute the same bits again and again under load: silent errors, counted.

A deterministic computation is repeated for a stated time and the bits of its results are hashed on the host. The
majority of the repetitions decides which result is right; the first one may be the wrong one. An error that strikes
every repetition alike cannot be seen here: comparing with float64 is other probes' business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from scipy import special

from beringia.chips.chip import Chip
from beringia.errors import ChipUnavailable
from beringia.numerics.state_hash import hash_tensor
from beringia.qualify.attempts import RefusedAttempt
from beringia.qualify.exact_measures import none_allowed
from beringia.qualify.hardware.rates import square_size
from beringia.records.certificate import ProbeResult

RunOnce = Callable[[], dict[str, torch.Tensor]]
Digest = tuple[tuple[str, int], ...]

CONFIDENCE = 0.95
_KEPT_RESULTS = 4
"""Differing results whose tensors are kept for comparison; of further ones only the hash is."""
_LOAD_PRODUCTS = 8
"""Products of a load between two transfers to the host, which idle the units."""
_LOAD_CALL_SECONDS = 0.05


@dataclass
class Repetitions:
    """What the repetitions gave."""

    counts: Counter[Digest] = field(default_factory=Counter)
    kept: dict[Digest, dict[str, torch.Tensor]] = field(default_factory=dict)
    """On the CPU, of the first few distinct results."""

    def add(self, results: Mapping[str, torch.Tensor]) -> None:
        """Count one repetition."""
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in results.items()}
        digest = tuple((name, hash_tensor(tensor, name)) for name, tensor in sorted(host.items()))
        self.counts[digest] += 1
        if digest in self.kept or len(self.kept) < _KEPT_RESULTS:
            self.kept.setdefault(digest, {name: tensor.clone() for name, tensor in host.items()})

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def right(self) -> tuple[Digest, int]:
        """The result that most repetitions have, and how many."""
        return self.counts.most_common(1)[0]

    @property
    def differing(self) -> int:
        return self.total - self.right[1]


def probe_soak(
    run_once: RunOnce, seconds: float, clock: Callable[[], float] = time.monotonic, *, subject: str = "repetitions"
) -> ProbeResult:
    """Repeat `run_once` for so many seconds, at least twice, and compare the bits of all that it returned."""
    began, repetitions = clock(), Repetitions()
    while repetitions.total < 2 or clock() - began < seconds:
        repetitions.add(run_once())
    differing, total = repetitions.differing, repetitions.total
    measure = none_allowed(
        "repetitions that differ", differing, "the same computation with the same inputs has the same bits"
    )
    return ProbeResult(
        probe="soak",
        subject=subject,
        outcome="failed" if differing else "passed",
        rules_out="train",
        summary=_of_differences(repetitions) if differing else _of_none(total),
        measures=(measure,),
        seconds=clock() - began,
    )


def highest_rate(differing: int, total: int) -> float:
    """Upper limit of the share of repetitions that differ, one-sided at 95 % (Clopper and Pearson 1934).

    With none seen it is 1 - 0.05^(1/n), about 3/n ("rule of three").
    """
    return 1.0 if differing == total else float(special.betaincinv(differing + 1, total - differing, CONFIDENCE))


def matrix_load(chip: Chip, seed: int) -> RunOnce:
    """Products, elementwise functions and reductions that keep the units busy; inputs come from the CPU.

    Raises ChipUnavailable where the chip multiplies no matrices of its compute dtype.
    """
    dtype = chip.capabilities.compute_dtype
    size = square_size(chip, dtype, _LOAD_CALL_SECONDS)
    if isinstance(size, RefusedAttempt):
        raise ChipUnavailable(f"{chip.name} multiplies no matrices of {dtype}: {size.reason}.")
    generator = torch.Generator().manual_seed(seed)
    x_NN, weight_NN = (torch.randn(size, size, generator=generator).to(dtype).to(chip.device) for _ in range(2))
    # Rows keep their size from product to product.
    weight_NN = weight_NN * size**-0.5

    def run_once() -> dict[str, torch.Tensor]:
        h_NN = x_NN
        for _ in range(_LOAD_PRODUCTS):
            h_NN = torch.mm(h_NN, weight_NN)
        activation_NN = F.silu(h_NN) * torch.sigmoid(x_NN)
        weights_NN = torch.softmax(h_NN.float(), dim=-1)
        return {
            "products": h_NN,
            "elementwise": activation_NN,
            "softmax": weights_NN,
            "sums of rows": h_NN.float().square().sum(-1),
            "sums of columns": activation_NN.float().sum(0),
        }

    return run_once


def _of_none(total: int) -> str:
    return (
        f"{total} repetitions gave the same bits; at most {highest_rate(0, total):.2g} of repetitions differ, "
        f"with {CONFIDENCE:.0%} confidence."
    )


def _of_differences(repetitions: Repetitions) -> str:
    right, agreeing = repetitions.right
    total, differing = repetitions.total, repetitions.differing
    limit = f"at most {highest_rate(differing, total):.2g} with {CONFIDENCE:.0%} confidence"
    if agreeing * 2 <= total:
        known = (
            f"no result has a majority (the most frequent came {agreeing} times), so the computation does not repeat"
        )
    else:
        known = f"{differing} differ from the majority"
    return f"Of {total} repetitions {known} ({differing / total:.2g} of them, {limit}). {_elements(repetitions, right)}"


def _elements(repetitions: Repetitions, right: Digest) -> str:
    """Which tensors differed, and the most elements in one repetition, among the results that were kept."""
    wanted = repetitions.kept.get(right)
    others = [kept for digest, kept in repetitions.kept.items() if digest != right]
    if wanted is None or not others:
        names = sorted({name for digest in repetitions.counts for name, _ in set(digest) - set(right)})
        return f"Tensors that differ: {', '.join(names)}."
    parts = []
    for name, tensor in wanted.items():
        counts = [differing_elements(other[name], tensor) for other in others]
        if any(counts):
            parts.append(f"{name} in up to {max(counts)} of {tensor.numel()} elements")
    return f"Differing: {', '.join(parts)}."


def differing_elements(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """Elements with other bits; NaNs of equal bits are equal."""
    size = wanted.element_size()
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8).view(-1, size) for tensor in (found, wanted)]
    return int((bits[0] != bits[1]).any(-1).sum())
