"""What changed between two sets of weights: places and changes, nothing lost, compressed.

A bfloat16 weight moves only where its update exceeds about 1/256 of it, so at the learning rates of reinforcement
learning all but some per cent of the bits stay (verl's `delta_weight_sync.md` and miles's `disk_delta.py` report 1 to
3 %). Bits are compared, as whole numbers, so NaN and the sign of zero are like other numbers; a weight that moves does
so mostly by one of these, up or down.

The file is a safetensors file compressed by zstd. Of a tensor with few changes it has `<name>.skips`, how many numbers
stay before each that changes, a byte each (255: as many, and more), and `<name>.steps`, by how much its bits change,
their lower bytes first. Both are small numbers, which compress to little more than their entropy; places and values
would not. Of a tensor with many changes it has `<name>.whole`, of one without any, nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save

from beringia.errors import RunError

Tensors = Mapping[str, torch.Tensor]

_LEVEL = 3
"""Of compression: zstd's own. Higher ones take many times as long for a few per cent."""
MOST_CHANGED = 0.5
"""Share of a tensor's numbers from which on it is sent whole."""
_SKIPS, _STEPS, _WHOLE = ".skips", ".steps", ".whole"
_MORE = 255
"""A byte that says that as many stay, and that the next one goes on."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_whole(tensors: Tensors) -> bytes:
    """All of them. Raises ValueError where two share memory."""
    _check_apart(tensors)
    return _compressed({name + _WHOLE: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def encode_delta(before: Tensors, now: Tensors) -> bytes:
    """What `now` has otherwise than `before`. Raises ValueError where they are not the same tensors, by names, shapes
    and dtypes, or two of them share memory: a change would strike it twice."""
    _check_alike(before, now)
    _check_apart(now)
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in now.items():
        new, old = (_words(one.detach().cpu()) for one in (tensor, before[name]))
        places = (new != old).nonzero().flatten()
        if len(places) > MOST_CHANGED * new.numel():
            parts[name + _WHOLE] = tensor.detach().cpu().contiguous()
        elif len(places):
            parts[name + _SKIPS] = _skips(places)
            parts[name + _STEPS] = _by_bytes(new[places] - old[places])
    return _compressed(parts)


def _skips(places: torch.Tensor) -> torch.Tensor:
    between = places.diff(prepend=places.new_full((1,), -1)) - 1
    rest, more = between % _MORE, between // _MORE
    ends = (more + 1).cumsum(0) - 1
    skips = torch.full((int(ends[-1]) + 1,), _MORE, dtype=torch.uint8)
    skips[ends] = rest.to(torch.uint8)
    return skips


def _places(skips: torch.Tensor) -> torch.Tensor:
    ends = skips != _MORE
    if not bool(ends[-1:].all()):
        raise ValueError("its last skip has no end")
    return skips.long().cumsum(0)[ends] + torch.arange(int(ends.sum()))


def _by_bytes(words: torch.Tensor) -> torch.Tensor:
    """Of N words their lowest bytes, then the next, and so on: bytes N."""
    return words.view(torch.uint8).view(len(words), -1).T.contiguous()


def apply(content: bytes, held: dict[str, torch.Tensor]) -> None:
    """Write what a file says into tensors on the CPU, in place; those that it has no change for stay. Nothing is
    written where it cannot be applied as a whole. Raises RunError where it does not fit them, or is damaged."""
    try:
        parts = load(zstandard.ZstdDecompressor().decompress(content))
        changes = [_change(name, parts, held) for name in parts if not name.endswith(_STEPS)]
    except (zstandard.ZstdError, SafetensorError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise RunError(f"The weights cannot be applied to those that are held: {str(error).splitlines()[0]}.") from None
    for words, places, change in changes:
        if places is None:
            words.copy_(change)
        else:
            words[places] += change


def _change(part: str, parts: Tensors, held: Tensors) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The words of a held tensor, which of them change (None: to other ones), and by what."""
    name, _, kind = part.rpartition(".")
    tensor = held[name]
    if not tensor.is_contiguous():
        raise ValueError(f"{name} does not lie in one piece")
    words = _words(tensor)
    if f".{kind}" == _WHOLE:
        whole = parts[part]
        if (whole.dtype, whole.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name} is {_form(whole)}, and {_form(tensor)} is held")
        return words, None, _words(whole)
    places, steps = _places(parts[part]), parts[name + _STEPS]
    if steps.dtype != torch.uint8 or steps.shape != (words.element_size(), len(places)):
        raise ValueError(f"{name} has {_form(steps)} for {len(places)} places")
    if len(places) and int(places[-1]) >= len(words):
        raise ValueError(f"{name} has {len(words)} numbers, and others are to change")
    return words, places, steps.T.contiguous().flatten().view(words.dtype)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element as a whole number, in one row; of a contiguous tensor a view."""
    flat = tensor.reshape(-1)
    return flat.view(_WORDS[tensor.element_size()])


def _compressed(parts: dict[str, torch.Tensor]) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(save(parts))


def _check_alike(before: Tensors, now: Tensors) -> None:
    if before.keys() != now.keys():
        raise ValueError(f"not the same tensors: {', '.join(sorted(before.keys() ^ now.keys())[:3])}")
    for name, tensor in now.items():
        if (tensor.dtype, tensor.shape) != (before[name].dtype, before[name].shape):
            raise ValueError(f"{name} is {_form(tensor)} and was {_form(before[name])}")


def _check_apart(tensors: Tensors) -> None:
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            other = owner.setdefault(tensor.untyped_storage().data_ptr(), name)
            if other != name:
                raise ValueError(f"{other} and {name} share memory: give a tied weight under one of its names")


def _form(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
