"""Matrix products and sums as the chip computed them, each held against its own operands.

For C = A B and a vector z of random signs, C z must be A (B z): three passes over memory instead of a product
(Freivalds 1977). Every element of C takes part, so a wrong tile is seen wherever it lies, and the expected size of
the projected error is the Frobenius norm of the whole error. Only one rounding and one sum lie between operands and
result, so the bound needs no measurement: what storing C costs, and what adding up K products may cost
(`numerics.metrics`).

A sum (the gradient of a norm's weight or of a bias is one, over all rows) is made again in float64, element by element.

A M K, B K N, C M N; `bmm` has a batch dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from beringia.model.layers import precise
from beringia.numerics.metrics import accumulation_floor, reduction_floor, rounding_floor
from beringia.numerics.replay import REFERENCE_DTYPE
from beringia.train.guard.finding import Finding

PROJECTION_ALLOWED = 2.0
"""A projected error is larger than the norm of the error by chance: by a factor of two, for errors spread over 22 rows
or more, less than once in 10^9 (chi-squared with as many degrees of freedom); over eight once in 10^4, and then the
floors are far from reached."""
DETECTOR = "products"

_aten = torch.ops.aten
_SUM = _aten.sum.dim_IntList
_OPERANDS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1}
"""Where the two factors begin among the arguments; `addmm` has what is added before them."""


@dataclass(frozen=True)
class Product:
    """One product that ran on the chip."""

    name: str
    left: torch.Tensor
    right: torch.Tensor
    added: torch.Tensor | None
    result: torch.Tensor


@dataclass(frozen=True)
class Sum:
    """One sum over some dimensions that ran on the chip."""

    name: str
    terms: torch.Tensor
    dims: tuple[int, ...]
    result: torch.Tensor


class ProductLog(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook is untyped
    """Inside, every matrix product and every sum is noted with its operands and result; nothing else changes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.products: list[Product] = []
        self.sums: list[Sum] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        first = _OPERANDS.get(func)
        if first is not None and not kwargs:
            left, right = args[first : first + 2]
            shape = "x".join(map(str, (*left.shape, right.shape[-1])))
            name = f"product {len(self.products)} ({shape})"
            self.products.append(Product(name, left, right, args[0] if first else None, result))
        elif func is _SUM and result.is_floating_point():
            terms, dims = args[0], tuple(args[1] or range(args[0].dim()))
            name = f"sum {len(self.sums)} ({'x'.join(map(str, terms.shape))})"
            self.sums.append(Sum(name, terms, dims, result))
        return result


def judge_product(site: str, product: Product, seed: int) -> Finding:
    """Project one product with random signs drawn from `seed`."""
    # Wider than the products: the projection of a product of one term has errors that all rows share.
    wide = REFERENCE_DTYPE[product.result.dtype]
    left, right, result = (tensor.detach().cpu().to(wide) for tensor in (product.left, product.right, product.result))
    signs = random_signs(right.shape[-1], torch.Generator().manual_seed(seed)).to(wide).unsqueeze(-1)
    expected = left @ (right @ signs)
    if product.added is not None:
        expected = expected + product.added.detach().cpu().to(wide).expand_as(result) @ signs
    error = torch.linalg.vector_norm(result @ signs - expected).item()
    size = torch.linalg.vector_norm(result).item()
    return Finding(
        DETECTOR,
        site,
        product.name,
        error / size if size else error,
        _bound(product, size, _typical_size(left, right)),
        "projected error relative to the product",
    )


def judge_sum(site: str, added: Sum) -> Finding:
    """Add up in float64, and hold each element's error against what adding and storing may cost it."""
    terms, found = added.terms.detach().cpu().to(torch.float64), added.result.detach().cpu().to(torch.float64)
    expected = terms.sum(added.dims).view_as(found)
    length = terms.numel() // max(1, found.numel())
    adding = reduction_floor(length, precise(added.terms.dtype)) * terms.abs().sum(added.dims).view_as(found)
    bound = adding + rounding_floor(added.result.dtype) * expected.abs() + torch.finfo(torch.float32).tiny
    used = ((found - expected).abs() / bound).max().item() if found.numel() else 0.0
    return Finding(DETECTOR, site, added.name, used, 1.0, "largest error of an element over what its roundings allow,")


def random_signs(length: int, generator: torch.Generator) -> torch.Tensor:
    """A vector of 1 and -1, float64."""
    return torch.randint(0, 2, (length,), generator=generator).to(torch.float64).mul_(2.0).sub_(1.0)


def _typical_size(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm that the product of matrices of these norms has where nothing cancels and nothing aligns."""
    norms = float(torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right))
    batches = left.shape[0] if left.dim() == 3 else 1
    return norms / math.sqrt(max(1, left.shape[-1] * batches))


def _bound(product: Product, size: float, typical: float) -> float:
    storing = rounding_floor(product.result.dtype)
    adding = accumulation_floor(product.left.shape[-1], precise(product.result.dtype))
    # Where terms cancel, partial sums are as large as in a product that does not.
    cancelling = max(1.0, typical / size) if size else 1.0
    return PROJECTION_ALLOWED * (storing + adding * cancelling)
