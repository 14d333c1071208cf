"""Whether faults are found that nobody qualified against, in trained models, too, and sound stacks are spared.

    python -m benchmarks.qualify_foreign --models DIR --half first --store /tmp/foreign.jsonl --json

DIR is where `benchmarks/foreign/models.py` put its models. Faults are planted outside the emulator's fault module
(`foreign/faults.py`), harm is measured by a script of its own (`foreign/harm.py`), sound variants of chips and software
are in `foreign/clean.py`. Each is qualified in this process with what `beringia qualify` uses. Results go to the store
one by one, so an interrupted benchmark goes on; bundles and the sound chips' errors are kept in `--bundles`.

**The right verdict** of clear harm to inference is unfit, of clear harm to training alone infer. A fault of moderate
harm must not be accepted, a harmless one not be refused, a sound variant neither refused nor, but for few, left open.
With `--references N`, chips with N of the faults of clear harm, each of another kind, are also asked for a bundle: none
may write one, and each must be told what is wrong.

**The right place** of a wrong operator is that operator; of wrong code the module, or the quantity, that it reaches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks.foreign import clean, faults
from benchmarks.foreign.harm import CLEAR, HARMLESS, Harm, Yardstick
from beringia.chips.chip import Chip
from beringia.chips.cpu import Cpu
from beringia.chips.emulated.device import register
from beringia.chips.open import open_chip
from beringia.errors import InputError, Refusal
from beringia.machine.memory import keep_freed_memory
from beringia.qualify.bundle import read_bundle
from beringia.qualify.candidate import Extent, probe_candidate
from beringia.qualify.effects import power_of
from beringia.qualify.evidence import Opened
from beringia.qualify.probing import Evidence
from beringia.qualify.qualification import located_in
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import DecoderSubject, Subject
from beringia.qualify.trace import TraceExtent
from beringia.qualify.verdict import judge

KINDS = {
    "first": faults.FIRST,
    "second": faults.SECOND,
    "both": [*faults.FIRST, *faults.SECOND],
    "later": faults.LATER,
    "none": [],
}
REQUIRED = {"clear_verdict": 0.97, "moderate_not_accepted": 0.90, "place": 0.95}
REQUIRED_CLEAN = {"inconclusive_at_most": 0.02, "qualifications": 250, "of_trained_models": 150}
_BREAKS = (RuntimeError, IndexError, ValueError)
"""What a faulty chip may raise where its harm is measured; and a CPU that is asked for a bundle."""
_EXTENT = Extent(longest=0, memory_bytes=0, soak_seconds=0.0, speed=False)


class Workshop:
    """Models, their bundles and yardsticks: each is made once."""

    def __init__(self, models: Path, bundles: Path) -> None:
        self._models, self._bundles = models, bundles
        self._yardsticks: dict[tuple[str, str], Yardstick] = {}
        bundles.mkdir(parents=True, exist_ok=True)

    def subject(self, model: str) -> DecoderSubject:
        """A preset, or one that was trained."""
        return DecoderSubject(str(self._models / model) if (self._models / model).exists() else model)

    def bundle(self, subject: Subject, dtype: str) -> Any:
        """Of the CPU as it is."""
        path = self._bundles / f"{subject.name}-{_weights(subject)}-{dtype}.bundle"
        if not path.exists():
            make_bundle(subject, Cpu(), getattr(torch, dtype), path, plan=TraceExtent())
        return read_bundle(path)

    def yardstick(self, model: str, dtype: str) -> Yardstick:
        """What harm is measured by; one is kept at a time, since float64's numbers are large."""
        if (model, dtype) not in self._yardsticks:
            subject = self.subject(model)
            kept = self._bundles / f"{model}-{_weights(subject)}-{dtype}-sound.json"
            made = Yardstick(subject, getattr(torch, dtype), kept)
            self._yardsticks = {(model, dtype): made}
        return self._yardsticks[model, dtype]


def _weights(subject: Subject) -> str:
    return subject.fingerprint().weights[:12]


def qualified(chip: Chip, subject: Subject, bundle: Any) -> dict[str, Any]:
    """What `beringia qualify` finds in the chip's process."""
    began = time.perf_counter()
    dtype = bundle.manifest.compute_dtype
    evidence = Evidence(opened=Opened(name=chip.name, identity=chip.identity, compute_dtype=dtype), complete=True)
    for fact in probe_candidate(chip, subject, bundle, _EXTENT):
        evidence.take(fact)
    located, departure = located_in(evidence), evidence.departure
    judgement = judge(evidence.probes, located, power_of(bundle.manifest.batches), departure)
    named = None if located is None else located.check
    return {
        "verdict": judgement.verdict,
        "operator": None if named is None else named.operator,
        "direction": None if named is None else named.direction,
        "module": None if named is None else named.module,
        "departed_module": None if departure is None else departure.module,
        "departed_quantity": None if departure is None else departure.quantity,
        "failed": [probe.subject for probe in evidence.probes if probe.outcome == "failed"][:8],
        "open": [probe.subject for probe in evidence.probes if probe.outcome == "inconclusive"][:8],
        "reasons": [reason[:200] for reason in judgement.reasons[:3]],
        "largest_used": _largest_used(evidence),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _largest_used(evidence: Evidence) -> float:
    """Of the bounds on what a model is harmed in."""
    used = [max(m.used for m in p.measures) for p in evidence.probes if p.measures and p.rules_out != "neither"]
    return min(max(used, default=0.0), 1e30)


def run_fault(fault: faults.Fault, workshop: Workshop) -> dict[str, Any]:
    """One planted fault, from harm to verdict."""
    subject = workshop.subject(fault.model)
    bundle, yardstick = workshop.bundle(subject, fault.dtype), workshop.yardstick(fault.model, fault.dtype)
    harm = _on_chip(fault, lambda chip: _harm(yardstick, chip))
    found = _on_chip(fault, lambda chip: qualified(chip, subject, bundle))
    return {
        "name": fault.name,
        "kind": fault.kind.name,
        "group": "fault",
        "harm": asdict(harm),
        "right_place": faults.names_first(fault.kind, found),
        **found,
    }


def _on_chip(fault: faults.Fault, work: Any) -> Any:
    chip = open_chip(fault.chip)
    try:
        with fault.planted(chip):
            return work(chip)
    finally:
        chip.close()


def _harm(yardstick: Yardstick, chip: Chip) -> Harm:
    try:
        return yardstick.harm(yardstick.errors(chip))
    except _BREAKS as error:
        return Harm(1e30, 1e30, {"inference": str(error)[:200], "training": ""})


def run_reference(fault: faults.Fault, workshop: Workshop) -> dict[str, Any]:
    """The faulty chip asked for a bundle."""
    subject = workshop.subject(fault.model)
    began = time.perf_counter()

    def record(chip: Chip) -> str:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "reference.bundle"
            try:
                make_bundle(subject, chip, getattr(torch, fault.dtype), path, plan=TraceExtent())
            except (Refusal, InputError) as refusal:
                return "" if path.exists() else str(refusal)
            except _BREAKS as error:
                return f"it broke: {error}"
        return ""

    words = _on_chip(fault, record)
    seconds = round(time.perf_counter() - began, 1)
    name = f"reference {fault.name}"
    return {"name": name, "kind": fault.kind.name, "group": "reference", "words": words[:400], "seconds": seconds}


def of_unlike_kinds(planted: list[faults.Fault], done: dict[str, dict[str, Any]], count: int) -> list[faults.Fault]:
    """So many faults of clear harm, the first of each kind."""
    clear = [fault for fault in planted if severity(done[fault.name]) == "clear"]
    return list({fault.kind.name: fault for fault in reversed(clear)}.values())[::-1][:count]


def run_clean(variant: clean.Variant, workshop: Workshop) -> dict[str, Any]:
    """One sound variant of a chip and its software."""
    subject = variant.subject(workshop.subject(variant.model))
    bundle = workshop.bundle(subject, variant.dtype)
    chip = open_chip(variant.chip)
    setting: AbstractContextManager[Any] = variant.setting()
    with setting:
        found = qualified(chip, subject, bundle)
    chip.close()
    return {"name": variant.name, "group": "clean", "trained": variant.model != "r2-nano", **found}


# ---- what it amounts to


def severity(result: dict[str, Any]) -> str:
    """Clear, moderate or harmless."""
    worst = max(result["harm"]["inference"], result["harm"]["training"])
    return "clear" if worst > CLEAR else "moderate" if worst >= HARMLESS else "harmless"


def right_verdicts(result: dict[str, Any]) -> tuple[str, ...]:
    """By harm."""
    inference = result["harm"]["inference"]
    match severity(result):
        case "harmless":
            return ("train", "inconclusive")
        case "moderate":
            return ("infer", "unfit", "inconclusive")
        case _:
            return ("unfit",) if inference > CLEAR else ("infer",) if inference < HARMLESS else ("infer", "unfit")


def rate(right: list[bool]) -> dict[str, Any]:
    """With Clopper and Pearson's 95 % interval."""
    good, count = sum(right), len(right)
    low = float(stats.beta.ppf(0.025, good, count - good + 1)) if good else 0.0
    high = float(stats.beta.ppf(0.975, good + 1, count - good)) if good < count else 1.0
    return {"right": good, "of": count, "rate": good / max(1, count), "interval_95": [low, high]}


def summary_of_faults(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates by severity, and what slipped."""
    by_severity: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_severity[severity(result)].append(result)
    clear = by_severity["clear"]
    right = {name: [r["verdict"] in right_verdicts(r) for r in rows] for name, rows in by_severity.items()}
    slipped = [
        {key: r[key] for key in ("name", "verdict", "operator", "departed_module", "departed_quantity", "harm")}
        for r in results
        if r["verdict"] not in right_verdicts(r) or (severity(r) == "clear" and not r["right_place"])
    ]
    return {
        "faults": len(results),
        "kinds": len({r["kind"] for r in results}),
        "clear_verdict": rate(right.get("clear", [])),
        "moderate_not_accepted": rate(right.get("moderate", [])),
        "harmless_not_refused": rate(right.get("harmless", [])),
        "place": rate([r["right_place"] for r in clear if r["verdict"] != "train"]),
        "slipped": slipped,
    }


def summary_of_clean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Refusals and open questions among sound variants."""
    verdicts = [r["verdict"] for r in results]
    return {
        "qualifications": len(results),
        "of_trained_models": sum(r["trained"] for r in results),
        "not_refused": rate([verdict in ("train", "inconclusive") for verdict in verdicts]),
        "decided": rate([verdict != "inconclusive" for verdict in verdicts]),
        "largest_used": max((r["largest_used"] for r in results), default=0.0),
        "not_accepted": [{k: r[k] for k in ("name", "verdict", "reasons")} for r in results if r["verdict"] != "train"],
    }


def summary_of_references(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Which were refused, and the words."""
    return {
        "refused": rate([bool(r["words"]) for r in results]),
        "words": {r["name"]: r["words"] for r in results},
    }


def holds(planted: dict[str, Any], sound: dict[str, Any]) -> bool:
    """Whether what must hold does, of the parts that were asked for."""
    needed = [(planted[name], least) for name, least in REQUIRED.items()]
    needed += [(planted["harmless_not_refused"], 1.0), (sound["not_refused"], 1.0)]
    needed += [(sound["decided"], 1.0 - REQUIRED_CLEAN["inconclusive_at_most"])]
    counts = [name for name in ("qualifications", "of_trained_models") if sound["qualifications"]]
    return all(part["rate"] >= least for part, least in needed if part["of"]) and all(
        sound[name] >= REQUIRED_CLEAN[name] for name in counts
    )


class Store:
    """Results by name, in a file that is appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.results: dict[str, dict[str, Any]] = {row["name"]: row for row in map(json.loads, lines)}

    def add(self, result: dict[str, Any]) -> None:
        """Keep one, and say so."""
        self.results[result["name"]] = result
        with open(self._path, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{result['name']}: {_words(result)}", file=sys.stderr, flush=True)


def _words(result: dict[str, Any]) -> str:
    if result["group"] == "reference":
        return f"{result['words'] or 'WRONG: recorded'} {result['seconds']} s"
    if result["group"] == "clean":
        return f"{result['verdict']} {result['largest_used']:.2f} {result['seconds']} s"
    harm = result["harm"]
    wrong = "" if result["verdict"] in right_verdicts(result) else " WRONG"
    elsewhere = "" if result["right_place"] else " (not its place)"
    named = result["operator"] or result["departed_module"] or result["departed_quantity"]
    return (
        f"{severity(result)} ({harm['inference']:.3g} {harm['training']:.3g}) -> {result['verdict']}"
        f"{wrong}, {named}{elsewhere} {result['seconds']} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, default=Path("foreign-bundles"))
    parser.add_argument("--store", type=Path, default=Path("foreign.jsonl"))
    parser.add_argument("--half", choices=KINDS, default="both")
    parser.add_argument("--per-kind", type=int, default=4)
    parser.add_argument("--of", default=",".join(faults.ALL), help="models")
    parser.add_argument("--only", default="", help="what names of faults and variants contain")
    parser.add_argument("--references", type=int, default=0, help="faulty chips that are asked for a bundle")
    parser.add_argument("--clean", type=int, default=10**6, help="sound variants, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    register()  # before torch's autograd makes its queues
    workshop, store = Workshop(options.models, options.bundles), Store(options.store)
    kinds = KINDS[options.half]
    models = options.of.split(",")
    planted = [
        fault for fault in faults.drawn(kinds, options.per_kind) if options.only in fault.name and fault.model in models
    ]
    for fault in sorted(planted, key=lambda fault: (fault.model, fault.dtype)):
        if fault.name not in store.results:
            store.add(run_fault(fault, workshop))
    references = of_unlike_kinds(planted, store.results, options.references)
    for fault in references:
        if f"reference {fault.name}" not in store.results:
            store.add(run_reference(fault, workshop))
    variants = [variant for variant in clean.variants() if options.only in variant.name and variant.model in models][
        : options.clean
    ]
    for variant in variants:
        if variant.name not in store.results:
            store.add(run_clean(variant, workshop))
    done = store.results
    of_faults = summary_of_faults([done[fault.name] for fault in planted])
    of_clean = summary_of_clean([done[variant.name] for variant in variants])
    document = {
        "benchmark": "qualify-foreign",
        "date": time.strftime("%Y-%m-%d"),
        "half": options.half,
        "faults": of_faults,
        "clean": of_clean,
        "references": summary_of_references([done[f"reference {fault.name}"] for fault in references]),
        "must_hold": REQUIRED | REQUIRED_CLEAN | {"holds": holds(of_faults, of_clean)},
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
