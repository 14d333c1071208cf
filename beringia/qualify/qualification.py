"""Qualifies a chip for a model: a bundle (given, or made on this machine), the probes in the chip's own process, the
verdict, the signed certificate.

Two chips are two processes, also on one machine: the reference's writes a bundle, the candidate's reads it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from beringia.chips.chip import Chip
from beringia.chips.cpu import Cpu
from beringia.errors import InputError, Refusal
from beringia.machine.aside import scratch_directory
from beringia.model import PRESETS
from beringia.processes.command import Command, check_command
from beringia.qualify.arithmetic.indices import probe_indices
from beringia.qualify.bundle import BundleManifest, origin_of, read_bundle, read_trusted
from beringia.qualify.candidate import Extent, probe_candidate
from beringia.qualify.effects import power_of
from beringia.qualify.evidence import Opened, QualifyOrder, Unrepeatable
from beringia.qualify.far_chip import FarChip
from beringia.qualify.hardware.collective_cases import COLLECTIVES
from beringia.qualify.hardware.collectives import DEVICES, NEEDED
from beringia.qualify.hardware.collectives_work import CollectivesOrder, collectives_at
from beringia.qualify.locate import first_wrong, locate
from beringia.qualify.probing import Evidence, gather
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import DecoderSubject, Subject
from beringia.qualify.trace import TraceExtent
from beringia.qualify.verdict import judge
from beringia.records.certificate import NO_COLLECTIVES, Certificate, Located, OperatorCheck, ProbeResult
from beringia.records.identity import ChipIdentity
from beringia.records.inputs import weights_of
from beringia.records.record import canonical_hash
from beringia.records.signature import Signed, load_or_create_key, public_key_of
from beringia.version import __version__

REFERENCE = "cpu"
PLAN = TraceExtent()
_KEPT_BEYOND = 200
"""Calls beyond their bounds that a certificate lists; of the others, for each module and operator the worst."""

_RANKS = {"quick": 2, "whole": 4}


@dataclass(frozen=True)
class Request:
    """What is to be qualified, and how."""

    chip: str
    model: str
    faults: str | None = None
    seed: int = 0
    layers: int | None = None
    vocabulary_size: int | None = None
    """Of a preset that is trained with another one than its own; None: its own."""
    compute_dtype: str | None = None
    batches: int = 6
    steps: int = 6
    extent: Literal["quick", "whole"] = "quick"
    """How many ways of serving and training are tried (`serving.py`)."""
    samples: int = 4
    tokens: int = 64
    run_tokens: int | None = None
    """In a sample of the run that it is for."""
    longest: int = 8200
    memory_bytes: int = 16 * 2**20
    soak_seconds: float = 0.0
    speed: bool = False
    collectives: bool = True
    ranks: int | None = None
    """Devices that the collectives are tried on; None: as the extent has it."""
    patience_seconds: float = 900.0
    command: Command = Command("the chip")
    """How its machine is reached, and where files are there."""
    key: Path | None = None
    """Private key that a bundle made here is signed with; None: this machine's."""
    trusted_keys: tuple[str, ...] = ()
    """Public keys of those whose bundles are believed; none: this machine's."""
    given: frozenset[str] = frozenset()
    """Names of the fields above that a bundle must have as they are here; in all others it decides."""

    @property
    def ranks_tried(self) -> int:
        """Devices that the collectives are tried on, if there are as many."""
        return self.ranks or _RANKS[self.extent]

    def order(self, task: Literal["describe", "reference", "candidate"], bundle: Path) -> QualifyOrder:
        """What the process is to do."""
        reference = task == "reference"
        return QualifyOrder(
            task=task,
            chip=self.chip,
            faults=None if reference else self.faults,
            model=self.model,
            seed=self.seed,
            samples=self.samples,
            tokens=self.tokens,
            layers=self.layers,
            vocabulary_size=self.vocabulary_size,
            compute_dtype=self.compute_dtype,
            bundle=str(bundle),
            batches=self.batches,
            steps=self.steps,
            extent=self.extent,
            run_tokens=self.run_tokens,
            longest=self.longest,
            memory_bytes=self.memory_bytes,
            soak_seconds=self.soak_seconds,
            speed=self.speed,
            key=None if self.key is None else str(self.key.absolute()),
        )


Say = Callable[[str], None]


def record_reference(
    request: Request, bundle: Path, limit_bytes: int, say: Say = lambda text: None
) -> Signed[BundleManifest]:
    """`beringia reference`: record the request's chip, on this machine, into a bundle; what it says, signed.

    Raises Refusal for a chip that is not sound.
    """
    with scratch_directory() as directory:
        order = request.order("reference", bundle.absolute())
        order = order.model_copy(update={"limit_bytes": limit_bytes})
        log = directory / "reference.log"
        gather(order, request.command, log, patience_seconds=request.patience_seconds, say=say)
    return read_trusted(bundle, (public_key_of(load_or_create_key(request.key)),))


def request_for(chip: Chip, model: str, seed: int) -> Request:
    """To qualify, in processes of its own, a chip that is open in this one. Raises InputError where those would open
    another."""
    opening = chip.opening
    different = {
        f"device {opening.index}, and they open device 0": opening.index and chip.device.type != "cpu",
        f"seed {opening.seed}, and they open it with {seed}": opening.faults and opening.seed != seed,
        "a memory of the faults that have struck, which they lack": opening.faults and opening.remembers,
    }
    found = next((what for what, holds in different.items() if holds), None)
    if found is not None:
        raise InputError(
            f"{chip.name} was to be certified for {model} in processes of its own, but it was opened with {found}: "
            "open it as they do, or give the model as a Subject, which is qualified on the opened chip."
        )
    return Request(chip.name, model, faults=opening.faults, seed=seed)


def qualify(
    request: Request, against: Path | None = None, say: Say = lambda text: None, *, opened: ChipIdentity | None = None
) -> Certificate:
    """The certificate of a chip, not signed yet.

    `against` is a bundle from another machine; None makes one here, on the CPU. `opened`: which chip it must be. Raises
    an InputError where the user has to change something: a model that does not fit, a bundle of another model, another
    chip.
    """
    began = time.perf_counter()
    check_command(request.command)
    with scratch_directory() as directory:
        bundle = against if against is not None else reference_for(request, directory, say)
        own = public_key_of(load_or_create_key(request.key))
        signed = read_trusted(bundle, request.trusted_keys if against is not None and request.trusted_keys else (own,))
        request = _as_recorded(request, signed.record, bundle)
        say("probing the chip")
        far = FarChip.of(request.command, directory, request.patience_seconds)
        origin = origin_of(signed)
        order = request.order("candidate", bundle.absolute()).model_copy(
            update={"bundle_hash": origin.hash, "recompute": signed.public_key != own}
        )
        order = far.sent(order)
        evidence = far.gather(order, say)
        assert evidence.opened is not None
        _check_same(request.chip, evidence.opened.identity, opened)
        probes = [*evidence.probes, *_in_processes_of_their_own(far, request, order, evidence, say)]
    weights = None if request.model in PRESETS else weights_of(request.model)
    return _certificate(request, signed, evidence, probes, weights, time.perf_counter() - began)


def _check_same(name: str, found: ChipIdentity, wanted: ChipIdentity | None) -> None:
    if wanted is None or found.hash == wanted.hash:
        return
    differences = "; ".join(
        f"{what} {here} here, {there} there" for what, (here, there) in wanted.differences(found).items()
    )
    raise InputError(
        f"{name}, open in this process, was to be certified, but a process of its own finds another chip "
        f"({differences}): open it with the same settings and environment, or give the chip's name to certify what "
        "that process finds."
    )


def qualify_here(chip: Chip, subject: Subject, plan: TraceExtent = PLAN, say: Say = lambda text: None) -> Certificate:
    """The certificate of an opened chip for a model of the caller's own, in this process.

    The reference is the CPU in the chip's compute dtype. Where a kernel of it is not sound in 16 bits (torch's layer
    norm, whose gradients are off by 1 % from 200 rows on), a module of one's own is compared with float64's results,
    rounded, and the certificate names that as the reference. Without the probes that need processes of their own.
    """
    began = time.perf_counter()
    with scratch_directory() as directory:
        path = directory / "reference.bundle"
        _record_here(subject, chip.capabilities.compute_dtype, path, plan, say)
        bundle, signed = read_bundle(path), read_trusted(path, (public_key_of(load_or_create_key()),))
    dtype = bundle.manifest.compute_dtype
    evidence = Evidence(opened=Opened(name=chip.name, identity=chip.identity, compute_dtype=dtype), complete=True)
    for line in probe_candidate(chip, subject, bundle, Extent(0, 0, 0.0, False)):
        evidence.take(line)
    request = Request(chip.name, subject.name, seed=subject.seed)
    weights = None if subject.directory is None else weights_of(subject.directory)
    return _certificate(request, signed, evidence, evidence.probes, weights, time.perf_counter() - began)


def _record_here(subject: Subject, dtype: torch.dtype, path: Path, plan: TraceExtent, say: Say) -> None:
    try:
        make_bundle(subject, Cpu(), dtype, path, plan=plan, say=say)
    except Refusal as unsound:
        # A preset or directory may be given a bundle of another machine.
        if isinstance(subject, DecoderSubject) or dtype.itemsize != torch.bfloat16.itemsize:
            raise
        say(f"{unsound} So float64's results, rounded, are the reference")
        make_bundle(subject, Cpu(), dtype, path, plan=plan, say=say, rounded=True)


def describe(request: Request, directory: Path) -> Opened:
    """Which chip the request's is, opened in a process of its own; logs go to `directory`. Raises what opening it
    raises."""
    directory.mkdir(parents=True, exist_ok=True)
    far = FarChip.of(request.command, directory, request.patience_seconds)
    order = request.order("describe", Path()).model_copy(update={"model": ""})  # which it is not asked for
    described = far.gather(far.sent(order))
    assert described.opened is not None
    return described.opened


def reference_for(request: Request, directory: Path, say: Say = lambda text: None) -> Path:
    """A bundle of the CPU, in the dtype that the candidate computes in; made in `directory` unless it lies there, made
    for the same request and the same weights."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = request.compute_dtype
    if dtype is None:
        dtype = describe(request, directory).compute_dtype
    order = request.order("reference", Path()).model_copy(update={"chip": REFERENCE, "compute_dtype": dtype})
    weights = None if request.model in PRESETS else weights_of(request.model)
    bundle = directory / f"reference-{dtype}-{canonical_hash([order.model_dump(mode='json'), weights])[:16]}.bundle"
    if bundle.exists() and _is_own(bundle, request.key):
        return bundle
    here = order.model_copy(update={"bundle": str(bundle.absolute())})
    begun = _begun_by("recording the reference", say)
    gather(here, Command("the reference"), directory / "reference.log", say=begun)
    return bundle


def _is_own(bundle: Path, key: Path | None) -> bool:
    """Whether it can be read and was made with this key; otherwise it is made anew: it may have come with a run's
    directory from another machine, or be of another version."""
    try:
        read_trusted(bundle, (public_key_of(load_or_create_key(key)),))
    except (InputError, Refusal):
        return False
    return True


def _begun_by(stage: str, say: Say) -> Say:
    """Says the stage before the first thing that is said of it: what is refused before it began is one sentence."""
    first = itertools.count()

    def relay(text: str) -> None:
        if next(first) == 0:
            say(stage)
        say(text)

    return relay


def _as_recorded(request: Request, manifest: BundleManifest, bundle: Path) -> Request:
    """The request with what the bundle fixes. Raises InputError where the bundle is of another model, or has other
    values than were given."""
    same = {
        "seed": manifest.seed,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
        "layers": manifest.layers,
        # A directory has the vocabulary that it has: one of another size is seen as another configuration below.
        "vocabulary_size": manifest.model.vocabulary_size if request.model in PRESETS else None,
        "compute_dtype": manifest.compute_dtype,
        "batches": manifest.batches,
        "steps": manifest.steps,
        "extent": manifest.extent,
        "run_tokens": manifest.run_tokens,
    }
    _check_given(request, same, bundle)
    request = replace(request, **same)  # type: ignore[arg-type]  # fields of the same names and types
    own = DecoderSubject(
        request.model, request.seed, layers=request.layers, vocabulary_size=request.vocabulary_size
    ).fingerprint()
    if (own.configuration, own.weights) != (manifest.model.configuration, manifest.model.weights):
        what = "weights" if own.configuration == manifest.model.configuration else "configuration"
        raise InputError(
            f"The bundle {bundle} is of {manifest.model.name}, and --model {request.model} has another {what}: "
            "give the model that the bundle was made of, or make a bundle of this one."
        )
    return request


_FLAGS = {"compute_dtype": "--dtype", "vocabulary_size": "--vocabulary"}
"""Of the command line, where they are not called as the field is."""


def _check_given(request: Request, fixed: Mapping[str, Any], bundle: Path) -> None:
    different = [name for name in fixed if name in request.given and getattr(request, name) != fixed[name]]
    if different:
        asked, found = (
            ", ".join(f"{_FLAGS.get(name, f'--{name}')} {_value(values[name])}" for name in different)
            for values in (vars(request), fixed)
        )
        raise InputError(
            f"{asked} was given, but the bundle {bundle} was recorded with {found}: leave it out, or make a bundle "
            "with what you want."
        )


def _value(value: Any) -> str:
    return "all" if value is None else str(value)


def _in_processes_of_their_own(
    far: FarChip, request: Request, order: QualifyOrder, evidence: Evidence, say: Say
) -> list[ProbeResult]:
    """Probes that may break a process: several ranks, indices out of range. Only on a chip that got through the
    rest."""
    if not evidence.complete:
        return []
    say("indices")
    results = probe_indices(order.chip, faults=order.faults, command=far.command, log=far.log("indices"))
    if request.collectives:
        say("collectives")
        asked = CollectivesOrder(
            chip=order.chip, faults=order.faults, seed=request.seed, ranks=request.ranks_tried, bandwidth=request.speed
        )
        results += collectives_at(far.command, asked, far.log("collectives"))
    return results


def _certificate(
    request: Request,
    signed: Signed[BundleManifest],
    evidence: Evidence,
    probes: list[ProbeResult],
    weights: str | None,
    seconds: float,
) -> Certificate:
    manifest = signed.record
    opened = evidence.opened
    assert opened is not None
    power = power_of(manifest.batches)
    located = located_in(evidence)
    judgement = judge(probes, located, power, evidence.departure)
    not_reached = _not_reached(manifest, probes)
    return Certificate(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        beringia=__version__,
        chip=opened.name,
        identity=opened.identity,
        identity_hash=opened.identity.hash,
        reference=manifest.reference,
        bundle=origin_of(signed),
        model=manifest.model.model_copy(
            update={"name": request.model if request.model in PRESETS else Path(request.model).name}
        ),
        layers=manifest.layers,
        weight_files=weights,
        compute_dtype=manifest.compute_dtype,
        seed=request.seed,
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        mitigations=judgement.mitigations,
        power=power,
        first_wrong=located,
        first_departure=evidence.departure,
        extent=manifest.extent,
        scenarios=tuple(scenario for scenario in manifest.scenarios if scenario not in not_reached),
        untried=(*not_reached, *manifest.untried, *_untried_collectives(request, probes)),
        probes=tuple(probes),
        operators=_worth_keeping(evidence.checks),
        seconds=seconds,
    )


def _not_reached(manifest: BundleManifest, probes: list[ProbeResult]) -> tuple[str, ...]:
    """Scenarios of the bundle that the chip, which lacks an operator or raised something, was not tried in."""
    subjects = {probe.subject for probe in probes if probe.probe == "lockstep"}
    trained = any(subject.startswith("accumulated ") for subject in subjects)
    return tuple(one for one in manifest.scenarios if not trained and f"serve {one}" not in subjects)


def _untried_collectives(request: Request, probes: list[ProbeResult]) -> tuple[str, ...]:
    """A clause, for who reads a certificate."""
    found = {probe.subject: probe.outcome for probe in probes if probe.probe == "collectives"}
    # One that was refused is told, or an open question: nothing was tried of it.
    tried = {subject.split(",")[0] for subject, outcome in found.items() if outcome in ("passed", "failed")}
    if not tried & set(COLLECTIVES):
        return (NO_COLLECTIVES,)
    more = "" if DEVICES in found else "more than "
    refused = () if NEEDED in tried else (f"collectives that add up over ranks ({NEEDED}), which the chip refuses",)
    return (*refused, f"collectives on {more}{request.ranks_tried} ranks")


def located_in(evidence: Evidence) -> Located | None:
    """The first wrong operator of the evidence, or else the first that does not repeat itself."""
    check = first_wrong(evidence.checks)
    if check is not None:
        return locate(check, repeatable=evidence.unrepeatable is None)
    if evidence.unrepeatable is None or not evidence.unrepeatable.operator:
        return None
    return locate(_of_place(evidence.unrepeatable, evidence.checks), repeatable=False)


def _of_place(place: Unrepeatable, checks: list[OperatorCheck]) -> OperatorCheck:
    key = (place.module, place.operator, place.direction, place.ordinal)
    seen = [check for check in checks if (check.module, check.operator, check.direction, check.ordinal) == key]
    if seen:
        return seen[0]
    return OperatorCheck.model_validate(
        place.model_dump(exclude={"kind"})
        | {"position": 0, "shapes": (), "dtype": "", "basis": "the same bits every time", "error": None, "measures": ()}
    )


def _worth_keeping(checks: list[OperatorCheck]) -> tuple[OperatorCheck, ...]:
    """For each module, operator and direction the worst call, and those beyond their bounds, in order."""
    worst: dict[tuple[str, str, str], OperatorCheck] = {}
    for check in checks:
        key = (check.module, check.operator, check.direction)
        if key not in worst or check.used > worst[key].used:
            worst[key] = check
    beyond = [check for check in checks if check.used > 1.0][:_KEPT_BEYOND]
    kept = {id(check) for check in (*worst.values(), *beyond)}
    return tuple(check for check in checks if id(check) in kept)
