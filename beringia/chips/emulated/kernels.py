"""A profile's arithmetic as kernels: what each operator computes from CPU tensors.

Products go through the matrix unit (`products.py`), elementary functions carry the profile's error, sums its order,
casts its rounding, and results its treatment of subnormals and overflow. Operators that are exact on every chip
(copies, integers, comparisons) and those that are correctly rounded on all of them (add, multiply, divide, square root)
have no kernel here and stay ATen's own.

Attention is one operator, as on hardware: its two products go through the matrix unit, its softmax is float32.
Refuses what would be computed outside the emulated unit without anyone noticing (convolutions, fused recurrent cells).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.arithmetic.products import Fidelity, Products, grouped
from beringia.chips.arithmetic.profile import Profile
from beringia.chips.arithmetic.reductions import Reduce
from beringia.chips.arithmetic.rounding import flush_subnormals_, perturb_, round_fraction_, saturate_
from beringia.chips.emulated.attention import Attention, CastTo
from beringia.chips.emulated.device import Interposer, Kernel

aten = torch.ops.aten

CAST_BITS = {torch.bfloat16: 7, torch.float16: 10}
"""Fraction bits of the formats that float32 is cast to."""

ELEMENTARY: dict[str, str] = {
    **{name: name for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "rsqrt", "erf", "erfc")},
    **{name: name for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "atanh")},
    **{name: name for name in ("sigmoid", "silu", "gelu", "softplus", "mish")},
    "silu_backward": "sigmoid",
    "gelu_backward": "gelu",
    "softplus_backward": "exp",
    "_softmax": "exp",
    "_log_softmax": "log",
}
"""Operator -> the function whose error it has."""

_KEYED_BY_SECOND = {"silu_backward", "gelu_backward", "softplus_backward"}
"""Operators of (gradient, argument): the argument decides the error."""

_EXACT_POWERS = (0, 0.5, 1, 2, 3, -1, -2)

_REFUSED = (
    "convolution",
    "convolution_backward",
    "_convolution",
    "convolution_overrideable",
    "convolution_backward_overrideable",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "_cdist_forward",
    "_trilinear",
    "_weight_int8pack_mm",
    "_addmm_activation",
)


def kernels_of(profile: Profile, fidelity: Fidelity = "fast") -> dict[OpOverload, Kernel]:
    """The kernels of a profile, by operator. Raises ChipUnavailable where its products cannot be made so exactly."""
    if profile.arithmetic == "native":
        return dict(Attention(Products(profile), _exact_exp, native=True).kernels())
    products = Products(profile, fidelity)
    cast = Cast(profile)
    table: dict[OpOverload, Kernel] = {}
    table |= product_kernels(products, cast)
    table |= Attention(products, _exp_of(profile), cast=cast).kernels()
    table |= _elementary_kernels(profile)
    table |= _sum_kernels(Reduce(profile.reduction), cast)
    table[aten.native_layer_norm_backward.default] = _layer_norm_backward(cast)
    table |= _cast_kernels(profile, cast)
    table |= {overload: _refused(profile, overload) for name in _REFUSED for overload in _overloads(name)}
    return table


def results_of(profile: Profile) -> list[Interposer]:
    """Interposers for what happens to every floating result: subnormals flushed, overflow saturated."""
    interposers: list[Interposer] = []
    if profile.subnormals.mode == "flushed":
        interposers.append(_on_every_result(flush_subnormals_))
    if profile.overflow.mode == "saturate":
        interposers.append(_on_every_result(saturate_))
    return interposers


class Cast:
    """Float32 to another format, with the profile's rounding."""

    def __init__(self, profile: Profile) -> None:
        self._rounding = profile.casts.rounding

    def __call__(self, number: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype == number.dtype:
            return number
        if self._rounding != "nearest-even" and number.dtype == torch.float32 and dtype in CAST_BITS:
            # float16 has fewer exponents: its subnormals keep fewer bits and take the CPU's rounding.
            number = round_fraction_(number.clone(), CAST_BITS[dtype], self._rounding)
        return number.to(dtype)


# ---- products


def product_kernels(
    products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], cast: CastTo
) -> dict[OpOverload, Kernel]:
    """Every operator that is a matrix product, from a matrix unit's wide accumulators and a cast to the result."""

    def matrix(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return cast(products(a, b), kwargs.get("out_dtype") or a.dtype)

    def matrix_dtype(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return cast(products(a, b), out_dtype)

    def added(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
        total = products(a, b)
        if alpha != 1:
            total = total * alpha
        if beta != 0:
            # The epilogue of a matrix product adds in float32 and rounds once.
            total = total + (c if beta == 1 else c * beta)
        return cast(total, a.dtype)

    def added_batches(
        c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        joined = a.transpose(0, 1).flatten(1), b.flatten(0, 1)
        return added(c, *joined, beta=beta, alpha=alpha)

    def vector(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return cast(products(a, b.unsqueeze(-1)).squeeze(-1), a.dtype)

    def added_vector(
        c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        return added(c.unsqueeze(-1), a, b.unsqueeze(-1), beta=beta, alpha=alpha).squeeze(-1)

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return cast(products(a.unsqueeze(0), b.unsqueeze(-1)).reshape(()), a.dtype)

    def groups(
        a: torch.Tensor,
        b: torch.Tensor,
        offs: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        total = grouped(products, a, b, offs)
        return cast(total if bias is None else total + bias, out_dtype or a.dtype)

    def scaled(
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale_result: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        total = products(a, b) * scale_a * scale_b
        total = total if bias is None else total + bias
        return cast(total if scale_result is None else total * scale_result, out_dtype or a.dtype)

    return {
        aten.mm.default: matrix,
        aten.mm.out: _into_out(matrix),
        aten.mm.dtype: matrix_dtype,
        aten.bmm.default: matrix,
        aten.bmm.out: _into_out(matrix),
        aten.bmm.dtype: matrix_dtype,
        aten.addmm.default: added,
        aten.addmm.out: _into_out(added),
        aten.addmm_.default: _into_first(added),
        aten.baddbmm.default: added,
        aten.baddbmm.out: _into_out(added),
        aten.baddbmm_.default: _into_first(added),
        aten.addbmm.default: added_batches,
        aten.addbmm_.default: _into_first(added_batches),
        aten.mv.default: vector,
        aten.addmv.default: added_vector,
        aten.addmv_.default: _into_first(added_vector),
        aten.dot.default: dot,
        aten.vdot.default: lambda a, b: dot(a.conj(), b),
        aten._grouped_mm.default: groups,
        aten._scaled_mm.default: scaled,
    }


def _into_out(kernel: Kernel) -> Kernel:
    def write(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = kernel(*args, **kwargs)
        return out.resize_(result.shape).copy_(result)

    return write


def _into_first(kernel: Kernel) -> Kernel:
    def write(first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return first.copy_(kernel(first, *args, **kwargs))

    return write


def _refused(profile: Profile, func: OpOverload) -> Kernel:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{func} is not emulated: {profile.part}'s matrix unit would be left out of it without notice. "
            "Express it as matrix products, or run it on another chip."
        )

    return refuse


# ---- elementary functions


def _elementary_kernels(profile: Profile) -> dict[OpOverload, Kernel]:
    table: dict[OpOverload, Kernel] = {}
    for name, function in ELEMENTARY.items():
        ulps = profile.elementary.of(function)
        for overload in _overloads(name) if ulps else []:
            if not overload._schema.is_mutable:
                table[overload] = _elementary(overload, ulps, key=1 if name in _KEYED_BY_SECOND else 0)
        for overload in _overloads(f"{name}_") if ulps else []:
            table[overload] = _elementary_in_place(overload, ulps)
    return table


def _elementary(func: OpOverload, ulps: int, key: int) -> Kernel:
    def compute(*args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        argument = args[key]
        # A narrower result rounds away an error of a few float32 ULP but for one case in 2**14: not worth its cost.
        if result.dtype == torch.float32 and _same_kind(argument, result) and not _is_exact_power(func, args):
            perturb_(result, argument, ulps)
        return result

    return compute


def _same_kind(argument: Any, result: torch.Tensor) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype == result.dtype and argument.shape == result.shape


def _is_exact_power(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Powers that kernels make of multiplications, a division or a square root."""
    return func.overloadpacket in (aten.pow, aten.pow_) and args[1] in _EXACT_POWERS


def _elementary_in_place(func: OpOverload, ulps: int) -> Kernel:
    def compute(target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        changes = target.dtype == torch.float32 and not _is_exact_power(func, (target, *args))
        argument = target.clone() if changes else None
        func(target, *args, **kwargs)
        return target if argument is None else perturb_(target, argument, ulps)

    return compute


def _exp_of(profile: Profile) -> Callable[[torch.Tensor], torch.Tensor]:
    ulps = profile.elementary.of("exp")
    return (lambda x: perturb_(torch.exp(x), x, ulps)) if ulps else _exact_exp


def _exact_exp(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x)


# ---- sums, casts, results


def _sum_kernels(reduce: Reduce, cast: Cast) -> dict[OpOverload, Kernel]:
    if reduce.native:
        return {}

    def total(func: OpOverload, *, average: bool) -> Kernel:
        def compute(
            x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
        ) -> torch.Tensor:
            if x.dtype not in _RESULTS or dtype not in (None, x.dtype, torch.float32):
                exact: torch.Tensor = func(x, dim, keepdim, dtype=dtype)
                return exact
            summed, count = reduce(x.float(), dim, keepdim)
            return cast(summed / count if average else summed, dtype or x.dtype)

        return compute

    def whole(kernel: Kernel) -> Kernel:
        return lambda x, *, dtype=None: kernel(x, None, False, dtype=dtype)

    sum_by_dim = total(aten.sum.dim_IntList, average=False)
    mean_by_dim = total(aten.mean.dim, average=True)
    return {
        aten.sum.dim_IntList: sum_by_dim,
        aten.mean.dim: mean_by_dim,
        aten.sum.default: whole(sum_by_dim),
        aten.mean.default: whole(mean_by_dim),
    }


def _layer_norm_backward(cast: Cast) -> Kernel:
    """Sums over rows in float32, as on hardware: torch's kernel on the CPU makes them in the dtype of the result, and
    over 4,096 rows in bfloat16 is off by 8 %."""
    narrow = aten.native_layer_norm_backward.default

    def compute(
        grad: torch.Tensor,
        x: torch.Tensor,
        shape: list[int],
        mean: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        output_mask: list[bool],
    ) -> Any:
        if x.dtype not in CAST_BITS:
            return narrow(grad, x, shape, mean, rstd, weight, bias, output_mask)
        wide = [None if one is None else one.float() for one in (grad, x, mean, rstd, weight, bias)]
        results = narrow(*wide[:2], shape, *wide[2:], output_mask)
        return tuple(
            None if one is None else cast(one, x.dtype if of is None else of.dtype)
            for one, of in zip(results, (x, weight, bias), strict=True)
        )

    return compute


def _cast_kernels(profile: Profile, cast: Cast) -> dict[OpOverload, Kernel]:
    if profile.casts.rounding == "nearest-even":
        return {}

    def to_copy(x: torch.Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        narrowed = cast(x, dtype) if dtype is not None else x
        return aten._to_copy.default(narrowed, dtype=dtype, **kwargs)  # type: ignore[no-any-return]

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return target.copy_(cast(source, target.dtype))

    return {aten._to_copy.default: to_copy, aten.copy_.default: copy_}


def _on_every_result(change_: Callable[[torch.Tensor], torch.Tensor]) -> Interposer:
    def interpose(func: OpOverload, kernel: Kernel) -> Kernel:
        if func in _MOVES or func.namespace != "aten" or func.is_view:
            return kernel

        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            changed = args[0] if result is None and args else result
            for tensor in changed if isinstance(changed, list | tuple) else (changed,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype in _RESULTS:
                    change_(tensor)
            return result

        return compute

    return interpose


_RESULTS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MOVES = frozenset(
    {
        aten.copy_.default,
        aten._copy_from.default,
        aten.clone.default,
        aten.detach.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        # Masks are filled with infinities: a constant is stored, not computed.
        aten.fill_.Scalar,
        aten.masked_fill.Scalar,
        aten.masked_fill_.Scalar,
        aten.full_like.default,
        aten.new_full.default,
    }
)
"""Operators that move numbers and compute none."""


def _overloads(name: str) -> list[OpOverload]:
    packet = getattr(aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
