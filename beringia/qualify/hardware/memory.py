"""Does the memory hold what is written to it, and how much of it is there.

As much as the limit allows is taken in blocks; each pattern is written to all of them before any is read back, so that
two addresses that reach the same cell disagree. Patterns are made of one *tile* of 32-bit words, computed on the CPU
and copied to the device, and of one key for each block, which the device combines with the tile by exclusive or. So
nothing rests on the chip's integer products (some chips have none of 64 bits), what is expected is known without the
chip, and the host's link carries one tile and not the whole memory. At the end one bit is changed on purpose: a check
that does not find it has shown nothing.

Does not control which physical address a block gets, and does not test memory that other processes hold. The memory of
a CPU and of an emulated chip is the host's: only a share of what is free is taken there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from beringia.chips.chip import Chip
from beringia.chips.cpu import taken_memory_bytes, total_memory_bytes
from beringia.chips.datasheets import datasheet_of_device
from beringia.qualify.exact_measures import bytes_in_words, none_allowed
from beringia.qualify.refusals import says_no_memory
from beringia.records.certificate import ProbeResult
from beringia.records.record import canonical_hash

BLOCK_BYTES = 64 * 2**20
"""Large enough that a device spends its time on memory, small enough to be a small share of it."""
HOST_SHARE = 1 / 8
HOST_LIMIT_BYTES = 2 * 2**30
"""Of the host's free memory at most this share, and at most so much: others work there."""
_RESERVED_BLOCKS = 4
"""Given back when a device is full: the comparison needs room for its results."""
_WORD_BYTES = 4
_BYTE_SHIFTS = (0, 8, 16, 24)


@dataclass(frozen=True)
class Pattern:
    """What the words of the tested memory hold: in block b the tile's words, each exclusive-or `key(b)`."""

    name: str
    tile: torch.Tensor
    """On the CPU, int32."""
    complement: bool
    by_block: bool
    """Whether each block has a key of its own; else blocks alternate between the tile and its complement."""

    def key(self, block: int) -> int:
        """As a signed 32-bit integer."""
        key = int(canonical_hash(["key of a block", block])[:8], 16) - 2**31 if self.by_block else -(block % 2)
        return ~key if self.complement else key


@dataclass(frozen=True)
class Found:
    """What came back of one pattern."""

    wrong_bytes: int
    first_address: int | None
    """Bytes from the beginning of the tested memory."""
    first_written: int = 0
    first_read: int = 0


def probe_memory(chip: Chip, *, limit_bytes: int | None = None) -> list[ProbeResult]:
    """How much memory there is beside what the chip says, and whether it holds patterns.

    Takes at most `limit_bytes` and all that a device has, or a share of the host's free memory.
    """
    began = time.perf_counter()
    most = most_bytes(chip)
    wanted = most if limit_bytes is None else min(limit_bytes, most)
    blocks, full = _take(chip, wanted)
    if not blocks:
        return [_nothing_taken(chip, wanted)]
    tested = sum(block.numel() for block in blocks) * _WORD_BYTES
    capacity = _capacity(chip, tested, full, limit_bytes if wanted != limit_bytes else None)
    found = {pattern.name: _write_and_read(pattern, blocks) for pattern in patterns(blocks[0].numel())}
    sensitive = _finds_a_changed_bit(blocks)
    chip.synchronize()
    return [capacity, _verdict(found, tested, sensitive, time.perf_counter() - began)]


def most_bytes(chip: Chip) -> int:
    """All that a device has; of the host, a share of what is free."""
    if _is_host_memory(chip):
        free = max(0, total_memory_bytes() - taken_memory_bytes())
        return int(min(HOST_SHARE * free, HOST_LIMIT_BYTES))
    return chip.memory().total_bytes


def patterns(words: int) -> list[Pattern]:
    """For blocks of so many words. Hash and complement give every cell both values, and every address another word;
    walking bits put one line against all others."""
    numbers = torch.arange(words, dtype=torch.int64)
    # Fibonacci hashing: neighbours differ in half of their bits. Below 2^31 * 2^32, so nothing overflows.
    hashed = ((numbers * 0x9E3779B1) & 0xFFFFFFFF).sub_(2**31).to(torch.int32)
    walking = torch.bitwise_left_shift(torch.ones(words, dtype=torch.int32), (numbers % 32).to(torch.int32))
    return [
        Pattern("hash of the address", hashed, complement=False, by_block=True),
        Pattern("complement of the hash", hashed, complement=True, by_block=True),
        Pattern("walking one", walking, complement=False, by_block=False),
        Pattern("walking zero", walking, complement=True, by_block=False),
    ]


def _is_host_memory(chip: Chip) -> bool:
    return chip.device.type == "cpu" or chip.identity.truth == "emulated"


def _take(chip: Chip, limit_bytes: int) -> tuple[list[torch.Tensor], bool]:
    """Blocks up to the limit, and whether the chip had no more to give."""
    size = min(BLOCK_BYTES, limit_bytes) // _WORD_BYTES
    blocks: list[torch.Tensor] = []
    if size == 0:
        return blocks, False
    try:
        for _ in range(limit_bytes // (size * _WORD_BYTES)):
            blocks.append(torch.empty(size, dtype=torch.int32, device=chip.device))
        chip.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not says_no_memory(error):
            raise
        return blocks[:-_RESERVED_BLOCKS], True
    return blocks, False


def _write_and_read(pattern: Pattern, blocks: list[torch.Tensor]) -> Found:
    tile = pattern.tile.to(blocks[0].device)
    for number, block in enumerate(blocks):
        torch.bitwise_xor(tile, pattern.key(number), out=block)
    found = _read(pattern, tile, enumerate(blocks))
    return found if torch.equal(tile.cpu(), pattern.tile) else _tile_is_wrong(pattern, tile)


def _read(pattern: Pattern, tile: torch.Tensor, blocks: Iterable[tuple[int, torch.Tensor]]) -> Found:
    """Compared on the device; the first block, and every one that differs, on the CPU too, which decides."""
    wrong, first = 0, None
    for number, block in blocks:
        same = torch.equal(torch.bitwise_xor(block, pattern.key(number)), tile)
        if same and number > 0:
            continue
        read, written = block.cpu(), torch.bitwise_xor(pattern.tile, pattern.key(number))
        differing = torch.bitwise_xor(read, written)
        wrong += _wrong_bytes(differing)
        if first is None and bool(differing.any()):
            first = next(_differences(number * block.numel(), differing, written, read))
    return Found(wrong, *(first or (None,)))


def _differences(
    offset: int, differing: torch.Tensor, written: torch.Tensor, read: torch.Tensor
) -> Iterator[tuple[int, int, int]]:
    """Address in bytes, what was written, what was read."""
    for word in differing.nonzero().flatten():
        index, bits = int(word), int(differing[word])
        byte = next(place for place, shift in enumerate(_BYTE_SHIFTS) if (bits >> shift) & 0xFF)
        yield (offset + index) * _WORD_BYTES + byte, int(written[word]) & 0xFFFFFFFF, int(read[word]) & 0xFFFFFFFF


def _wrong_bytes(differing: torch.Tensor) -> int:
    return int(differing.view(torch.uint8).count_nonzero())


def _tile_is_wrong(pattern: Pattern, tile: torch.Tensor) -> Found:
    """The tile lies in the same memory: what was compared with it has to be called wrong as well."""
    read = tile.cpu()
    differing = torch.bitwise_xor(read, pattern.tile)
    return Found(_wrong_bytes(differing), *next(_differences(0, differing, pattern.tile, read)))


def _finds_a_changed_bit(blocks: list[torch.Tensor]) -> bool:
    """Whether reading notices one bit that is changed in the last block, which still holds the last pattern."""
    last = patterns(blocks[0].numel())[-1]
    blocks[-1][-1:].bitwise_xor_(1 << 17)
    return _read(last, last.tile.to(blocks[-1].device), [(len(blocks) - 1, blocks[-1])]).wrong_bytes > 0


def _capacity(chip: Chip, tested: int, full: bool, refused: int | None) -> ProbeResult:
    """`refused`: what was asked for, where that was too much."""
    stated = chip.memory()
    parts = [f"The chip says that it has {bytes_in_words(stated.total_bytes)}"]
    sheet = datasheet_of_device(chip.identity.sku) if chip.identity.truth == "real" else None
    if sheet is not None and sheet.memory.capacity is not None:
        published = sheet.memory.capacity
        share = stated.total_bytes / published.base
        parts.append(
            f"its datasheet {published.value:g} {published.unit} ({published.mark}), of which that is {share:.1%}"
        )
    if full:
        parts.append(f"{bytes_in_words(tested)} could be taken before it had no more")
    else:
        host = ", as its numbers lie in the host's memory" if _is_host_memory(chip) else ""
        parts.append(f"{bytes_in_words(tested)} of it were taken{host}")
    if refused is not None:
        most = "a larger share of the host's free memory is not tested" if _is_host_memory(chip) else "it has no more"
        parts.append(f"{bytes_in_words(refused)} were asked for, and {most}")
    return ProbeResult(probe="memory", subject="capacity", outcome="told", summary=f"{'; '.join(parts)}.")


def _verdict(found: dict[str, Found], tested: int, sensitive: bool, seconds: float) -> ProbeResult:
    wrong = sum(result.wrong_bytes for result in found.values())
    measure = none_allowed("wrong bytes", wrong, "memory gives back the bits that were written to it", "bytes")
    amount = f"{bytes_in_words(tested)} with {len(found)} patterns ({', '.join(found)})"
    if wrong:
        outcome, summary = "failed", _sentence_of_first(found, wrong, amount)
    elif not sensitive:
        outcome, summary = "inconclusive", f"A bit that was changed on purpose was not found after testing {amount}."
    else:
        outcome, summary = "passed", f"Every byte of {amount} came back as written."
    return ProbeResult.model_validate(
        {
            "probe": "memory",
            "subject": "patterns",
            "outcome": outcome,
            "rules_out": "infer",
            "summary": summary,
            "measures": (measure,),
            "seconds": seconds,
        }
    )


def _sentence_of_first(found: dict[str, Found], wrong: int, amount: str) -> str:
    name, first = next((name, result) for name, result in found.items() if result.wrong_bytes)
    return (
        f"{wrong} bytes came back wrong in {amount}; the first at byte {first.first_address:#x} with {name!r}: "
        f"written {first.first_written:#010x}, read {first.first_read:#010x}."
    )


def _nothing_taken(chip: Chip, wanted: int) -> ProbeResult:
    return ProbeResult(
        probe="memory",
        subject="patterns",
        outcome="inconclusive",
        rules_out="infer",
        summary=f"No memory could be tested: {bytes_in_words(wanted)} were wanted, and {chip.name} gave none.",
    )
