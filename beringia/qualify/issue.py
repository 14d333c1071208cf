"""A certificate on disk: signed JSON, and where its page and its JUnit report go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from beringia.errors import Inconclusive, Refusal
from beringia.records.certificate import Certificate
from beringia.records.signature import Signed, load_or_create_key, sign, write_signed


@dataclass(frozen=True)
class Issued:
    """What was written, and where the rest belongs."""

    signed: Signed[Certificate]
    paths: dict[str, str]
    """`certificate`, `page`, `junit`."""


def issue(certificate: Certificate, directory: Path, key: Path | None = None, *, dtype_asked: bool = False) -> Issued:
    """Sign a certificate and write it; its name is that of chip and model, with what it is for where that is not what
    is asked by default: some of the layers, another vocabulary, another seed, a dtype that was named."""
    stem = _stem(certificate, dtype_asked)
    signed = sign(certificate, load_or_create_key(key))
    write_signed(directory / f"{stem}.json", signed)
    parts = {"certificate": "json", "page": "html", "junit": "xml"}
    return Issued(signed, {part: str(directory / f"{stem}.{suffix}") for part, suffix in parts.items()})


def _stem(certificate: Certificate, dtype_asked: bool) -> str:
    words = [certificate.chip, certificate.model.name]
    words += [] if certificate.layers is None else [f"layers-{certificate.layers}"]
    size = certificate.model.vocabulary_size
    words += [] if size is None else [f"vocabulary-{size}"]
    words += [f"seed-{certificate.seed}"] if certificate.seed else []
    words += [certificate.compute_dtype] if dtype_asked else []
    return "-".join(words).replace(":", "-").replace("/", "-").replace("@", "-")


def exit_code(certificate: Certificate, use: Literal["train", "infer"]) -> int:
    """0 where the chip may be used so, 3 where it may not, 4 where that is open."""
    if certificate.allows(use):
        return 0
    is_open = certificate.verdict == "inconclusive" and not certificate.rules_out(use)
    return Inconclusive.exit_code if is_open else Refusal.exit_code
