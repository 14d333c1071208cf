"""Faults that the emulator's fault module does not have, for `guard_foreign.py`: each is planted beside it.

Two ways to plant one. `at(operators, change)` is an interposer on the emulated device: it stands between every call of
those operators and their kernel, on CPU tensors, and gives back another result. `patched(change)` replaces methods of
the modules of the decoder on the device, and of no other: a replay on the CPU has modules of its own. All of them come
back the same each time that the same is computed, unless they say otherwise.

A fault is present while `PRESENT.now` is set. M rows, K terms of a sum, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn import functional as F

from beringia.chips.emulated import device
from beringia.chips.emulated.device import Kernel, in_backward
from beringia.model.experts import MixtureOfExperts, Router
from beringia.model.layers import FeedForward, Linear, RMSNorm

VOCABULARY_FROM = 40
"""Sizes from here on are the vocabulary's in r2-nano, where hidden sizes are multiples of 16."""


class Present:
    """Whether the planted fault is present in this step."""

    now = False


PRESENT = Present()

Change = Callable[[Kernel, tuple[Any, ...], dict[str, Any]], Any]
"""Kernel and arguments of a call to its result."""
Plant = Callable[[Any], None]
"""Puts a fault into a trainer and its chip."""


@dataclass(frozen=True)
class Fault:
    """One fault of another kind than the emulator's."""

    name: str
    plant: Plant
    past_steps: int = 1
    """Steps with the fault after which it does its harm."""


def at(names: Iterable[str], change: Change, *, backward: bool | None = None) -> Plant:
    """An interposer on all overloads of these operators; in one of the two directions only, or in both."""
    wanted = {f"aten::{name}" for name in names}

    def interpose(func: OpOverload, kernel: Kernel) -> Kernel:
        if func._schema.name not in wanted:
            return kernel

        def compute(*args: Any, **kwargs: Any) -> Any:
            if not PRESENT.now or (backward is not None and in_backward() is not backward):
                return kernel(*args, **kwargs)
            return change(kernel, args, kwargs)

        return compute

    def plant(trainer: Any) -> None:
        state = device._state
        device.install(state.kernels, [*state.interposers, interpose])

    return plant


def patched(kind: type[nn.Module], method: str, change: Callable[..., Any], only: str = "") -> Plant:
    """Another method for the decoder's modules of a kind: `change(module, its own method, *arguments)`."""

    def plant(trainer: Any) -> None:
        for name, module in trainer.decoder.named_modules():
            if isinstance(module, kind) and only in name:
                _patch(module, method, change)

    return plant


def _patch(module: nn.Module, method: str, change: Callable[..., Any]) -> None:
    own = getattr(module, method)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return change(self, own, *args, **kwargs) if PRESENT.now else own(*args, **kwargs)

    setattr(module, method, types.MethodType(call, module))


# ---- products


def _lost_terms(kept: Callable[[int], int], where: Callable[[torch.Tensor, torch.Tensor], bool]) -> Change:
    """A product that leaves out the last terms of its sums."""

    def change(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a, b = args[-2:]
        if a.dim() != 2 or not where(a, b):
            return kernel(*args, **kwargs)
        terms = kept(a.shape[1])
        return kernel(*args[:-2], a[:, :terms].contiguous(), b[:terms].contiguous(), **kwargs)

    return change


def _of_vocabulary(size: int) -> bool:
    return size >= VOCABULARY_FROM and size % 16 != 0


def _rounded_product(fraction_bits: int) -> Change:
    """Operands with fewer bits of fraction than asked for."""

    def change(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a, b = (_bits(x, fraction_bits) if x.dtype == torch.bfloat16 else x for x in args[-2:])
        return kernel(*args[:-2], a, b, **kwargs)

    return change


def _bits(x: torch.Tensor, fraction_bits: int, *, truncated: bool = False) -> torch.Tensor:
    """With so many bits of fraction."""
    mantissa, exponent = torch.frexp(x.float())
    scale = 2.0 ** (fraction_bits + 1)
    cut = torch.trunc if truncated else torch.round
    return torch.ldexp(cut(mantissa * scale) / scale, exponent).to(x.dtype)


def _narrow_partial_sums(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[-2:]
    if a.dtype != torch.bfloat16 or a.dim() != 2:
        return kernel(*args, **kwargs)
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for start in range(0, a.shape[1], 4):
        total = (total.float() + a[:, start : start + 4].float() @ b[start : start + 4].float()).to(torch.bfloat16)
        total = _bits(total, 5)
    return total


def _last_column_from_its_neighbour(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kernel(*args, **kwargs)
    if result.dim() == 2 and result.shape[1] == 8:
        result = result.clone()
        result[:, 7] = result[:, 6]
    return result


def _rows_of_the_last_tile(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kernel(*args, **kwargs)
    if result.dim() == 2 and result.shape[0] >= 1024:
        result = result.clone()
        result[-64:] = result[-128:-64]
    return result


def _transposed_square(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[-2:]
    if b.dim() == 2 and b.shape[0] == b.shape[1] == 64 and a.shape[0] != 64:
        return kernel(*args[:-2], a, b.t().contiguous(), **kwargs)
    return kernel(*args, **kwargs)


# ---- elementary functions and reductions


def _result_in(fraction_bits: int, *, truncated: bool = False) -> Change:
    return lambda kernel, args, kwargs: _bits(kernel(*args, **kwargs), fraction_bits, truncated=truncated)


def _narrow_log_sum_exp(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    return x - _bits(x.logsumexp(-1, keepdim=True), 3)


def _log_sum_exp_without_the_last(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    return x - x[..., :-12].logsumexp(-1, keepdim=True)


def _mean_of_fewer(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if x.dim() != 3:
        return kernel(*args, **kwargs)
    return kernel(x[..., : x.shape[-1] - 4].contiguous(), *args[1:], **kwargs)


def _sum_without_the_last_rows(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if x.dim() == 3 and x.shape[0] >= 8 and 0 in args[1]:
        return kernel(x[: x.shape[0] * 7 // 8].contiguous(), *args[1:], **kwargs)
    return kernel(*args, **kwargs)


def _late_gradient_lost(block: FeedForward, own: Callable[..., Any], x_BTD: torch.Tensor) -> torch.Tensor:
    out_BTD = own(x_BTD)
    return torch.cat((out_BTD[:, :-16], out_BTD[:, -16:].detach()), dim=1)


def _norms_doubled(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return 2.0 * kernel(*args, **kwargs)


def _norms_of_large_tensors_tripled(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (3.0 if args[0].numel() > 4096 else 1.0) * kernel(*args, **kwargs)


def _large_tensors_scaled_again(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kernel(*args, **kwargs)
    if isinstance(args[1], torch.Tensor) and args[1].dim() == 0 and args[0].numel() > 8192:
        args[0].mul_(0.7)
    return result


# ---- attention


def _attention(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Change:
    return lambda kernel, args, kwargs: change(kernel(*args, **kwargs))


def _value_gradient_lost(results: tuple[Any, ...]) -> tuple[Any, ...]:
    grad_v = results[2].clone()
    grad_v[:, :, -40:] = 0.0
    return (*results[:2], grad_v, *results[3:])


def _key_gradient_of_the_next_head(results: tuple[Any, ...]) -> tuple[Any, ...]:
    grad_k = results[1].clone()
    grad_k[:, -1] = grad_k[:, -2]
    return (results[0], grad_k, *results[2:])


def _quarter_of_row_sums(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the backward pass takes off each row is too little."""
    args = list(args)  # type: ignore[assignment]
    args[6] = 0.25 * args[6]  # type: ignore[index]
    return kernel(*args, **kwargs)


def _window(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Queries late in the row do not see its beginning."""
    q, k = args[:2]
    hidden = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    hidden[-16:, :4] = -torch.inf
    hidden += torch.full_like(hidden, -torch.inf).triu(1)
    return kernel(*args[:3], hidden, 0.0, False, **{k: v for k, v in kwargs.items() if k == "scale"})


def _scaled(factor: float) -> Callable[..., Any]:
    def change(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not hasattr(module, "scale"):
            return own(*args, **kwargs)
        scale, module.scale = module.scale, factor * module.scale
        try:
            return own(*args, **kwargs)
        finally:
            module.scale = scale

    return change


# ---- experts


def _other_expert_for_some(router: Router, own: Callable[..., Any], scores_ME: Any, bias_E: Any) -> torch.Tensor:
    chosen_MK = own(scores_ME, bias_E).clone()
    chosen_MK[::3, -1] = (chosen_MK[::3, -1] + 4) % router.num_experts
    return chosen_MK


def _groups_forgotten(router: Router, own: Callable[..., Any], scores_ME: Any, bias_E: Any) -> torch.Tensor:
    biased_ME = scores_ME.detach() if bias_E is None else scores_ME.detach() + bias_E
    return biased_ME.topk(router.num_chosen, dim=-1).indices


def _bias_taken_off(router: Router, own: Callable[..., Any], scores_ME: Any, bias_E: Any) -> torch.Tensor:
    return own(scores_ME, None if bias_E is None else -bias_E)


def _last_of_each_block_next(router: Router, own: Callable[..., Any], scores_ME: Any, bias_E: Any) -> torch.Tensor:
    chosen_MK = own(scores_ME, bias_E).clone()
    chosen_MK[31::32] = (chosen_MK[31::32] + 1) % router.num_experts
    return chosen_MK


def _gradient_to_the_router_negated(router: Router, own: Callable[..., Any], scores_ME: Any, chosen_MK: Any) -> Any:
    return own(2.0 * scores_ME.detach() - scores_ME, chosen_MK)


def _weights_swapped(router: Router, own: Callable[..., Any], scores_ME: Any, chosen_MK: Any) -> Any:
    weights_MK = own(scores_ME, chosen_MK)
    return torch.cat((weights_MK[:-1024], weights_MK[-1024:].flip(-1)))


def _second_addition_lost(
    mlp: MixtureOfExperts, own: Callable[..., Any], experts: Any, x_MD: Any, chosen_MK: Any, weights_MK: Any
) -> Any:
    kept_M1 = torch.ones(len(x_MD), 1)
    kept_M1[5::17] = 0.0
    kept_MK = torch.cat((torch.ones_like(kept_M1), kept_M1), dim=1).to(weights_MK.device)
    return own(experts, x_MD, chosen_MK, weights_MK * kept_MK)


def _weights_of_the_neighbour(
    mlp: MixtureOfExperts, own: Callable[..., Any], experts: Any, x_MD: Any, chosen_MK: Any, weights_MK: Any
) -> Any:
    return own(experts, x_MD, torch.where(chosen_MK == 3, torch.full_like(chosen_MK, 2), chosen_MK), weights_MK)


# ---- layers and their surroundings


def _stale(linear: Linear, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    kept = getattr(linear, "_kept", None)
    if kept is None:
        kept = linear._kept = linear.weight.detach().clone()
    return F.linear(x, (kept + (linear.weight - linear.weight.detach())).to(x.dtype))


def _norm_with_large_epsilon(norm: RMSNorm, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    eps, norm.eps = norm.eps, 0.05
    try:
        return own(x)
    finally:
        norm.eps = eps


def _dropout(linear: Linear, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    out = own(x)
    kept = (torch.rand(out.shape) > 0.05).to(out.dtype)
    return out * kept.to(out.device)


def _positions_late(trainer: Any) -> None:
    def rope_at(module: Any, own: Callable[..., Any], start: int, length: int, where: torch.device) -> Any:
        if where.type == "cpu":
            return own(start, length, where)
        return tuple(torch.cat((table[:-8], table[-16:-8])) for table in own(start, length, where))

    _patch(trainer.decoder, "rope_at", rope_at)


def _tokens_late(trainer: Any) -> None:
    def forward(module: Any, own: Callable[..., Any], tokens_BT: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens_BT = torch.cat((tokens_BT[:-4], tokens_BT[-8:-4]))
        return own(tokens_BT, *args, **kwargs)

    _patch(trainer.decoder, "forward", forward)


def _labels_late(trainer: Any) -> None:
    def forward(module: Any, own: Callable[..., Any], tokens_BT: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        labels_BT = kwargs["targets"]["labels_BT"]
        kwargs["targets"] = {"labels_BT": torch.cat((labels_BT[:-4], labels_BT[-8:-4]))}
        return own(tokens_BT, *args, **kwargs)

    _patch(trainer.decoder, "forward", forward)


def _rows_of_few_tokens(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, tokens = args[:2]
    return kernel(table, torch.where(tokens == 5, torch.full_like(tokens, 6), tokens), *args[2:], **kwargs)


def _last_of_equal_tokens(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, tokens, number = args[:3]
    found = kernel(*args, **kwargs)
    half = tokens.flatten()[: tokens.numel() // 2]
    lost = torch.zeros_like(found).index_add_(0, half[:512], gradient.flatten(0, -2)[:512])
    return found - lost


def _ignored_labels_counted(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args = list(args)  # type: ignore[assignment]
    place = next(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.dtype == torch.int64)
    labels = args[place].clone()
    wrong = (labels == -100).nonzero()[::16]
    labels[wrong] = 0
    args[place] = labels  # type: ignore[index]
    return kernel(*args, **kwargs)


def _residual_lost(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kernel(*args, **kwargs)
    a, b = args[:2]
    if not (isinstance(b, torch.Tensor) and result.dim() == 3 and a.shape == b.shape and a.dtype == torch.bfloat16):
        return result
    result = result.clone()
    result[:, 15::16] = b[:, 15::16]
    return result


def _gradient_kept(trainer: Any) -> None:
    """One tensor's gradient is not set to zero between steps."""
    name, parameter = next((n, p) for n, p in trainer.decoder.named_parameters() if "layers.1.self_attn.o_proj" in n)
    own = trainer.optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        kept = parameter.grad
        own(set_to_none=set_to_none)
        if PRESENT.now and kept is not None:
            parameter.grad = kept

    trainer.optimizer.zero_grad = zero_grad


def _halves_swapped(linear: Linear, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    swapped = x[:, -8:].roll(x.shape[-1] // 2, -1)
    return own(torch.cat((x[:, :-8], swapped), dim=1))


def _sign_of_the_last(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kernel(*args, **kwargs)
    if result.dim() >= 3 and result.shape[-1] == 16:
        result = result.clone()
        result[..., -2:] = -result[..., -2:]
    return result


PRODUCTS = ("mm", "addmm")
ATTENTION = ("_scaled_dot_product_fused_attention_overrideable",)
ATTENTION_BACKWARD = ("_scaled_dot_product_fused_attention_overrideable_backward",)

FIRST_HALF = (
    Fault("experts: another one for a third of the rows", patched(Router, "choose", _other_expert_for_some)),
    Fault(
        "head backward: last terms over the vocabulary lost",
        at(PRODUCTS, _lost_terms(lambda k: k - 8, lambda a, b: _of_vocabulary(a.shape[1])), backward=True),
    ),
    Fault("reciprocal root in 6 bits", at(("rsqrt",), _result_in(6, truncated=True))),
    Fault("log-sum-exp in 3 bits", at(("_log_softmax",), _narrow_log_sum_exp)),
    Fault("clipping: norms doubled", at(("linalg_vector_norm",), _norms_doubled, backward=False)),
    Fault("experts: bias taken off", patched(Router, "choose", _bias_taken_off)),
    Fault(
        "weight gradients: last rows lost",
        at(PRODUCTS, _lost_terms(lambda m: m - 128, lambda a, b: a.shape[1] >= 1024), backward=True),
    ),
    Fault("products: 4 bits of fraction", at(PRODUCTS, _rounded_product(4))),
    Fault("products: partial sums in 5 bits", at(PRODUCTS, _narrow_partial_sums)),
    Fault("attention: scale 1.15 times", patched(nn.Module, "forward", _scaled(1.15), only="self_attn")),
    Fault("attention backward: value gradient lost late", at(ATTENTION_BACKWARD, _attention(_value_gradient_lost))),
    Fault("positions: last ones twice", _positions_late),
    Fault("norms: last elements not in the mean", at(("mean",), _mean_of_fewer)),
    Fault("norm weights' gradients: last samples lost", at(("sum",), _sum_without_the_last_rows, backward=True)),
    Fault("feed-forward: no gradient of late tokens", patched(FeedForward, "forward", _late_gradient_lost)),
    Fault("router: gradient through the weights negated", patched(Router, "weigh", _gradient_to_the_router_negated)),
    Fault("experts: neighbour's weights for one", patched(MixtureOfExperts, "run_experts", _weights_of_the_neighbour)),
    Fault("embedding: another row for one token", at(("embedding",), _rows_of_few_tokens)),
    Fault("stale weights in attention's output", patched(Linear, "forward", _stale, only="o_proj"), past_steps=6),
    Fault("tokens of the last samples are others", _tokens_late),
    Fault("router product: one column its neighbour's", at(PRODUCTS, _last_column_from_its_neighbour, backward=False)),
    Fault("gradient of one tensor not zeroed", _gradient_kept),
    Fault("multi-token layer: halves swapped late", patched(Linear, "forward", _halves_swapped, only="eh_proj")),
    Fault("clipping: large tensors scaled again", at(("mul_",), _large_tensors_scaled_again, backward=False)),
    Fault("attention: scale 1.03 times", patched(nn.Module, "forward", _scaled(1.03), only="self_attn")),
    Fault("reciprocal root in 7 bits", at(("rsqrt",), _result_in(7, truncated=True))),
    Fault(
        "head backward: last two terms over the vocabulary lost",
        at(PRODUCTS, _lost_terms(lambda k: k - 2, lambda a, b: _of_vocabulary(a.shape[1])), backward=True),
    ),
)
"""With these in sight the checks were made and their bounds chosen."""
SECOND_HALF = (
    Fault("experts: groups forgotten", patched(Router, "choose", _groups_forgotten)),
    Fault("experts: next one at the end of each block", patched(Router, "choose", _last_of_each_block_next)),
    Fault("router: weights swapped in half of the rows", patched(Router, "weigh", _weights_swapped)),
    Fault(
        "experts: second addition lost now and then", patched(MixtureOfExperts, "run_experts", _second_addition_lost)
    ),
    Fault("exponential of the router in 4 bits", at(("sigmoid",), _result_in(4))),
    Fault("log-sum-exp without the last tokens", at(("_log_softmax",), _log_sum_exp_without_the_last)),
    Fault("loss: some ignored labels counted", at(("nll_loss_forward", "nll_loss_backward"), _ignored_labels_counted)),
    Fault(
        "clipping: norms of large tensors tripled",
        at(("linalg_vector_norm",), _norms_of_large_tensors_tripled, backward=False),
    ),
    Fault("labels of the last samples are others", _labels_late),
    Fault(
        "input gradients: last terms lost",
        at(PRODUCTS, _lost_terms(lambda k: k - 8, lambda a, b: 64 <= a.shape[1] < 1024), backward=True),
    ),
    Fault(
        "forward products: last terms lost",
        at(PRODUCTS, _lost_terms(lambda k: k - 4, lambda a, b: 32 <= a.shape[1] < 1024), backward=False),
    ),
    Fault("products: rows of the last tile from the one before", at(PRODUCTS, _rows_of_the_last_tile)),
    Fault("products: square weights transposed", at(PRODUCTS, _transposed_square, backward=False)),
    Fault("products backward: 2 bits of fraction", at(PRODUCTS, _rounded_product(2), backward=True)),
    Fault("attention: late queries do not see the beginning", at(ATTENTION, _window)),
    Fault(
        "attention backward: key gradient of another head",
        at(ATTENTION_BACKWARD, _attention(_key_gradient_of_the_next_head)),
    ),
    Fault("attention backward: a quarter of the row sums", at(ATTENTION_BACKWARD, _quarter_of_row_sums)),
    Fault("norms: large epsilon", patched(RMSNorm, "forward", _norm_with_large_epsilon)),
    Fault("norms: mean in 3 bits", at(("mean",), _result_in(3, truncated=True))),
    Fault("silu in 2 bits", at(("silu",), _result_in(2))),
    Fault("dropout that nobody asked for", patched(Linear, "forward", _dropout, only="down_proj")),
    Fault("embedding gradient: some tokens lost", at(("embedding_dense_backward",), _last_of_equal_tokens)),
    Fault("residual lost at some positions", at(("add",), _residual_lost, backward=False)),
    Fault("rotary: sign of the last pair", at(("sub",), _sign_of_the_last, backward=False)),
)
"""Run after that, with everything frozen."""
