"""How far a sound chip may be from float64 in each operator: elementwise, from unit roundoff and numbers of terms.

A sound chip computes in float32 inside an operator (float64 for float64) and rounds the result once. What it may lose
before that rounding follows from what the operator adds up: for an operator that is linear in its inputs, a rounding a
term times the same operator on magnitudes (Higham, Accuracy and Stability, section 3.1); for elementary functions, the
largest error that any maker documents. An operator that is not known here is measured: the same call on the CPU says
what its roundings cost.

Every rule returns one tensor for each result: the absolute error allowed before the result is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.operators.float64 import Attention, NotKnown, evaluate, in_own_dtypes, to_wide
from beringia.qualify.operators.watch import Call, changed, tensors_in

ELEMENTARY_ULPS = 8.0
"""Largest error of an elementary function in float32, in units in the last place. Documented: CUDA at most 2, HIP at
most 4 (erff, AMD's own document), LLVM's table for both at most 3; some kernels are compositions of two (silu, gelu,
softplus), hence twice the largest."""
ARITHMETIC_ROUNDINGS = 4.0
"""Roundings in one elementwise operator of a few operations (addcmul, lerp): at most one for each of four."""
TRUNCATION = 2.0
"""A truncation costs up to two unit roundoffs, and matrix units truncate."""
TERMS_AT_WORST = 2.0
"""Times a product's terms: units that align a block's products to the largest one cut every term and the accumulator
(V100: 23 bits below the largest exponent, which is up to one bit above the largest product)."""
RANDOM_WALK = 6.0
"""Errors of rounding to nearest add up as a random walk: six standard deviations, less than one in 10^8 sums (Higham
and Mary 2019; Ipsen and Zhou, arXiv 1906.10465). For sums on vector units, which round to nearest on every chip."""
MEASURED_ALLOWED = 4.0
"""Times the CPU's own error where an operator has no rule: as between two sound chips in the guard's replay."""

_F32 = UNIT_ROUNDOFF[torch.float32]

Allowed = list[torch.Tensor]
Rule = Callable[["Operation"], Allowed]


@dataclass(frozen=True)
class Operation:
    """A call and what it should have given."""

    call: Call
    exact: tuple[torch.Tensor, ...]

    @cached_property
    def args(self) -> tuple[Any, ...]:
        """Arguments in float64."""
        wide: tuple[Any, ...] = changed(self.call.args, to_wide)
        return wide

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Arguments given by name, likewise."""
        wide: dict[str, Any] = changed(dict(self.call.kwargs), to_wide)
        return wide

    @property
    def name(self) -> str:
        """Without namespace, overload and the signs of in-place and list forms: `_foreach_add_` is `add`."""
        name: str = self.call.func.overloadpacket.__name__
        return name.removeprefix("_foreach_").rstrip("_")

    def magnitudes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments' magnitudes: floating tensors', and those of the numbers that an operator multiplies with or
        adds (`alpha`, `beta`, `value`; by its schema they are numbers, and sizes and dimensions are not)."""
        declared = self.call.func._schema.arguments
        kinds = {argument.name: str(argument.type) for argument in declared}
        args = zip(self.args, kinds.values(), strict=False)
        kwargs = {name: _magnitude(value, kinds.get(name, "")) for name, value in self.kwargs.items()}
        return tuple(_magnitude(value, kind) for value, kind in args), kwargs

    def on_magnitudes(self, *, finite: bool = False) -> tuple[torch.Tensor, ...]:
        """The operator applied to the magnitudes of its arguments, or of those that are finite."""
        args, kwargs = self.magnitudes()
        if finite:
            args, kwargs = (changed(value, _finite) for value in (args, kwargs))
        return evaluate(self.call.func, args, kwargs)

    def wide(self, place: int) -> torch.Tensor:
        """A tensor argument in float64."""
        tensor = self.args[place]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @cached_property
    def most_hits(self) -> int:
        """For operators that add rows up by index, see `_most_hits`; asked for several times, and long to find."""
        return _most_hits(self)

    @property
    def storing(self) -> float:
        """Unit roundoff of the first floating result; of a complex one, that of its parts."""
        first = next((tensor for tensor in self.call.results if _computed(tensor)), None)
        return 0.0 if first is None else UNIT_ROUNDOFF.get(first.dtype.to_real(), 2.0**-3)

    @property
    def is_complex(self) -> bool:
        """Whether it reads or gives complex numbers."""
        given = tensors_in((self.call.args, dict(self.call.kwargs)))
        return any(tensor.is_complex() for tensor in (*given, *self.exact))


@dataclass(frozen=True)
class Bound:
    """What each result may be off by before it is stored, and why."""

    allowed: Allowed
    basis: str
    terms: int
    """Terms in its longest sum; 1 where it adds nothing up."""
    rounds: bool
    """Whether it computes: an operator that only moves numbers must keep every bit."""
    inner: tuple[torch.Tensor, ...] = ()
    """Results with the roundings that a sound chip makes inside; empty where it makes none but in sums."""
    noise: tuple[torch.Tensor, ...] = ()
    """Root mean square errors of a sound chip's results that these do not show; empty where there are none."""
    storing_noise: tuple[torch.Tensor, ...] = ()
    """And those that they show one draw of."""


def bound_of(call: Call, exact: tuple[torch.Tensor, ...]) -> Bound:
    """The bound of a call whose float64 results are given. Raises NotKnown for complex numbers in an operator whose
    rule knows nothing of them."""
    operation = Operation(call, exact)
    name = operation.name
    if operation.is_complex:
        if name not in _OF_COMPLEX:
            raise NotKnown("how exact it is with complex numbers is not known")
        if name in _ELEMENTARY_OF_COMPLEX:
            return Bound(_elementary(operation), "an elementary function of complex numbers", 1, True)
    if not any(result.dtype.is_floating_point or result.dtype.is_complex for result in call.results):
        return Bound([torch.zeros(()) for _ in exact], "integers are exact", 1, False)
    if name in _MOVES or (name in _CASTS and not _narrows(call)):
        return Bound([torch.zeros(()) for _ in exact], "moves numbers: every bit", 1, False)
    if name in _CASTS:
        return Bound([torch.zeros(()) for _ in exact], "one rounding to the result's dtype", 1, True)
    attention = Attention.of(call)
    if attention is not None:
        return _attention(attention, operation)
    if name in _ADDED_UP:
        return _added_up(operation)
    if name in _BY_INDEX:
        return _added_by_index(operation)
    for names, rule, basis, terms in _RULES:
        if name in names:
            return Bound(rule(operation), basis, terms(operation), True)
    return Bound(_measured(operation), "measured: the same call on the CPU", 1, True)


def _narrows(call: Call) -> bool:
    source = next(tensors_in(call.args[1:] if call.func.overloadpacket.__name__ == "copy_" else call.args), None)
    target = call.results[0]
    return source is not None and source.dtype != target.dtype and target.dtype.to_real() in _FEWER_BITS


_FEWER_BITS = {dtype for dtype in UNIT_ROUNDOFF if dtype != torch.float64}


def _computed(tensor: torch.Tensor) -> bool:
    """Whether it has numbers that are rounded: real or complex ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0) if _computed(tensor) else tensor


def _magnitude(value: Any, kind: str) -> Any:
    """Of an argument whose type in the operator's schema is `kind`."""
    if isinstance(value, list | tuple):
        return type(value)([_magnitude(item, kind) for item in value])
    if isinstance(value, torch.Tensor):
        return value.abs() if _computed(value) else value
    if "number" not in kind or not isinstance(value, int | float | complex) or value == 0:
        return value
    # Below the smallest normal number it is stored no more exactly than that one.
    return max(abs(value), torch.finfo(torch.float32).smallest_normal)


# ---- rules


def _arithmetic(operation: Operation) -> Allowed:
    """Sums and products of a few numbers: roundings of each relative to the magnitudes that meet."""
    args, kwargs = operation.magnitudes()
    combine = _DIFFERENCES.get(operation.name)
    if combine is None:
        sizes = evaluate(operation.call.func, args, {name: kwargs[name] for name in kwargs.keys() & _FACTORS_NAMED})
    else:
        factor = args[2] if len(args) > 2 else kwargs.get("alpha", kwargs.get("weight", 1))
        sizes = tuple(combine(*one) for one in _matched(args[0], args[1], factor))
    return [ARITHMETIC_ROUNDINGS * _F32 * size for size in sizes]


_FACTORS_NAMED = {"alpha", "value"}
_DIFFERENCES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sub": lambda a, b, alpha: a + alpha * b,
    "rsub": lambda a, b, alpha: alpha * a + b,
    "lerp": lambda a, b, weight: a + weight * (a + b),
}
"""What meets in an operator that subtracts, whose own value on magnitudes would cancel."""


def _matched(first: Any, *others: Any) -> list[tuple[Any, ...]]:
    """Arguments of one call each; of an operator on lists, element by element."""
    if not isinstance(first, list | tuple):
        return [(first, *others)]
    spread = [other if isinstance(other, list | tuple) else [other] * len(first) for other in others]
    return list(zip(first, *spread, strict=True))


def _relative(operation: Operation) -> Allowed:
    """Operations whose error is relative to the result."""
    return [ARITHMETIC_ROUNDINGS * _F32 * exact.abs() for exact in operation.exact]


def _elementary(operation: Operation) -> Allowed:
    return [ELEMENTARY_ULPS * 2.0 * _F32 * exact.abs() for exact in operation.exact]


def _gated(operation: Operation) -> Allowed:
    """x times a function of x that may be computed as one minus something: relative to x."""
    x = operation.wide(0)
    return [ELEMENTARY_ULPS * 2.0 * _F32 * (exact.abs() + x.abs()) for exact in operation.exact]


def _gated_backward(operation: Operation) -> Allowed:
    grad, x = operation.wide(0), operation.wide(1)
    return [ELEMENTARY_ULPS * 2.0 * _F32 * (exact.abs() + grad.abs() * (1 + x.abs())) for exact in operation.exact]


def _sigmoid_backward(operation: Operation) -> Allowed:
    """g y (1 - y): one minus y is off by a rounding of one."""
    grad, y = operation.wide(0), operation.wide(1)
    return [2 * ARITHMETIC_ROUNDINGS * _F32 * grad.abs() * y.abs() for _ in operation.exact]


def _added_up(operation: Operation) -> Bound:
    """Linear in its inputs: a random walk of roundings over the terms, relative to the sum of magnitudes.

    The partial sums of N terms whose squares add up to Q^2 are a random walk of sqrt(k / N) Q, so their roundings add
    up to u Q sqrt(N / 6) in root mean square, whatever is left of the terms in the end: where they cancel, as in the
    backward pass of a norm, that is more than any share of the result.
    """
    squares, counts = _squares_and_counts(operation)
    unit = min(operation.storing, _F32)
    noise = [unit * (count.abs() * square.abs() / 6.0).sqrt() for square, count in zip(squares, counts, strict=True)]
    basis = "a rounding a term, as a random walk"
    return Bound(_walked(operation), basis, terms_of(operation), True, noise=tuple(noise))


def _added_by_index(operation: Operation) -> Bound:
    """Sums of rows that are added to what lies in their place, in its own dtype: so do PyTorch's CPU kernels, and
    atomic additions on devices. Their partial sums are also k / N of the whole S, and the roundings of all u sqrt(N
    (Q^2 / 6 + S^2 / 9)). A place that nothing is added to keeps what it has."""
    squares, counts = _squares_and_counts(operation)
    noise = []
    for square, count, exact in zip(squares, counts, operation.exact, strict=True):
        additions = (count - 1.0).clamp_min(0.0)
        noise.append(operation.storing * (additions * (square / 6.0 + exact.abs().square() / 9.0)).sqrt())
    allowed = [inside + RANDOM_WALK * one for inside, one in zip(_walked(operation), noise, strict=True)]
    basis = "a rounding a term, as a random walk, in the dtype of the result"
    return Bound(allowed, basis, terms_of(operation), True, noise=tuple(noise))


def _walked(operation: Operation) -> Allowed:
    roundings = min(float(terms_of(operation)), RANDOM_WALK * math.sqrt(terms_of(operation))) + ARITHMETIC_ROUNDINGS
    return [roundings * _F32 * size.abs() for size in operation.on_magnitudes()]


def _squares_and_counts(operation: Operation) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The operator applied to its terms' squares, and to a one for each of them. Of a mean over N terms these are sums
    divided by N, and their product is that of sums divided by N^2, as it should be."""

    def applied(change: Callable[[torch.Tensor], torch.Tensor], alpha: float) -> tuple[torch.Tensor, ...]:
        args, kwargs = changed(operation.args, change), changed(operation.kwargs, change)
        return evaluate(operation.call.func, args, kwargs | ({"alpha": alpha} if "alpha" in kwargs else {}))

    return applied(_square, operation.kwargs.get("alpha", 1.0) ** 2), applied(_one_each, 1.0)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().square() if _computed(tensor) else tensor


def _one_each(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor.real) if _computed(tensor) else tensor


def _norm(operation: Operation) -> Allowed:
    terms = terms_of(operation)
    roundings = min(float(terms), RANDOM_WALK * math.sqrt(terms)) + ARITHMETIC_ROUNDINGS
    return [roundings * _F32 * exact.abs() for exact in operation.exact]


def _product(operation: Operation) -> Allowed:
    """The matrix unit: every term may be cut, and every block's sum truncated."""
    roundings = TERMS_AT_WORST * TRUNCATION * terms_of(operation) + ARITHMETIC_ROUNDINGS
    # float64 magnitudes would cost as much as the product itself; float32 ones are good to seven digits.
    wide, named = operation.magnitudes()
    args = changed(wide, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    kwargs = {name: value for name, value in named.items() if not isinstance(value, torch.dtype)}
    func = operation.call.func
    packet = func.overloadpacket
    sizes = getattr(packet, "default", func)(*args[: _FACTORS.get(operation.name, len(args))], **kwargs)
    if not all(bool(size.isfinite().all()) for size in tensors_in(sizes)):
        sizes = operation.on_magnitudes()  # what overflows in float32 would be allowed everything
    return [roundings * _F32 * size.double() for size in tensors_in(sizes)]


_FACTORS = {"mm": 2, "bmm": 2}


def _softmax(operation: Operation) -> Allowed:
    """exp(x - max): the difference is rounded, which its exponential magnifies to a relative error of that size."""
    x, dim = operation.wide(0), operation.args[1]
    exact = operation.exact[0]
    depth = (x - x.amax(dim, keepdim=True)).abs().nan_to_num(0.0, posinf=0.0)
    relative = 2.0 * depth + 4.0 * ELEMENTARY_ULPS + RANDOM_WALK * math.sqrt(x.shape[dim])
    return [_F32 * relative * exact]


def _log_softmax(operation: Operation) -> Allowed:
    x, dim = operation.wide(0), operation.args[1]
    largest = x.amax(dim, keepdim=True).abs()
    walk = RANDOM_WALK * math.sqrt(x.shape[dim]) + 2.0 * ELEMENTARY_ULPS
    return [_F32 * (ARITHMETIC_ROUNDINGS * (x.abs() + largest + operation.exact[0].abs()) + walk)]


def _softmax_backward(operation: Operation) -> Allowed:
    """y (g - sum of g y)."""
    grad, y, dim = operation.wide(0), operation.wide(1), operation.args[2]
    walk = RANDOM_WALK * math.sqrt(y.shape[dim]) + ARITHMETIC_ROUNDINGS
    total = (grad * y).abs().sum(dim, keepdim=True)
    return [_F32 * walk * y.abs() * (grad.abs() + total)]


def _log_softmax_backward(operation: Operation) -> Allowed:
    """g - exp(y) times the sum of g."""
    grad, y, dim = operation.wide(0), operation.wide(1), operation.args[2]
    walk = RANDOM_WALK * math.sqrt(y.shape[dim]) + 2.0 * ELEMENTARY_ULPS
    total = grad.abs().sum(dim, keepdim=True)
    return [_F32 * (grad.abs() + y.exp() * total * (walk + y.abs().nan_to_num(0.0, posinf=0.0)))]


def _adamw(operation: Operation) -> Allowed:
    """Parameters, gradients, moments, as `torch.optim.AdamW` documents them; what is written is bounded, in the order
    of the arguments."""
    parameters, gradients, first, second, _, steps = operation.args[:6]
    options = operation.kwargs
    rate, (beta1, beta2) = float(options["lr"]), (options["beta1"], options["beta2"])
    allowed: dict[int, Allowed] = {0: [], 2: [], 3: []}
    written = operation.exact
    count = len(parameters)
    for parameter, gradient, moment, square, step in zip(parameters, gradients, first, second, steps, strict=True):
        number = float(step) + 1.0
        moment_size = (beta1 * moment).abs() + ((1 - beta1) * gradient).abs()
        square_size = (beta2 * square).abs() + (1 - beta2) * gradient.square()
        denominator = (square_size / (1 - beta2**number)).sqrt() + options["eps"]
        update = rate / (1 - beta1**number) * moment_size / denominator
        size = parameter.abs() * (1 + abs(rate * options["weight_decay"])) + ELEMENTARY_ULPS * update.abs()
        allowed[0].append(ARITHMETIC_ROUNDINGS * _F32 * size)
        allowed[2].append(ARITHMETIC_ROUNDINGS * _F32 * moment_size)
        allowed[3].append(ARITHMETIC_ROUNDINGS * _F32 * square_size)
    # Written: parameters, gradients (where they are scaled), both moments, and sometimes the largest second moment.
    zeros = [torch.zeros(()) for _ in range(len(written) - 3 * count)]
    return [*allowed[0], *zeros[:count], *allowed[2], *allowed[3], *zeros[count:]]


def _attention(attention: Attention, operation: Operation) -> Bound:
    """Two products around a softmax, whose weights are stored in the operands' dtype between them."""
    storing = 2.0 * operation.storing
    computing = TERMS_AT_WORST * TRUNCATION * _F32
    make = attention.forward_allowed if attention.grad_BHTV is None else attention.gradients_allowed
    allowed = list(make(storing, computing))
    basis = "two products and a softmax, weights stored between them"
    stored = attention.stored(attention.dtypes[0])
    of_storing = attention.storing_noise(operation.storing)
    return Bound(allowed, basis, attention.k_BHSD.shape[-2], True, stored, attention.noise(), of_storing)


def _measured(operation: Operation) -> Allowed:
    """From the error of the same call on the CPU, in its own dtypes: its largest, for every element."""
    results = in_own_dtypes(operation.call, "cpu")
    allowed = []
    for index, exact in enumerate(operation.exact):
        if not _computed(exact) or exact.numel() == 0 or index >= len(results):
            allowed.append(torch.zeros(()))
            continue
        # Equal infinities have a difference that is no number.
        finite = results[index].isfinite() & exact.isfinite()
        error = torch.where(finite, results[index].to(exact.dtype) - exact, 0.0).abs().amax()
        scale = torch.where(finite, exact, 0.0).abs().square().mean().sqrt()
        allowed.append(MEASURED_ALLOWED * error + ELEMENTARY_ULPS * 2.0 * _F32 * (scale + exact.abs()))
    return allowed


# ---- what overflows inside


def may_overflow(call: Call, exact: tuple[torch.Tensor, ...], place: int) -> torch.Tensor:
    """Where a result that is not NaN may overflow on its way: where the sizes of a sum's finite terms do, whose order
    is the chip's own, or where the same call on the CPU does, whose operations are those of its definition; where the
    CPU has no such call, only the former excuses."""
    operation = Operation(call, exact)
    largest = torch.finfo(torch.float64 if operation.storing == UNIT_ROUNDOFF[torch.float64] else torch.float32).max
    found = torch.zeros(exact[place].shape, dtype=torch.bool)
    attention = Attention.of(call)
    if attention is not None:
        rows = attention.overflows()
        of_rows = attention.grad_BHTV is None
        return rows.view(*rows.shape, *[1] * (found.dim() - 3)).expand_as(found) if of_rows else found | rows.any()
    if operation.name in _PRODUCTS | _ADDED_UP | _BY_INDEX:
        found |= operation.on_magnitudes(finite=True)[place].abs() >= largest * (1.0 - terms_of(operation) * _F32)
    try:
        own = in_own_dtypes(call, "cpu")[place]
    except NotKnown:  # what is not known excuses nothing: the element is judged
        return found
    return found if own.shape != found.shape else found | one_sided(own, exact[place].to(own.dtype))


def one_sided(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which elements are infinite or NaN on one side only, or differently."""
    differ = (one.isnan() != other.isnan()) | (one.isinf() != other.isinf())
    return differ | (one.isinf() & other.isinf() & (one != other))


# ---- how many terms


def terms_of(operation: Operation) -> int:
    """Terms in an operator's longest sum."""
    name, args = operation.name, operation.args
    if name == "addbmm":
        return int(args[1].shape[0] * args[1].shape[-1])
    if name in _PRODUCTS:
        return int(args[1].shape[-1] if name in ("addmm", "baddbmm", "addmv") else args[0].shape[-1])
    if name in ("sum", "mean", "linalg_vector_norm", "norm"):
        sizes = [tensor.numel() for tensor in tensors_in(args)]
        results = [max(1, tensor.numel()) for tensor in operation.exact]
        return max(1, max((a // b for a, b in zip(sizes, results, strict=False)), default=1))
    if name == "nll_loss_forward":
        return int(args[0].shape[0])
    if name == "cumsum":
        return int(args[0].shape[args[1]]) if args[0].dim() else 1
    return operation.most_hits


def _most_hits(operation: Operation) -> int:
    """For operators that add rows up by index: how many numbers meet in one place at most, with the one that lies
    there. The operator says so itself, applied to ones, however it names places: by truth values, from the end, by
    several tensors together."""
    declared = [argument.name for argument in operation.call.func._schema.arguments]
    args = tuple(_ADDING.get(name, value) for name, value in zip(declared, operation.call.args, strict=False))
    kwargs = {name: _ADDING.get(name, value) for name, value in operation.call.kwargs.items() if name != "alpha"}
    counts = evaluate(operation.call.func, changed(args, _one_each), changed(kwargs, _one_each))
    return max((int(one.max()) for one in counts if one.is_floating_point() and one.numel()), default=1)


_ADDING: dict[str, Any] = {"reduce": "sum", "scale_grad_by_freq": False}
"""Arguments with which such an operator adds what it would divide or multiply."""


def _one(operation: Operation) -> int:
    return 1


def _last(operation: Operation) -> int:
    return int(operation.wide(0).shape[-1]) if operation.wide(0).dim() else 1


# ---- which rule is whose


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    """
    clone cat stack index_select gather index embedding slice_backward select_backward where masked_fill triu
    tril neg abs fill zero zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full arange
    sign topk sort max min amax amin argmax argmin constant_pad_nd flip roll repeat split_with_sizes_copy relu
    clamp clamp_min clamp_max eq ne lt le gt ge isnan isfinite bitwise_and bitwise_or bitwise_not bitwise_xor
    logical_and logical_or logical_not complex scatter unsafe_view _unsafe_view reshape_copy expand_copy floor ceil
    trunc round argsort one_hot nonzero masked_select repeat_interleave unique bincount threshold_backward
    """
)
_CASTS = frozenset({"_to_copy", "to", "copy", "_copy_from"})
_ARITHMETIC = _names(
    """
    add sub rsub addcmul addcdiv lerp
    """
)
_RELATIVE = _names(
    """
    mul div sqrt reciprocal square true_divide nll_loss_backward
    """
)
_ELEMENTARY = _names(
    """
    exp exp2 expm1 log log2 log10 log1p pow rsqrt erf erfc sin cos tan asin acos atan sinh cosh tanh sigmoid
    tanh_backward
    """
)
_GATED = _names(
    """
    silu gelu mish softplus hardswish elu leaky_relu
    """
)
_GATED_BACKWARD = _names(
    """
    silu_backward gelu_backward mish_backward softplus_backward
    """
)
_ADDED_UP = _names(
    """
    sum mean cumsum scatter_reduce nll_loss_forward
    """
)
_BY_INDEX = _names(
    """
    scatter_add index_add embedding_dense_backward index_put _index_put_impl
    """
)
_NORMS = frozenset({"linalg_vector_norm", "norm"})
_PRODUCTS = _names(
    """
    mm bmm addmm baddbmm mv addmv dot vdot addbmm
    """
)
_ELEMENTARY_OF_COMPLEX = _names(
    """
    abs angle sgn polar exp reciprocal div true_divide
    """
)
"""What is a move of real numbers, or a rounding, is a root, an arc or several products of complex ones."""
_OF_COMPLEX = (
    (_MOVES - _names("sign topk sort max min amax amin argmax argmin relu threshold_backward"))
    | _CASTS
    | _ADDED_UP
    | _BY_INDEX
    | _PRODUCTS
    | _ELEMENTARY_OF_COMPLEX
    | _names("add sub rsub addcmul mul square linalg_vector_norm _conj_physical conj_physical")
    | _names("_fft_c2c _fft_r2c _fft_c2r")
)
"""Operators whose rules hold for complex numbers: relative to their magnitudes, in each part."""

_RULES: tuple[tuple[frozenset[str], Rule, str, Callable[[Operation], int]], ...] = (
    (_ARITHMETIC, _arithmetic, "a few roundings, relative to the numbers that meet", _one),
    (_RELATIVE, _relative, "a few roundings, relative to the result", _one),
    (_ELEMENTARY, _elementary, "an elementary function", _one),
    (_GATED, _gated, "an elementary function, relative to its argument", _one),
    (_GATED_BACKWARD, _gated_backward, "an elementary function, relative to its argument", _one),
    (frozenset({"sigmoid_backward"}), _sigmoid_backward, "a few roundings of one", _one),
    (_NORMS, _norm, "a rounding a term, as a random walk", terms_of),
    (_PRODUCTS, _product, "a product: every term cut, every block's sum truncated", terms_of),
    (frozenset({"_softmax"}), _softmax, "an exponential of a rounded difference", _last),
    (frozenset({"_log_softmax"}), _log_softmax, "an exponential of a rounded difference", _last),
    (frozenset({"_softmax_backward_data"}), _softmax_backward, "a sum of products", _last),
    (frozenset({"_log_softmax_backward_data"}), _log_softmax_backward, "a sum and an exponential", _last),
    (frozenset({"_fused_adamw"}), _adamw, "AdamW: a few roundings of what meets", _one),
)
