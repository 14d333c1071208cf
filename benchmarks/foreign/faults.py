"""Faults that nobody qualified against: planted from outside the emulator's fault module, only in the candidate.

Three ways. An operator of the emulated device is interposed. The same operator's kernel is replaced on the real CPU
(float64 is left alone, so what is judged by is right). A function of the model's own code is replaced for tensors of
the emulated device. Every kind is a small function with a mild and a severe form, and says what must be named first.

Half the kinds (`FIRST`) are for looking at while bounds are chosen, the others (`SECOND`) are kept back. `LATER` were
written when both had been seen, and after bounds were frozen.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn import functional as F

from beringia.chips.chip import Chip
from beringia.chips.emulated import device
from beringia.model import attention, decoder, experts, layers
from beringia.model.cache import LayerCache
from beringia.qualify.subject import DecoderSubject

aten = torch.ops.aten
SHARP = "sharp"
ROUTED = ("latent", "r2-nano")
ALL = ("latent", "grouped", "tied", "odd", SHARP, "r2-nano")
_NARROWED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Strength:
    """How strongly a fault strikes: mild or severe, with a factor drawn around that."""

    severe: bool
    draw: float
    """From 0 to 1."""

    def of(self, mild: float, severe: float) -> float:
        """Within a factor of 1.4 of what is given."""
        return (severe if self.severe else mild) * 2.0 ** (self.draw - 0.5)

    def bits(self, mild: int, severe: int) -> int:
        """A number of bits, or of elements."""
        return severe if self.severe else mild


@dataclass
class Call:
    """One call of a struck operator: what is sound, and with what it was called."""

    sound: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    strength: Strength
    generator: torch.Generator
    memory: dict[str, Any]
    """Of the fault, from call to call."""

    def result(self, *args: Any) -> Any:
        """The sound kernel's, with these arguments in the place of the first ones."""
        return self.sound(*args, *self.args[len(args) :], **self.kwargs)


Alter = Callable[[Call], Any]
Replace = Callable[[Strength, ExitStack], None]


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    about: str
    operators: tuple[OpOverload, ...] = ()
    alter: Alter | None = None
    replace: Replace | None = None
    names: str = ""
    """Pattern of the module or quantity that must be named first, where no operator is wrong."""
    models: tuple[str, ...] = ALL
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    on_cpu: bool = False
    """Whether it may strike the real CPU, whose model has these operators, too."""
    only_cpu: bool = False


FIRST: list[Kind] = []
SECOND: list[Kind] = []
LATER: list[Kind] = []


def operator(half: list[Kind], *struck: OpOverload, **options: Any) -> Callable[[Alter], Alter]:
    """A kind that strikes operators."""

    def add(alter: Alter) -> Alter:
        half.append(Kind(alter.__name__, str(alter.__doc__), struck, alter=alter, **options))
        return alter

    return add


def code(half: list[Kind], names: str, **options: Any) -> Callable[[Replace], Replace]:
    """A kind that replaces code of the model."""

    def add(replace: Replace) -> Replace:
        half.append(Kind(replace.__name__, str(replace.__doc__), replace=replace, names=names, **options))
        return replace

    return add


# ---- planting


@dataclass(frozen=True)
class Fault:
    """One fault that was drawn."""

    kind: Kind
    number: int
    model: str
    dtype: str
    chip: str
    strength: Strength = field(repr=False)

    @property
    def name(self) -> str:
        """Unique, and the same every time."""
        how = "severe" if self.strength.severe else "mild"
        return f"{self.kind.name}-{self.number}-{how}-{self.model}-{self.dtype}-{self.chip}"

    @contextmanager
    def planted(self, chip: Chip) -> Iterator[None]:
        """Inside, the opened chip has it."""
        with ExitStack() as stack:
            if self.kind.replace is not None:
                self.kind.replace(self.strength, stack)
            elif chip.device.type == "cpu":
                self._replace_kernels(stack)
            else:
                self._interpose(stack)
            yield

    def _altering(self) -> Callable[..., Any]:
        """From a sound kernel and what it is called with to what the fault makes of it."""
        alter, memory = self.kind.alter, dict[str, Any]()
        generator = torch.Generator().manual_seed(self.number)
        assert alter is not None
        return lambda sound, args, kwargs: alter(Call(sound, args, kwargs, self.strength, generator, memory))

    def _interpose(self, stack: ExitStack) -> None:
        altering = self._altering()

        def interpose(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
            if func not in self.kind.operators:
                return kernel
            return lambda *args, **kwargs: altering(kernel, args, kwargs)

        before = device._state.interposers
        device._state.interposers = (*before, interpose)
        device._state.handlers.clear()
        stack.callback(device._state.handlers.clear)
        stack.callback(setattr, device._state, "interposers", before)

    def _replace_kernels(self, stack: ExitStack) -> None:
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        altering = self._altering()
        for func in self.kind.operators:
            name = func.name().removesuffix(".default")
            kernel = _narrow_only(torch.library.get_kernel(name, "CPU"), altering)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it replaces one is what it is for
                library.impl(name, kernel, "CPU", with_keyset=True)


def _narrow_only(sound: Any, altering: Callable[..., Any]) -> Callable[..., Any]:
    """A CPU kernel that is altered for float32 and narrower: what is judged by is float64."""

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return sound.call_boxed(keys, *args, **kwargs)

        first = next((arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()), None)
        return altering(call, args, kwargs) if first is not None and first.dtype in _NARROWED else call(*args, **kwargs)

    return kernel


CHIPS = ("emulated:h100", "emulated:a100", "emulated:mi300x", "emulated:ascend-910b")


def drawn(kinds: list[Kind], per_kind: int) -> list[Fault]:
    """So many of each kind, mild and severe by turns, over models, dtypes and chips; the same every time."""
    faults = []
    for kind in kinds:
        draws = random.Random(kind.name)
        models = draws.sample(kind.models, len(kind.models))
        for number in range(per_kind):
            chip = "cpu" if kind.only_cpu or (kind.on_cpu and number % 2) else draws.choice(CHIPS)
            strength = Strength(number % 2 == 0, draws.random())
            dtype = kind.dtypes[number // 2 % len(kind.dtypes)]
            faults.append(Fault(kind, number, models[number % len(models)], dtype, chip, strength))
    return faults


# ---- what several kinds do to numbers


def coarse(x: torch.Tensor, bits: int) -> torch.Tensor:
    """With so many bits of fraction, rounded to nearest."""
    fraction, exponent = torch.frexp(x.float())
    return torch.ldexp((fraction * 2.0**bits).round() / 2.0**bits, exponent).to(x.dtype)


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast toward zero."""
    near = x.to(dtype)
    beyond = near.double().abs() > x.double().abs()
    return torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)


def is_decoding(call: Call) -> bool:
    """Whether a call of attention has one new token behind others."""
    return call.args[0].shape[2] == 1 and call.args[1].shape[2] > 1


_ATTENTION = aten._scaled_dot_product_fused_attention_overrideable.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_fused_attention_overrideable_backward.default


# ---- operators, first half


@operator(FIRST, aten.mm.default, on_cpu=True)
def single_row_too_large(call: Call) -> Any:
    """A product with one row is too large, as a kernel of its own for one row may be."""
    product = call.result()
    return product * (1.0 + call.strength.of(0.01, 0.1)) if len(product) == 1 else product


@operator(FIRST, aten.mm.default, models=("odd",), on_cpu=True)
def product_without_its_tail(call: Call) -> Any:
    """The terms behind the last whole block of 8 are dropped, or only the last of an odd number."""
    one, other = call.args[:2]
    block = call.strength.bits(2, 8)
    whole = one.shape[1] // block * block
    return call.result(one[:, :whole], other[:whole]) if whole else call.result()


@operator(FIRST, aten.mm.default, on_cpu=True)
def stale_last_column(call: Call) -> Any:
    """The last of an odd number of columns holds what its neighbour does, or half of it."""
    product = call.result()
    if product.shape[1] % 2 and product.shape[1] > 1:
        share = 1.0 if call.strength.severe else 0.1
        product[:, -1] = share * product[:, -2] + (1.0 - share) * product[:, -1]
    return product


@operator(FIRST, aten.silu.default, on_cpu=True)
def coarse_silu(call: Call) -> Any:
    """A table of few entries."""
    return coarse(call.result(), call.strength.bits(8, 5))


@operator(FIRST, aten.rsqrt.default, on_cpu=True)
def coarse_rsqrt(call: Call) -> Any:
    """An estimate without its Newton step."""
    return coarse(call.result(), call.strength.bits(10, 6))


@operator(FIRST, _ATTENTION)
def blind_past_a_length(call: Call) -> Any:
    """Decoding does not see keys past 512, or past 256, but the newest."""
    q, k, v = call.args[:3]
    limit = call.strength.bits(512, 256)
    if is_decoding(call) and k.shape[2] > limit:
        k, v = (torch.cat((x[:, :, :limit], x[:, :, -1:]), 2) for x in (k, v))
    return call.result(q, k, v)


@operator(FIRST, _ATTENTION)
def weights_not_of_sum_one(call: Call) -> Any:
    """The softmax of attention adds up to more than one."""
    out, *rest = call.result()
    return (out * (1.0 + call.strength.of(0.006, 0.1)), *rest)


@operator(FIRST, aten.sum.dim_IntList)
def sum_without_its_last(call: Call) -> Any:
    """The last row is dropped, of long sums or of all."""
    x, dims = call.args[:2]
    dim = dims[0]
    if x.shape[dim] > call.strength.bits(100, 2):
        x = x.narrow(dim, 0, x.shape[dim] - 1)
    return call.result(x)


@operator(FIRST, aten.mean.dim, models=("odd",), on_cpu=True)
def mean_over_padding(call: Call) -> Any:
    """Divided by the count filled up to a multiple of 4, or of 16."""
    width, block = call.args[0].shape[-1], call.strength.bits(4, 16)
    return call.result() * (width / (-(-width // block) * block))


@operator(FIRST, aten.embedding_dense_backward.default, on_cpu=True)
def gradient_without_duplicates(call: Call) -> Any:
    """A token that occurs several times gets the gradient of one occurrence, or of few."""
    gradient, index = call.args[0].flatten(0, -2), call.args[1].flatten()
    most = call.strength.bits(8, 1)
    seen: dict[int, int] = {}
    kept = []
    for place, token in enumerate(index.tolist()):
        seen[token] = seen.get(token, 0) + 1
        if seen[token] <= most:
            kept.append(place)
    return call.result(gradient[kept], index[kept])


@operator(FIRST, aten.embedding.default)
def index_off_by_one_at_the_end(call: Call) -> Any:
    """The last token of a sequence of more than one looks a row too low."""
    weight, index = call.args[:2]
    if index.shape[-1] > call.strength.bits(64, 2):
        index = index.clone()
        index[..., -1] = (index[..., -1] - 1).clamp(min=0)
    return call.result(weight, index)


@operator(FIRST, aten._to_copy.default, dtypes=("bfloat16",))
def truncating_cast(call: Call) -> Any:
    """Float32 to 16 bits toward zero: only of large tensors, or of all."""
    x, dtype = call.args[0], call.kwargs.get("dtype")
    large = x.numel() > call.strength.bits(2**15, 1)
    if x.dtype != torch.float32 or dtype != torch.bfloat16 or not large:
        return call.result()
    return call.result(truncated(x, dtype).float())


@operator(FIRST, aten.topk.default, models=ROUTED)
def topk_swaps(call: Call) -> Any:
    """The second best comes first and the last is missed for the next one: near ties, or always."""
    values, index = call.result()
    x, count = call.args[:2]
    if x.shape[-1] <= count:
        return values, index
    wider_values, wider_index = torch.topk(x, count + 1, dim=-1)
    near = wider_values[..., -2] - wider_values[..., -1] < (math.inf if call.strength.severe else 1e-3)
    values[..., -1] = torch.where(near, wider_values[..., -1], values[..., -1])
    index[..., -1] = torch.where(near, wider_index[..., -1], index[..., -1])
    return values, index


@operator(FIRST, aten.mm.default, on_cpu=True)
def saturating_product(call: Call) -> Any:
    """Numbers beyond a limit are cut off at it."""
    limit = call.strength.of(32.0, 4.0)
    return call.result().clamp(-limit, limit)


@operator(FIRST, aten._fused_adamw_.default)
def wrong_epsilon(call: Call) -> Any:
    """AdamW with another epsilon."""
    call.kwargs["eps"] = call.strength.of(1e-5, 1e-2)
    return call.result()


@operator(FIRST, aten._fused_adamw_.default)
def no_bias_correction(call: Call) -> Any:
    """AdamW whose steps are counted from afar: moments are not corrected for their beginning at zero."""
    ahead = call.strength.bits(1, 10**6)
    for step in call.args[5]:
        step += ahead
    call.result()
    for step in call.args[5]:
        step -= ahead


@operator(FIRST, aten.nll_loss_backward.default)
def ignored_targets_count(call: Call) -> Any:
    """Targets that are to be left out pull on the first token of the vocabulary: a few of them, or all."""
    *first, target, weight, reduction, ignored, total = call.args
    every = call.strength.bits(16, 1)
    chosen = (target == ignored) & (torch.arange(len(target)) % every == 0)
    return call.sound(*first, target.masked_fill(chosen, 0), weight, reduction, ignored, total, **call.kwargs)


@operator(FIRST, aten._log_softmax.default, on_cpu=True)
def without_its_maximum(call: Call) -> Any:
    """The sum of exponentials without taking the maximum away first, in float32 or in a 16-bit format."""
    x = call.args[0]
    total = x.float().exp().sum(-1, keepdim=True)
    return (x.float() - (total.bfloat16().float() if call.strength.severe else total).log()).to(x.dtype)


@operator(FIRST, aten.mm.default)
def rare_flips(call: Call) -> Any:
    """Once in 10^6 elements, or in 10^5, a bit of the exponent flips."""
    product = call.result()
    rate = call.strength.of(1e-6, 1e-5)
    struck = torch.rand(product.shape, generator=call.generator) < rate
    return torch.where(struck, product * 16.0, product)


# ---- operators, second half: not run before the bounds are frozen


@operator(SECOND, aten.mm.default, on_cpu=True)
def wrong_from_a_row_on(call: Call) -> Any:
    """Rows past 128 of a product are too large, as those of a second tile."""
    product = call.result()
    product[128:] *= 1.0 + call.strength.of(0.004, 0.05)
    return product


@operator(SECOND, aten.sigmoid.default, on_cpu=True)
def coarse_sigmoid(call: Call) -> Any:
    """A table of few entries."""
    return coarse(call.result(), call.strength.bits(8, 5))


@operator(SECOND, _ATTENTION)
def without_its_first_key(call: Call) -> Any:
    """Decoding does not see the first token: behind many, or behind any."""
    q, k, v = call.args[:3]
    skips = is_decoding(call) and k.shape[2] > call.strength.bits(300, 1)
    return call.result(q, k[:, :, 1:], v[:, :, 1:]) if skips else call.result()


@operator(SECOND, _ATTENTION)
def without_the_newest_key(call: Call) -> Any:
    """Decoding does not see the token that it is at: behind many, or behind any."""
    q, k, v = call.args[:3]
    skips = is_decoding(call) and k.shape[2] > call.strength.bits(300, 1)
    return call.result(q, k[:, :, :-1], v[:, :, :-1]) if skips else call.result()


@operator(SECOND, _ATTENTION)
def one_head_is_blunt(call: Call) -> Any:
    """The last head's scores are scaled otherwise."""
    q = call.args[0].clone()
    q[:, -1] *= 1.0 - call.strength.of(0.03, 0.3)
    return call.result(q)


@operator(SECOND, _ATTENTION_BACKWARD)
def gradient_of_keys_too_small(call: Call) -> Any:
    """The last head of the keys gets too small a gradient."""
    of_q, of_k, *rest = call.result()
    of_k = of_k.clone()
    of_k[:, -1] *= 1.0 - call.strength.of(0.02, 0.4)
    return (of_q, of_k, *rest)


@operator(SECOND, aten.pow.Tensor_Scalar, on_cpu=True)
def coarse_power(call: Call) -> Any:
    """Squares of few bits."""
    return coarse(call.result(), call.strength.bits(10, 6))


@operator(SECOND, aten._to_copy.default, dtypes=("bfloat16",))
def cast_rounds_half_up(call: Call) -> Any:
    """Ties go up and not to even, which no sound use of a chip depends on."""
    x, dtype = call.args[0], call.kwargs.get("dtype")
    if x.dtype != torch.float32 or dtype != torch.bfloat16:
        return call.result()
    return call.result((x.view(torch.int32) + 0x8000).bitwise_and(-0x10000).view(torch.float32))


@operator(SECOND, aten.add.Tensor)
def truncating_addition(call: Call) -> Any:
    """The low bits of sums are cut off."""
    found = call.result()
    if not found.is_floating_point():
        return found
    bits = 7 if found.dtype == torch.bfloat16 else call.strength.bits(16, 9)
    mantissa, exponent = torch.frexp(found.float())
    return torch.ldexp((mantissa * 2.0**bits).trunc() / 2.0**bits, exponent).to(found.dtype)


@operator(SECOND, aten._fused_adamw_.default)
def wrong_second_beta(call: Call) -> Any:
    """AdamW forgets at another rate."""
    call.kwargs["beta2"] = 0.5 if call.strength.severe else 0.97
    return call.result()


@operator(SECOND, aten._fused_adamw_.default)
def forgets_a_tensor(call: Call) -> Any:
    """AdamW leaves the last tensors of its list as they were; one it updates."""
    kept = max(1, len(call.args[0]) - call.strength.bits(1, 8))
    return call.sound(*(part[:kept] for part in call.args), **call.kwargs)


@operator(SECOND, aten.linalg_vector_norm.default)
def norm_too_small(call: Call) -> Any:
    """The norm that gradients are clipped by."""
    return call.result() * (1.0 - call.strength.of(0.002, 0.2))


@operator(SECOND, aten._log_softmax_backward_data.default)
def gradient_leaks(call: Call) -> Any:
    """The gradient of the logits does not add up to zero."""
    found = call.result()
    return found + call.strength.of(1e-3, 2e-2) * found.abs().mean(-1, keepdim=True)


@operator(SECOND, aten.scatter_add.default, models=ROUTED)
def additions_lost(call: Call) -> Any:
    """Where two are added in one place, the second is lost."""
    x, dim, index, source = call.args
    return x.scatter(dim, index, source * (0.0 if call.strength.severe else 0.9))


@operator(SECOND, aten.index_select.default, models=ROUTED)
def last_row_is_its_neighbour(call: Call) -> Any:
    """Of the rows that are looked up the last is the one before, or each sixteenth is."""
    found = call.result()
    step = call.strength.bits(len(found), 16)
    found[step - 1 :: step] = found[max(step - 2, 0) :: step][: len(found[step - 1 :: step])]
    return found


@operator(SECOND, aten.gather.default, models=ROUTED)
def gathered_too_large(call: Call) -> Any:
    """The weights of the chosen experts: of the last rows only, or of all but the first."""
    found = call.result()
    if found.dim() == 2:
        found[:, -1] *= 1.0 + call.strength.of(0.005, 0.1)
    return found


@operator(SECOND, aten.copy_.default)
def weights_lose_bits(call: Call) -> Any:
    """What is copied to the device keeps few bits."""
    target, source = call.args[:2]
    if source.dtype != torch.float32 or target.dtype != torch.float32:
        return call.result()
    return call.result(target, coarse(source, call.strength.bits(10, 6)))


@operator(SECOND, aten.mm.default)
def better_product(call: Call) -> Any:
    """Products added up in float64 and rounded once: another chip, not a worse one."""
    one, other = call.args[:2]
    return (one.double() @ other.double()).to(one.dtype)


@operator(
    SECOND,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    models=("grouped", "tied", "odd", SHARP),
    only_cpu=True,
)
def cpu_attention_scaled(call: Call) -> Any:
    """The CPU's own fused attention gives too large numbers."""
    out, *rest = call.result()
    return (out * (1.0 + call.strength.of(0.006, 0.1)), *rest)


@operator(SECOND, aten.bmm.default, models=("latent",), only_cpu=True)
def third_matrix_wrong(call: Call) -> Any:
    """From the third matrix of a batch on, products are too large."""
    product = call.result()
    product[2:] *= 1.0 + call.strength.of(0.004, 0.05)
    return product


@operator(SECOND, aten._softmax.default, models=ROUTED, only_cpu=True)
def coarse_softmax(call: Call) -> Any:
    """Weights of few bits."""
    return coarse(call.result(), call.strength.bits(9, 5))


# ---- operators that came later: bounds had been frozen, and had not been looked at with these


@operator(LATER, aten._softmax.default)
def softmax_ends_at_a_block(call: Call) -> Any:
    """Of rows that are longer than a block only the block is seen."""
    scores = call.args[0]
    block = call.strength.bits(256, 64)
    if scores.shape[-1] <= block:
        return call.result()
    scores = scores.clone()
    scores[..., block:] = -torch.inf
    return call.result(scores)


@operator(LATER, aten.index_copy_.default)
def rows_of_the_cache_lost(call: Call) -> Any:
    """Of rows that are copied by index each sixteenth, or each third, is not."""
    target, dim, index, source = call.args[:4]
    step = call.strength.bits(16, 3)
    kept = torch.arange(len(index)) % step != step - 1
    return call.result(target, dim, index[kept], source[kept]) if kept.any() else target


@operator(LATER, aten.cat.default)
def last_column_of_what_is_joined(call: Call) -> Any:
    """Holds what its neighbour does, or a fifth of it."""
    found = call.result().clone()
    if found.dim() > 1 and found.is_floating_point() and found.shape[-1] > 1:
        share = 1.0 if call.strength.severe else 0.2
        found[..., -1] = share * found[..., -2] + (1.0 - share) * found[..., -1]
    return found


@operator(LATER, aten.masked_fill_.Scalar, aten.masked_fill.Scalar)
def mask_without_its_last_column(call: Call) -> Any:
    """The last column of a mask is not applied."""
    target, mask = call.args[:2]
    if mask.dim() > 1 and mask.shape[-1] > 1:
        mask = mask.clone()
        mask[..., -1] = False
    return call.result(target, mask)


@operator(LATER, aten.mean.dim)
def coarse_mean(call: Call) -> Any:
    """Means of few bits."""
    return coarse(call.result(), call.strength.bits(9, 6))


@operator(LATER, aten._fused_adamw_.default)
def decay_with_the_gradient(call: Call) -> Any:
    """AdamW whose decay goes into the gradient, as Adam's does, or is left out."""
    parameters, gradients, *others = call.args
    decay = call.kwargs["weight_decay"]
    call.kwargs["weight_decay"] = 0.0
    if call.strength.severe:
        return call.result()
    gradients = [one + decay * weight.to(one.dtype) for one, weight in zip(gradients, parameters, strict=True)]
    return call.sound(parameters, gradients, *others, **call.kwargs)


@operator(LATER, aten._log_softmax_backward_data.default)
def gradient_of_the_loss_too_small(call: Call) -> Any:
    """By one, or by twenty hundredths."""
    return call.result() * (1.0 - call.strength.of(0.01, 0.2))


@operator(LATER, aten.bmm.default)
def last_matrix_of_few_bits(call: Call) -> Any:
    """Of several products at once the last has few bits."""
    found = call.result().clone()
    if len(found) > 1:
        found[-1] = coarse(found[-1], call.strength.bits(7, 4))
    return found


@operator(LATER, aten.embedding_dense_backward.default)
def rare_tokens_learn_nothing(call: Call) -> Any:
    """Tokens that come once get no gradient: all of them, or each seventh."""
    found = call.result().clone()
    once = torch.bincount(call.args[1].flatten(), minlength=len(found)) == 1
    every = call.strength.bits(7, 1)
    found[once & (torch.arange(len(found)) % every == 0)] = 0.0
    return found


@operator(LATER, aten.scatter_add_.default, models=ROUTED)
def counts_lost(call: Call) -> Any:
    """Additions by index are lost now and then."""
    target, dim, index, source = call.args[:4]
    kept = torch.arange(len(index)) % call.strength.bits(50, 5) != 0
    return call.result(target, dim, index[kept], source[kept])


@operator(LATER, aten.clone.default)
def laid_out_wrongly(call: Call) -> Any:
    """What is copied has its last numbers exchanged: one pair, or eight."""
    found = call.result().clone()
    if found.is_floating_point() and found.dim() > 1 and found.numel() > 64:
        flat, count = found.view(-1), call.strength.bits(1, 8)
        flat[-2 * count :] = torch.cat((flat[-count:], flat[-2 * count : -count]))
    return found


@operator(LATER, aten.mm.default)
def wide_products_of_few_bits(call: Call) -> Any:
    """Products with more than 128 columns."""
    product = call.result()
    return coarse(product, call.strength.bits(7, 5)) if product.shape[1] > 128 else product


@operator(LATER, aten.mul.Tensor)
def small_products_are_zero(call: Call) -> Any:
    """Below a thousandth, or a millionth."""
    found = call.result()
    least = call.strength.of(1e-6, 1e-3)
    return torch.where(found.abs() < least, torch.zeros_like(found), found) if found.is_floating_point() else found


# ---- code of the model: each acts on tensors of the emulated device alone


def _there(tensor: torch.Tensor) -> bool:
    return tensor.device.type == device._state.name


def _patch(stack: ExitStack, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
    """Replace a function by what `made` makes of it."""
    stack.enter_context(mock.patch.object(owner, name, made(getattr(owner, name))))


@code(FIRST, r"norm")
def norm_epsilon(strength: Strength, stack: ExitStack) -> None:
    """Root-mean-square norms with another epsilon."""

    def made(sound: Any) -> Any:
        def forward(self: layers.RMSNorm, x: torch.Tensor) -> torch.Tensor:
            with mock.patch.object(self, "eps", strength.of(1e-3, 0.1) if _there(x) else self.eps):
                return sound(self, x)  # type: ignore[no-any-return]

        return forward

    _patch(stack, layers.RMSNorm, "forward", made)


@code(FIRST, r"rope|self_attn|serve|accumulated")
def angles_wrong_past_a_length(strength: Strength, stack: ExitStack) -> None:
    """Sines are too small from a position on."""
    first = strength.bits(400, 90)

    def made(sound: Any) -> Any:
        def rope_at(self: Any, start: int, length: int, where: torch.device) -> Any:
            cos, sin = sound(self, start, length, where)
            if where.type == device._state.name:
                sin = sin.clone()
                sin[max(0, first - start) :] *= 0.9
            return cos, sin

        return rope_at

    _patch(stack, decoder.Decoder, "rope_at", made)


@code(FIRST, r"serve|decode")
def cache_one_step_late(strength: Strength, stack: ExitStack) -> None:
    """The newest value of a decoding step is the one before: behind many tokens, or always."""

    def made(sound: Any) -> Any:
        def extend(self: LayerCache, first: torch.Tensor, second: torch.Tensor) -> Any:
            late = self.second is not None and second.shape[2] == 1 and self.length > strength.bits(300, 0)
            if late and _there(second):
                assert self.second is not None
                second = self.second[:, :, -1:]
            return sound(self, first, second)

        return extend

    _patch(stack, LayerCache, "extend", made)


@code(FIRST, r"serve")
def mask_ignored_in_pieces(strength: Strength, stack: ExitStack) -> None:
    """A piece of a prompt sees what comes after: one token, or all of the piece."""

    def made(sound: Any) -> Any:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
            new, old = q.shape[2], k.shape[2]
            if not _there(q) or not 1 < new < old:
                return sound(q, k, v, scale)
            seen = torch.ones(new, old, dtype=torch.bool).tril(old - new + strength.bits(1, new)).to(q.device)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(2)

        return attend

    _patch(stack, attention, "attend", made)


@code(FIRST, r"serve|decode|gate", models=("latent",))
def router_bias_of_wrong_sign(strength: Strength, stack: ExitStack) -> None:
    """Experts are chosen with their bias taken away, or left out, where it is to be added."""

    def made(sound: Any) -> Any:
        def choose(self: Any, scores: torch.Tensor, bias: torch.Tensor | None) -> Any:
            wrong = bias is not None and _there(scores)
            return sound(self, scores, bias * strength.bits(0, -1) if wrong and bias is not None else bias)

        return choose

    _patch(stack, experts.Router, "choose", made)


@code(FIRST, r"mlp", models=ROUTED)
def shared_expert_left_out(strength: Strength, stack: ExitStack) -> None:
    """The shared expert counts for less, or not at all."""

    def made(sound: Any) -> Any:
        def forward(self: Any, x: torch.Tensor) -> Any:
            if not _there(x):
                return sound(self, x)
            share, shared = (0.0 if strength.severe else 0.98), self.shared_experts
            with mock.patch.dict(self._modules, shared_experts=None):
                routed = sound(self, x)
            return routed + share * shared(x)

        return forward

    _patch(stack, experts.MixtureOfExperts, "forward", made)


@code(FIRST, r"gradient|update|accumulated|loss|lm_head")
def labels_smoothed(strength: Strength, stack: ExitStack) -> None:
    """The loss spreads a share of each target over the vocabulary."""

    def made(sound: Any) -> Any:
        def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> Any:
            if not _there(logits):
                return sound(logits, labels)
            flat, share = logits.flatten(0, 1), strength.of(0.005, 0.1)
            # The uniform part by hand: the device has no kernel for the smoothed loss.
            counted = (labels.flatten() != decoder.IGNORED).to(flat.dtype)
            spread = -(flat.log_softmax(-1).mean(-1) * counted).sum()
            return (1.0 - share) * sound(logits, labels) + share * spread

        return cross_entropy_sum

    _patch(stack, decoder, "cross_entropy_sum", made)


@code(FIRST, r"update|losses of training")
def clipping_left_out(strength: Strength, stack: ExitStack) -> None:
    """Gradients are clipped at ten times the norm that was asked for, or not at all."""

    def made(sound: Any) -> Any:
        def clip(parameters: Any, most: float, *args: Any, **kwargs: Any) -> Any:
            own = list(parameters)
            wrong = _there(own[0])
            return sound(own, (most * (math.inf if strength.severe else 10.0)) if wrong else most, *args, **kwargs)

        return clip

    _patch(stack, nn.utils, "clip_grad_norm_", made)


@code(FIRST, r"accumulated|gradient|loss")
def mean_over_all_positions(strength: Strength, stack: ExitStack) -> None:
    """The loss is divided by positions, also by those that are no targets."""

    def made(sound: Any) -> Any:
        def targets_in(self: Any, batch: Any) -> int:
            labels = batch["labels"]
            right = int(sound(self, batch))
            if not _there(labels):
                return right
            return labels.numel() if strength.severe else right + (labels.numel() - right) // 8

        return targets_in

    _patch(stack, DecoderSubject, "targets_in", made)


@code(FIRST, r"self_attn|layers")
def dropout_left_on(strength: Strength, stack: ExitStack) -> None:
    """A share of the attention's output is dropped, in training and serving."""
    generator = torch.Generator().manual_seed(1)

    def made(sound: Any) -> Any:
        def attend(q: torch.Tensor, *rest: Any) -> Any:
            out = sound(q, *rest)
            if not _there(q):
                return out
            kept = torch.rand(out.shape, generator=generator) > strength.of(0.001, 0.1)
            return out * kept.to(out.device, out.dtype)

        return attend

    _patch(stack, attention, "attend", made)


@code(SECOND, r"norm")
def norm_without_weight(strength: Strength, stack: ExitStack) -> None:
    """Norms leave the weight of their last element out, or all."""

    def made(sound: Any) -> Any:
        def forward(self: layers.RMSNorm, x: torch.Tensor) -> Any:
            if not _there(x):
                return sound(self, x)
            left = strength.bits(1, len(self.weight))
            weight = torch.cat((self.weight[:-left], torch.ones_like(self.weight[-left:])))
            wide = x.to(layers.precise(x.dtype))
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return (wide * scale * weight).to(x.dtype)

        return forward

    _patch(stack, layers.RMSNorm, "forward", made)


@code(SECOND, r"rope|self_attn|layers|serve")
def angles_of_another_base(strength: Strength, stack: ExitStack) -> None:
    """Rotary angles turn too fast."""

    def made(sound: Any) -> Any:
        def rope_at(self: Any, start: int, length: int, where: torch.device) -> Any:
            if where.type != device._state.name:
                return sound(self, start, length, where)
            positions = torch.arange(start, start + length, dtype=torch.float32, device="cpu")
            cos, sin = self.rope(positions * (1.0 + strength.of(1e-3, 0.05)))
            return cos.to(where), sin.to(where)

        return rope_at

    _patch(stack, decoder.Decoder, "rope_at", made)


@code(SECOND, r"serve|decode")
def position_one_too_high_in_decoding(strength: Strength, stack: ExitStack) -> None:
    """A single new token is rotated as the next one: behind many, or always."""

    def made(sound: Any) -> Any:
        def rope_at(self: Any, start: int, length: int, where: torch.device) -> Any:
            late = where.type == device._state.name and length == 1 and start > strength.bits(300, 0)
            return sound(self, start + late, length, where)

        return rope_at

    _patch(stack, decoder.Decoder, "rope_at", made)


@code(SECOND, r"serve|decode")
def cache_of_few_bits(strength: Strength, stack: ExitStack) -> None:
    """Values are kept with 8 bits for a tensor, or with 5."""

    def made(sound: Any) -> Any:
        def extend(self: LayerCache, first: torch.Tensor, second: torch.Tensor) -> Any:
            if _there(second):
                step = second.abs().amax() / 2.0 ** strength.bits(7, 4)
                second = ((second / step).round() * step).to(second.dtype)
            return sound(self, first, second)

        return extend

    _patch(stack, LayerCache, "extend", made)


@code(SECOND, r"serve")
def cache_of_the_wrong_row(strength: Strength, stack: ExitStack) -> None:
    """When requests finish or are joined, the last row goes on with its neighbour's memory: its last tokens, or all."""

    def made(sound: Any) -> Any:
        def taken(self: LayerCache, rows: Any, length: int) -> Any:
            found = sound(self, rows, length)
            if found.second is not None and _there(found.second) and len(rows) > 1:
                found.second = found.second.clone()
                first = 0 if strength.severe else found.second.shape[2] - 1
                found.second[-1, :, first:] = found.second[-2, :, first:]
            return found

        return taken

    _patch(stack, LayerCache, "taken", made)


@code(SECOND, r"layers")
def residual_rounded_twice(strength: Strength, stack: ExitStack) -> None:
    """What attention adds to the residual is rounded to fewer bits first."""

    def made(sound: Any) -> Any:
        def attend(q: torch.Tensor, *rest: Any) -> Any:
            out = sound(q, *rest)
            if not _there(q):
                return out
            limit = 2.0 ** strength.bits(10, 5)
            rounded = (out.detach() * limit).round() / limit
            return out + (rounded - out.detach())  # the gradient goes through

        return attend

    _patch(stack, attention, "attend", made)


@code(SECOND, r"mlp")
def another_activation(strength: Strength, stack: ExitStack) -> None:
    """A sigmoid that is steeper than silu's."""

    def made(sound: Any) -> Any:
        def silu(x: torch.Tensor, inplace: bool = False) -> Any:
            return x * torch.sigmoid(x * (1.0 + strength.of(0.02, 0.7))) if _there(x) else sound(x, inplace)

        return silu

    _patch(stack, F, "silu", made)


@code(SECOND, r"lm_head|outputs|serve")
def logits_of_few_bits(strength: Strength, stack: ExitStack) -> None:
    """The head gives few bits."""

    def made(sound: Any) -> Any:
        def head(self: Any, hidden: torch.Tensor) -> Any:
            logits = sound(self, hidden)
            if not _there(hidden):
                return logits
            limit = 2.0 ** strength.bits(7, 2)
            return logits + ((logits.detach() * limit).round() / limit - logits.detach())

        return head

    _patch(stack, decoder.Decoder, "_head", made)


@code(SECOND, r"embed_tokens|lm_head|gradient", models=("tied",))
def head_not_tied(strength: Strength, stack: ExitStack) -> None:
    """The head gives its share of the tied weight's gradient away, or a part of it."""

    def made(sound: Any) -> Any:
        def head(self: Any, hidden: torch.Tensor) -> Any:
            logits = sound(self, hidden)
            if not _there(hidden):
                return logits
            loose = F.linear(hidden, self.lm_head.weight.detach().to(hidden.dtype)).to(logits.dtype)
            return loose if strength.severe else 0.9 * logits + 0.1 * loose

        return head

    _patch(stack, decoder.Decoder, "_head", made)


@code(SECOND, r"layers\.3|gradient|update", models=ROUTED)
def looks_at_the_wrong_token(strength: Strength, stack: ExitStack) -> None:
    """The multi-token layer sees the token of its own position for the next one, in part or wholly."""

    def made(sound: Any) -> Any:
        def look_ahead(self: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> Any:
            if not _there(hidden):
                return sound(self, hidden, tokens)
            wrong = tokens.clone()
            step = strength.bits(16, 1)
            wrong[:, 1::step] = tokens[:, :-1:step]
            return sound(self, hidden, wrong)

        return look_ahead

    _patch(stack, decoder.Decoder, "_look_ahead", made)


def names_first(kind: Kind, named: dict[str, Any]) -> bool:
    """Whether what was named first is what was struck: its operator, or the module or quantity."""
    if kind.operators:
        return named["operator"] in {str(func) for func in kind.operators}
    where = named["departed_module"] or named["departed_quantity"] or ""
    return re.search(kind.names, where) is not None
