"""How far a tensor is from its reference: relative error, largest error, and gain, the part of the error with a sign.

And the floors below which no error is held against a chip, from unit roundoff and reduction length. Everything here
is a pure function of tensors on one device; callers bring both to the CPU and to the reference's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of one rounding to nearest (Higham, Accuracy and Stability, section 2.1); truncation:
twice."""

ELEMENTARY_ULPS = 4
"""Of roots, quotients, exponentials and logarithms: within 2 ulp on every chip whose figures are published (LLVM libc's
GPU conformance table); twice that for those whose are not."""

SMALLEST_BLOCK_TERMS = 4
"""Fewest products that a matrix unit adds before it rounds its accumulator (V100, A100 in tf32: arXiv 2511.10909)."""


@dataclass(frozen=True)
class Difference:
    """What separates a tensor from its reference. All three are dimensionless, and NaN where an element is not
    finite."""

    relative: float
    """Frobenius norm of the error over that of the reference."""
    largest: float
    """Largest error of one element over the root mean square of the reference."""
    gain: float
    """Sum of error times sign of the reference, over the sum of magnitudes: 0.01 is one per cent too large throughout.
    Errors of rounding to nearest cancel in it, those of truncation and of a wrong factor add up."""


def difference(found: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Compare two tensors of one shape; computed in the reference's dtype. An all-zero reference counts as 1."""
    error = found.to(reference.dtype) - reference
    size = math.sqrt(max(1, reference.numel()))
    # One transfer of five numbers; the norms reuse no temporaries larger than the error itself.
    error_norm, norm, largest, signed, magnitude = torch.stack(
        (
            torch.linalg.vector_norm(error),
            torch.linalg.vector_norm(reference),
            torch.linalg.vector_norm(error, math.inf),
            torch.dot(error.flatten(), reference.sign().flatten()),
            torch.linalg.vector_norm(reference, 1),
        )
    ).tolist()
    scale, total = norm or size, magnitude or size * size
    values = (error_norm / scale, largest * size / scale, signed / total)
    return Difference(*values) if all(map(math.isfinite, values)) else Difference(math.nan, math.nan, math.nan)


def independent_rows(reference: torch.Tensor) -> float:
    """Over how many rows the magnitude of a tensor is spread: (sum of row norms)^2 / sum of their squares, at least 1.

    Errors within a row share factors (a norm's scale, a softmax's denominator), those of different rows do not, so a
    mean over the tensor has the spread of a mean over this many values.
    """
    return _spread_over(torch.linalg.vector_norm(reference.flatten(0, -2), dim=-1))


def unlike_rows(reference: torch.Tensor) -> float:
    """`independent_rows` where rows with the same bits, whose errors are the same, are one row; of float64."""
    rows = reference.flatten(0, -2).contiguous()
    odd = 2 * torch.arange(rows.shape[-1], dtype=torch.int64).square_() + 0x9E3779B97F4A7C1
    bits = rows.view(torch.int64)
    hashes = ((bits ^ (bits >> 29)) * odd).sum(-1)  # integers wrap around: in whatever order they are added
    _, place = hashes.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # untyped in torch
    norms = torch.linalg.vector_norm(rows, dim=-1)
    return _spread_over(norms.new_zeros(int(place.max()) + 1).index_add_(0, place, norms))


def _spread_over(sizes: torch.Tensor) -> float:
    total, squares = sizes.sum().item(), sizes.square().sum().item()
    return max(1.0, total * total / squares) if squares > 0 else 1.0


def accumulation_floor(length: int, accumulator: torch.dtype = torch.float32) -> float:
    """Relative error that adding up `length` products may cost on a sound matrix unit.

    The worst known arithmetic truncates (2u) once per block of `SMALLEST_BLOCK_TERMS` terms. Each truncation costs at
    most 2u of the partial sum, and partial sums are at most as large as the result where terms share a sign (in root
    mean square also where they do not: a random walk grows to its end), so n / b blocks cost n / b * 2u. Rounding to
    nearest costs less, u times the square root of n (Higham and Mary 2019).
    """
    return math.ceil(length / SMALLEST_BLOCK_TERMS) * 2.0 * UNIT_ROUNDOFF[accumulator]


def reduction_floor(length: int, accumulator: torch.dtype = torch.float32) -> float:
    """Relative error, to the sum of magnitudes, that adding up `length` terms may cost in vector units.

    Those of all chips add in lanes, threads and blocks of threads, so a sum of n is one of at least sqrt(n) partial
    sums of at most sqrt(n) terms: 2 sqrt(n) additions follow one another, and each costs at most 2u of a partial sum
    (Higham, Accuracy and Stability, section 4.2).
    """
    return 2.0 * math.sqrt(length) * 2.0 * UNIT_ROUNDOFF[accumulator]


def rounding_floor(dtype: torch.dtype) -> float:
    """Relative error of storing a result in `dtype`, rounded in whatever direction."""
    return 2.0 * UNIT_ROUNDOFF[dtype]


def few(numbers: float) -> float:
    """Times what it should be, the root mean square of so many independent errors may be: chi-square's tail of one in
    10^4 (Laurent and Massart 2000: n + 2 sqrt(n x) + 2 x, with x = 9)."""
    return math.sqrt(1.0 + 6.0 / math.sqrt(numbers) + 18.0 / numbers)
