"""Whether qualification finds planted defects, names the first wrong operator, and spares sound chips.

    python benchmarks/qualify_detection.py --half test --store /tmp/detection.jsonl --json

Every case is one defect inside an emulated chip (`qualify_cases.py`), qualified for r2-nano in this process with what
`beringia qualify` uses: watched steps, trace, lengths, verdict. Results go to the store one by one, so an interrupted
benchmark goes on.

**Harm is measured apart from the qualification.** With whole tensors, on the qualification's batches and on others:
outputs, each parameter's gradient and each layer's update over training steps, of the faulty chip against the same chip
without the fault, over a noise floor (the sound chip with weights moved by up to one unit in the last place
of bfloat16, three draws, root mean square); the worst batch counts. Beyond `HARM` times the floor a defect is harmful:
to inference where it is the outputs (for defects of lengths those of attention over 600 and 2,100 tokens, too), else to
training. Below `HARMLESS` everywhere it is harmless. Between the two nothing is asked; such cases are counted.

**The right verdict** is unfit, infer or train accordingly (where outputs lie between the two, infer or unfit). **The
right first operator** is the first watched call that the fault changed by more than half of its rounding error; the
device itself reports which calls it struck.

The rules of others (`qualify_peers.py`) judge the same calls; those that compare two runs compare with the same chip
without the fault, and sound chips with the reference. Must hold: verdicts right in at least 98 %, first
operators exact in at least 95 %, no sound chip and no harmless defect refused.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from qualify_cases import DEVELOPED, HARMLESS_DEVELOPED, Case, cases
from qualify_peers import PER_CALL, WHOLE_RUN, Key, Rules, RunSummary, key_of, loss_watching, whole_run
from scipy import stats

HARM = 2.0
HARMLESS = 1.0
"""No batch moves anything by more than the noise."""
DRAWS = 3
FIRST_STEP = 5
"""Of the qualification's trace, after two watched training steps, one of decoding and one of serving: faults that are
drawn by step are then the same."""
OTHER_BATCHES = (1000, 1001)
REQUIRED = {"verdict": 0.98, "operator": 0.95}
CLEAN_CHIPS = ("emulated:h100", "emulated:a100", "emulated:mi300x", "cpu")

Tensors = dict[str, torch.Tensor]


def setup() -> None:
    """As in a worker; and the emulated device must exist before torch's autograd makes its queues.

    On one thread: waking a second one takes longer than its half of an operator of this model (a case takes 20 to 25 %
    less), and two shares of the cases have a core each.
    """
    from beringia.chips.emulated.device import register
    from beringia.machine.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    register()


def open_chip(name: str, faults: str | None = None) -> Any:
    """Open a chip of this process."""
    from beringia.chips.open import open_chip as open_by_name

    return open_by_name(name, faults=faults, seed=5)


class World:
    """One model and its data: float64, the reference's noise, sound runs of chips."""

    def __init__(self, seed: int, reference: str = "cpu") -> None:
        from beringia.qualify.effects import RoundingNoise
        from beringia.qualify.recording import Recorder
        from beringia.qualify.reference import DRAWS as REFERENCE_DRAWS
        from beringia.qualify.rounding_draw import RoundingDraw
        from beringia.qualify.subject import DecoderSubject
        from beringia.qualify.trace import TraceExtent, Tracer
        from beringia.qualify.wrong_calls import error_key

        self.dtype = torch.bfloat16
        self.subject = DecoderSubject("r2-nano", seed=seed)
        self.plan = TraceExtent()
        self.tracer = Tracer(self.subject, self.plan)
        exact, self.routes = self.tracer.in_float64()
        chip = open_chip(reference)
        self.reference_summary = RunSummary()
        recorder = Recorder(self.subject, chip, self.dtype, also=self.reference_summary.take)
        recording = recorder.record(self.tracer, self.routes)
        draws = [
            self.tracer.on_chip(
                chip, self.dtype, self.routes, begin_step=lambda: None, change=RoundingDraw(draw, self.dtype)
            )
            for draw in range(REFERENCE_DRAWS)
        ]
        chip.close()
        self.errors = {
            error_key(c.module, c.operator, c.direction, c.ordinal): (c.error, c.used)
            for c in recording.checks
            if c.error is not None
        }
        self.noise = RoundingNoise.of(exact, recording.trace, draws)
        self.reference_trace = recording.trace
        self._sound: dict[str, Sound] = {}

    def sound(self, chip: str) -> Sound:
        """What the chip does without a fault."""
        if chip not in self._sound:
            self._sound[chip] = Sound(self, chip)
        return self._sound[chip]


class Harm:
    """Outputs, gradients and updates of one chip on batches of its own, whole."""

    def __init__(
        self, world: World, chip: Any, *, change: Callable[[str, torch.Tensor], torch.Tensor] | None, routes: Any
    ) -> None:
        from beringia.qualify.subject import TRAINING, on_device
        from beringia.qualify.trace import make_optimizer

        subject = world.subject
        self.routes: list[Any] = []
        self.outputs: Tensors = {}
        self.gradients: Tensors = {}
        self._world, self._chip, self._step = world, chip, FIRST_STEP - 1
        # Float64's choices of experts, as in the trace: the same numbers then meet the same struck elements.
        known = [*world.routes.batches, *world.routes.steps, *(routes or ())]
        self._pending = iter(known)
        subject = world.subject
        model = self._model(subject, chip, world.dtype, change)
        for number in range(world.plan.batches):
            self._pass(model, number)
        self._begin_step()
        with torch.no_grad():
            batch = on_device(subject.batch(0), chip.device)
            self.decoded = {"0": subject.decode(model, batch).cpu().double()}
        self._step += len(world.tracer.servings) + 1  # served, and trained on unlike batches: the trace's alone
        before = {name: parameter.detach().cpu().double().clone() for name, parameter in model.named_parameters()}
        optimizer = make_optimizer(model, fused=True)
        for number in range(world.plan.steps):
            self._begin_step()
            self._loss(model, on_device(subject.batch(number), chip.device))[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._begin_step()
        self.updates = {n: p.detach().cpu().double() - before[n] for n, p in model.named_parameters()}
        model = self._model(subject, chip, world.dtype, change)
        for number in OTHER_BATCHES:
            self._pass(model, number)

    def _pass(self, model: Any, number: int) -> None:
        from beringia.qualify.subject import on_device

        subject, device = self._world.subject, self._chip.device
        batch = on_device(subject.batch(number), device)
        self._begin_step()
        loss, own = self._loss(model, batch)
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"{number}/{name}"] = parameter.grad.detach().cpu().double()
        model.zero_grad(set_to_none=True)
        self._begin_step()
        with torch.no_grad(), subject.forcing_routes(model, own):
            self.outputs[str(number)] = subject.outputs(model, batch).cpu().double()

    def _begin_step(self) -> None:
        self._step += 1
        self._chip.begin_step(self._step)

    @staticmethod
    def _model(subject: Any, chip: Any, dtype: torch.dtype, change: Any) -> Any:
        model = subject.build()
        if change is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(change(name, parameter))
        return subject.place(model, chip.device, dtype)

    def _loss(self, model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
        subject = self._world.subject
        routes = next(self._pending, None)
        if routes is None:  # of the other batches, the sound chip's
            with subject.recording_routes(model) as own:
                loss = subject.loss(model, batch)
            self.routes.append(own)
            return loss, own
        with subject.forcing_routes(model, routes):
            return subject.loss(model, batch), routes


def by_batch(found: Tensors, reference: Tensors) -> dict[str, float]:
    """Norms of differences, each tensor by itself; names begin with the batch."""
    norms = {name: float((found[name] - tensor).norm()) for name, tensor in reference.items()}
    return {name: _number(norm) for name, norm in norms.items()}


def by_layer(found: Tensors, reference: Tensors) -> dict[str, float]:
    """Norms of differences, parameters of a layer together."""
    squares: dict[str, float] = defaultdict(float)
    for name, tensor in reference.items():
        match = re.match(r"(.*?\.\d+)\.", name)
        layer = match[1] if match else name
        squares[layer] += float((found[name] - tensor).square().sum())
    return {layer: math.sqrt(square) if square == square else math.inf for layer, square in squares.items()}


def long_outputs(world: World, chip: Any, lengths: tuple[int, ...]) -> Tensors:
    """Attention's outputs over long sequences: what a defect of lengths does to inference there."""
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(77)
    made = {}
    for length in lengths:
        q, k, v = (torch.randn(1, 1, length, 32, generator=generator).to(world.dtype).to(chip.device) for _ in range(3))
        made[str(length)] = F.scaled_dot_product_attention(q, k, v, is_causal=True).cpu().double()
    return made


class Sound:
    """A chip without a fault: what harm is measured against, and summaries for the rules that compare runs."""

    LENGTHS = (600, 2100)

    def __init__(self, world: World, name: str) -> None:
        from beringia.qualify.recording import Recorder
        from beringia.qualify.rounding_draw import RoundingDraw

        chip = open_chip(name)
        self.harm = Harm(world, chip, change=None, routes=None)
        draws = [
            Harm(world, chip, change=RoundingDraw(100 + draw, world.dtype), routes=self.harm.routes)
            for draw in range(DRAWS)
        ]
        self.decode_floor = _pooled([by_batch(draw.decoded, self.harm.decoded) for draw in draws])
        self.output_floor = _pooled([by_batch(draw.outputs, self.harm.outputs) for draw in draws])
        self.gradient_floor = _pooled([by_batch(draw.gradients, self.harm.gradients) for draw in draws])
        self.update_floor = _rms_by([by_layer(draw.updates, self.harm.updates) for draw in draws])
        self.long = long_outputs(world, chip, self.LENGTHS)
        self.summary = RunSummary()
        recorder = Recorder(world.subject, chip, world.dtype, also=self.summary.take)
        recorder._watch_training()
        recorder._watch_decoding()
        chip.close()

    def compare(self, world: World, chip: Any, *, lengths: bool) -> dict[str, float]:
        """The harm of a chip with a fault: to outputs, and to training."""
        found = Harm(world, chip, change=None, routes=self.harm.routes)
        output = max(
            _worst(by_batch(found.outputs, self.harm.outputs), self.output_floor),
            _worst(by_batch(found.decoded, self.harm.decoded), self.decode_floor),
        )
        if lengths:
            for name, tensor in long_outputs(world, chip, self.LENGTHS).items():
                noise = float((self.long[name].to(world.dtype).double() - self.long[name]).norm()) + 2.0**-9 * float(
                    self.long[name].norm()
                )
                output = max(output, _number(float((tensor - self.long[name]).norm())) / noise)
        gradient = _worst(by_batch(found.gradients, self.harm.gradients), self.gradient_floor)
        update = max(v / self.update_floor[k] for k, v in by_layer(found.updates, self.harm.updates).items())
        return {"output": _number(output), "training": _number(max(gradient, update))}


def _number(value: float) -> float:
    return value if math.isfinite(value) else 1e30


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _pooled(rows: list[dict[str, float]]) -> dict[str, float]:
    """Root mean square over draws and batches, by what follows the batch in the name."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values[name.partition("/")[2]].append(value)
    return {name: _rms(found) for name, found in values.items()}


def _worst(distances: dict[str, float], floors: dict[str, float]) -> float:
    return max(distance / floors[name.partition("/")[2]] for name, distance in distances.items())


def _rms_by(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: _rms([row[name] for row in rows]) for name in rows[0]}


class Stopwatch:
    """What the benchmark adds to the qualification's time."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Truth:
    """The first watched call that a fault changed by more than half of its rounding error."""

    def __init__(self, chip: Any) -> None:
        self.first: Key | None = None
        self._struck = 0
        self._faults = chip.faults
        self._faults.on_strike = self._strike

    def _strike(self, position: int, func: Any) -> None:
        self._struck += 1

    def take(self, call: Any) -> None:
        struck, self._struck = self._struck, 0
        if struck and self.first is None and _beyond_rounding(call):
            self.first = key_of(call)
            self._faults.on_strike = None  # nothing more is asked of it, and telling may cost an emulated fault time


def _beyond_rounding(call: Any) -> bool:
    from beringia.qualify.operators.float64 import NotKnown, in_float64

    try:
        exact = in_float64(call)
    except NotKnown:
        return True
    for found, golden in zip(call.results, exact, strict=False):
        if found.shape != golden.shape or found.numel() == 0:
            continue
        if not found.is_floating_point():
            if not torch.equal(found, golden.to(found.dtype)):
                return True
            continue
        rounded = golden.to(found.dtype).double()
        rounding = float((rounded - golden).norm())
        if not float((found.double() - rounded).norm()) <= 0.5 * rounding + 2.0**-20 * float(golden.norm()):
            return True
    return False


def qualified(world: World, chip: Any, *, also: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """What `beringia qualify` finds by watched operators, the trace and lengths: without its probes of arithmetic,
    experts, layers and clipping, and without looking for a module. `qualify_foreign.py` has all of it."""
    from beringia.qualify.candidate import heads_of, look_again
    from beringia.qualify.effects import judge_trace, power_of
    from beringia.qualify.evidence import failure
    from beringia.qualify.lengths import LENGTHS, probe_lengths
    from beringia.qualify.locate import first_wrong, locate
    from beringia.qualify.recording import AT_REST, Recorder
    from beringia.qualify.verdict import judge
    from beringia.qualify.wrong_calls import beside_reference, judge_operators

    began = time.perf_counter()
    recorder = Recorder(world.subject, chip, world.dtype, also=also)
    recording = recorder.record(world.tracer, world.routes)
    checks = [beside_reference(check, world.errors) for check in recording.checks]
    probes = judge_operators(checks, recording)
    if recording.raised is not None:
        probes.append(failure("operators", str(recording.raised)))
    if recording.trace is not None:
        effects = judge_trace(world.noise, recording.trace)
        probes += effects
        checks += [found.check for found in look_again(recorder, world.errors, checks, effects)]
    heads, longest = heads_of(world.subject.build())
    lengths = tuple(length for length in LENGTHS if length <= longest)
    for result, check in probe_lengths(chip, world.dtype, heads, lengths, 0, begin_step=recorder.begin_step):
        probes.append(result)
        checks += [] if check is None else [check]
    first = first_wrong(checks)
    place = recording.first_unrepeatable
    located = None if first is None else locate(first, repeatable=not recording.unrepeatable)
    judgement = judge(probes, located, power_of(world.plan.batches))
    named = None if first is None else (first.module, first.operator, first.direction, first.ordinal)
    if named is None and place is not None:
        named = (place.module, place.operator, place.direction, place.ordinal)
    lockstep = [probe for probe in probes if probe.probe == "lockstep"]
    return {
        "verdict": judgement.verdict,
        "named": named,
        "at_rest": first is not None and first.operator == AT_REST,
        "consistent_with": () if located is None else located.consistent_with,
        "largest_effect": max((_number(p.measures[0].used) for p in lockstep), default=0.0),
        "largest_passing_call": max((c.used for c in checks if c.used <= 1.0), default=0.0),
        "seconds": time.perf_counter() - began,
        "losses": None if recording.trace is None else recording.trace.losses_N,
    }


def run_case(case: Case, world: World, directory: Path) -> dict[str, Any]:
    """One planted defect, from harm to verdicts."""
    sound = world.sound(case.chip)
    script = case.write(directory)
    chip = open_chip(case.chip, script)
    harm = sound.compare(world, chip, lengths="far_out" in case.kind)
    chip.close()
    chip = open_chip(case.chip, script)
    truth = Truth(chip)
    found = beside_others(world, chip, sound.summary, truth.take)
    chip.close()
    return {**asdict(case), "harm": harm, "truth": truth.first, **found}


def beside_others(
    world: World, chip: Any, compared_with: RunSummary, also: Callable[[Any], None] = lambda call: None
) -> dict[str, Any]:
    """What qualification finds, and what the rules of others do in the same run; the time is qualification's alone.

    Rules that compare two runs compare with the summary of `compared_with`.
    """
    rules, summary, beside = Rules(), RunSummary(), Stopwatch()

    def take(call: Any) -> None:
        with beside:
            also(call)
            rules.take(call)
            summary.take(call)

    found = qualified(world, chip, also=take)
    losses = found.pop("losses")
    first: dict[str, Any] = dict(rules.first) | whole_run(summary, compared_with)
    refuses = {rule: rule in first for rule in (*PER_CALL, *WHOLE_RUN)}
    refuses["loss at 1 %"] = losses is None or loss_watching(losses, world.reference_trace.losses_N)
    found["seconds"] -= beside.seconds
    return {**found, "peers": {"refuses": refuses, "first": {rule: list(key) for rule, key in first.items()}}}


def expected(result: dict[str, Any]) -> tuple[str, ...] | None:
    """Verdicts that are right, or None where nothing is asked."""
    output, training = result["harm"]["output"], result["harm"]["training"]
    if output >= HARM:
        return ("unfit",)
    if training >= HARM:
        return ("infer",) if output < HARMLESS else ("infer", "unfit")
    return ("train",) if max(output, training) < HARMLESS else None


def names_first(result: dict[str, Any], named: Any) -> bool:
    """Whether an operator that was named is the first wrong one."""
    truth = result["truth"]
    if result["kind"] in ("flipped_weights", "flipped_moments"):
        return bool(result["at_rest"])
    if result["kind"] == "mask_ignored_far_out" and truth is None:
        return named is not None and "attention" in named[0] and named[2] == "forward"
    return truth is not None and named is not None and list(named) == list(truth)


def interval(successes: int, trials: int) -> list[float]:
    """Clopper and Pearson's 95 % interval."""
    if trials == 0:
        return [0.0, 1.0]
    low = stats.beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    return [float(low), float(high)]


def rate(results: list[bool]) -> dict[str, Any]:
    return {
        "right": sum(results),
        "of": len(results),
        "rate": sum(results) / max(1, len(results)),
        "interval_95": interval(sum(results), len(results)),
    }


def summarise(results: list[dict[str, Any]], clean: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of ours and of the others'."""
    asked = [(result, wanted) for result in results if (wanted := expected(result)) is not None]
    harmful = [(result, wanted) for result, wanted in asked if wanted != ("train",)]
    harmless = [result for result, wanted in asked if wanted == ("train",)]
    ours = {
        "verdict": rate(
            [result["verdict"] in wanted for result, wanted in asked] + [c["verdict"] == "train" for c in clean]
        ),
        "verdict_of_harmful": rate([result["verdict"] in wanted for result, wanted in harmful]),
        "operator_of_harmful": rate([names_first(result, result["named"]) for result, _ in harmful]),
        "harmless_not_refused": rate([result["verdict"] == "train" for result in harmless]),
        "clean_not_refused": rate([c["verdict"] == "train" for c in clean]),
    }
    rules = (*PER_CALL, *WHOLE_RUN, "loss at 1 %")
    others = {
        rule: {
            "harmful_refused": rate([result["peers"]["refuses"][rule] for result, _ in harmful]),
            "operator_of_harmful": rate([names_first(result, _named(result, rule)) for result, _ in harmful]),
            "harmless_not_refused": rate([not result["peers"]["refuses"][rule] for result in harmless]),
            "clean_not_refused": rate([not c["peers"]["refuses"][rule] for c in clean if "peers" in c]),
        }
        for rule in rules
    }
    return {
        "harmful": len(harmful),
        "harmless": len(harmless),
        "clean": len(clean),
        "between": len(results) - len(asked),
        "ours": ours,
        "others": others,
        "kinds": _by_kind(asked),
        "strengths": {s: sum(r["strength"] == s for r, _ in harmful) for s in ("mild", "severe")},
        "wrong": [
            {k: r[k] for k in ("name", "verdict", "harm", "named", "truth", "largest_effect", "fault")}
            for r, wanted in asked
            if r["verdict"] not in wanted or (wanted != ("train",) and not names_first(r, r["named"]))
        ]
        + [{k: c[k] for k in ("name", "verdict", "named", "largest_effect")} for c in clean if c["verdict"] != "train"],
        "seconds_a_case": {
            "median": sorted(r["seconds"] for r in results)[len(results) // 2] if results else None,
            "largest": max((r["seconds"] for r in results), default=None),
        },
        "largest_effect_clean": max((c["largest_effect"] for c in clean), default=None),
        "largest_call_clean": max((c["largest_passing_call"] for c in clean), default=None),
    }


def _named(result: dict[str, Any], rule: str) -> Any:
    return result["peers"]["first"].get(rule)


def _by_kind(asked: list[tuple[dict[str, Any], tuple[str, ...]]]) -> dict[str, str]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for result, wanted in asked:
        kinds[result["kind"]].append(
            result["verdict"] in wanted and (wanted == ("train",) or names_first(result, result["named"]))
        )
    return {kind: f"{sum(right)}/{len(right)}" for kind, right in sorted(kinds.items())}


def run_clean(seed: int, store: Store) -> None:
    """Four soundly different chips qualified against one of them, with one model and its data."""
    reference = CLEAN_CHIPS[seed % len(CLEAN_CHIPS)]
    names = {chip: f"clean-{seed}-{chip}" for chip in CLEAN_CHIPS}
    if all(name in store for name in names.values()):
        return
    world = World(seed, reference)
    for name, label in names.items():
        if label in store:
            continue
        chip = open_chip(name)
        found = beside_others(world, chip, world.reference_summary)
        chip.close()
        store.add({"name": label, "half": "clean", "reference": reference, "chip": name, **found})


class Store:
    """Results by name, in a file that is appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {document["name"]: document for document in map(json.loads, lines)}

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def add(self, result: dict[str, Any]) -> None:
        self.results[result["name"]] = json.loads(json.dumps(result, default=list))
        with open(self._path, "a") as file:
            file.write(json.dumps(result, default=list) + "\n")
        print(f"{result['name']}: {result['verdict']} {result['seconds']:.1f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--half", choices=("development", "test"), default="test")
    parser.add_argument("--per-kind", type=int, default=4)
    parser.add_argument("--clean", type=int, default=50, help="seeds, each with four chips")
    parser.add_argument("--store", type=Path, default=Path("detection.jsonl"))
    parser.add_argument("--only", default="", help="kinds whose names contain this")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th case from the i-th on, for several processes")
    options = parser.parse_args()
    setup()
    store = Store(options.store)
    part, parts = map(int, options.share.split("/"))
    wanted = [case for case in cases(options.half, options.per_kind) if options.only in case.kind]
    mine = sorted(wanted, key=lambda case: (case.world, case.chip))
    worlds: dict[int, World] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(mine):
            if number % parts == part and case.name not in store:
                if case.world not in worlds:
                    worlds = {case.world: World(case.world)}
                store.add(run_case(case, worlds[case.world], Path(directory)))
    first_seed = 500 if options.half == "test" else 10
    for seed in range(first_seed, first_seed + options.clean):
        if seed % parts == part:
            run_clean(seed, store)
    names = {case.name for case in wanted}
    results = [result for name, result in store.results.items() if name in names]
    clean = [result for result in store.results.values() if result["half"] == "clean"]
    summary = summarise(results, clean)
    ours = summary["ours"]
    holds = (
        ours["verdict"]["rate"] >= REQUIRED["verdict"]
        and ours["operator_of_harmful"]["rate"] >= REQUIRED["operator"]
        and ours["harmless_not_refused"]["rate"] == 1.0
        and ours["clean_not_refused"]["rate"] == 1.0
    )
    document = {
        "benchmark": "qualify-detection",
        "half": options.half,
        "model": "r2-nano",
        "unseen_kinds_only_in_test": sorted(
            {case.kind for case in wanted} - {k.__name__ for k in DEVELOPED + HARMLESS_DEVELOPED}
        ),
        **summary,
        "must_hold": REQUIRED
        | {"harmless_refused": 0, "clean_refused": 0, "harmful": 150, "harmless": 50, "clean": 200, "holds": holds},
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
