"""Whether what a user's own subject gives can be qualified with: looked at once, before anything is recorded of it.

Each trace makes the model anew and compares it with other traces bit by bit or to a rounding, so a subject that draws
random numbers would have its own randomness for a noise floor, in which any fault hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from beringia.errors import InputError
from beringia.qualify.refusals import first_line
from beringia.qualify.subject import Subject

T = TypeVar("T")
_CPU = torch.device("cpu")
_ORDER = 2.0**-30
"""Of a tensor's largest number, that two passes in float64 may differ by: adding up 10^6 terms in another order costs
2^-43 of them in root mean square, and a random draw is seen in whole numbers."""


def check_subject(subject: Subject, batches: int) -> None:
    """Raise InputError for a subject that is not the same every time, or gives what no training step is made of."""
    models = [_given(subject, "make", subject.build) for _ in range(2)]
    _check_models(subject, *models)
    for number in range(batches):
        _check_batch(subject, number, _given(subject, f"batches({number})", partial(subject.batch, number)))
    if not _same(subject.batch(0), subject.batch(0), 0.0):
        raise _refusal(subject, "batches(0) gives other numbers the second time", "draw from the number")
    first, second = (_pass(subject, subject.place(model, _CPU, torch.float64)) for model in models)
    if not _same(first, second, _ORDER):
        differ = next(name for name in first if name not in second or not _equal(first[name], second[name], _ORDER))
        raise _refusal(
            subject,
            f"the {differ} differs between two passes over the same batch from the same weights, in float64 on the CPU",
            "it draws random numbers, as dropout does: set its probability to 0",
        )


def _check_models(subject: Subject, one: nn.Module, other: nn.Module) -> None:
    for model in (one, other):
        if not isinstance(model, nn.Module):
            raise _refusal(subject, f"make gives {_kind(model)}", "return a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in one.parameters()):
        raise _refusal(subject, "no parameter of its module requires a gradient", "there is nothing to train")
    own = {parameter.data_ptr() for parameter in one.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in own for parameter in other.parameters() if parameter.numel()):
        raise _refusal(
            subject, "make gives the same weights again and not a copy", "build a new module each time: each is trained"
        )
    if not _same(_state(one), _state(other), 0.0):
        raise _refusal(subject, "make gives other weights the second time", "seed what it draws")


def _check_batch(subject: Subject, number: int, batch: object) -> None:
    if not isinstance(batch, Mapping):
        raise _refusal(subject, f"batches({number}) gives {_kind(batch)}", "return a dictionary of tensors")
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            raise _refusal(
                subject, f"batches({number}) has {_kind(tensor)} as {name!r}", "leave it out, or make it a tensor"
            )


def _pass(subject: Subject, model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss, outputs and gradients of the first batch."""
    batch = subject.batch(0)
    loss = _given(subject, "compute_loss", lambda: subject.loss(model, batch))
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise _refusal(subject, f"compute_loss gives {_kind(loss)}", "return a tensor of one number")
    if not loss.requires_grad:
        raise _refusal(subject, "compute_loss gives a loss that no parameter has a gradient of", "do not detach it")
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    with torch.no_grad():
        outputs = _given(subject, "compute_outputs", lambda: subject.outputs(model, batch))
    if not isinstance(outputs, torch.Tensor):
        raise _refusal(subject, f"compute_outputs gives {_kind(outputs)}", "return one tensor")
    if not outputs.numel():
        raise _refusal(subject, "compute_outputs gives a tensor without elements", "return what is inferred")
    gradients = dict(_gradients(subject, model))
    return {"loss": loss.detach(), "outputs": outputs, **gradients}


def _gradients(subject: Subject, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            if parameter.grad.layout != torch.strided:
                raise _refusal(subject, f"the gradient of {name} is sparse", "make it dense (sparse=False)")
            yield f"gradient of {name}", parameter.grad


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _given(subject: Subject, what: str, give: Callable[[], T]) -> T:
    try:
        return give()
    except Exception as error:  # the user's own function
        raise _refusal(subject, f"{what} raised {first_line(error)}", "see above where") from error


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], apart: float) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name], apart) for name in one)


def _equal(one: torch.Tensor, other: torch.Tensor, apart: float) -> bool:
    """Within `apart` of the largest number; NaN and infinities in the same places."""
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.element_size() == 1:  # 8-bit floats have few operators
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    largest = one.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=apart * largest, equal_nan=True)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


def _refusal(subject: Subject, found: str, advice: str) -> InputError:
    return InputError(f"{subject.name} cannot be qualified with: {found} ({advice}).")
