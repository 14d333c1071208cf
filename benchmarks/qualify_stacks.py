"""Whether other software on the same CPU, really different and sound, is found fit, and a small defect in it refused.

    make peers
    python benchmarks/qualify_stacks.py --json [--model DIR --layers N] [--provider CPUExecutionProvider]

The reference is torch's eager mode. Against it stand two other implementations of the same model:

* `compile`: forward and backward pass through torch.compile (inductor); the whole trace of a qualification (outputs,
  decoding, gradients, updates, losses) in float32 and bfloat16. The optimizer is torch's own in both.
* `onnxruntime`: the forward pass, exported to ONNX with fixed shapes and run by ONNX Runtime; outputs of the same
  batches in float32. Where a provider lacks an operator in a dtype, its own sentence stands in place of figures.

Judged as `beringia qualify` judges a lockstep trace: distance from float64 over the noise floor (`effects.py`). Calls
are not watched: neither stack makes those of eager mode. Beside the effects stand the differences themselves.

Must hold: each stack is fit, and each is refused with one weight matrix scaled by the first of `SCALES`. Where that is
not refused, larger scales follow until one is; `moved` says how far a scale moves a stack, in noise floors.

Runs in `.venv-peers`, which `make peers` makes: started by another Python it goes on in that one, and without ONNX
Runtime it says so and exits with 2. `--model` takes a Hugging Face directory (`recipes/prepare_smollm2.py` writes one).
On an Ascend machine `--provider CANNExecutionProvider` would drive CANN with the same code; that was never run here.
Reads the model's directory, prints one JSON object, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers/bin/python"
SCALES = (1.02, 1.05, 1.1, 1.2, 1.5)
HIDDEN, VOCABULARY = 256, 512
SEED = 0


def enter_peers() -> None:
    """Go on in the environment of `make peers` where this one has no ONNX Runtime."""
    if importlib.util.find_spec("onnxruntime") is not None:
        return
    if PEERS.exists() and Path(sys.prefix) != PEERS.parents[1]:
        os.execv(PEERS, [str(PEERS), *sys.argv])
    print("This benchmark needs ONNX Runtime in an environment of its own: run `make peers`.", file=sys.stderr)
    raise SystemExit(2)


enter_peers()

import torch  # noqa: E402  (only where there is ONNX Runtime)
from torch._dynamo.utils import counters  # noqa: E402

from beringia.chips.open import open_chip  # noqa: E402
from beringia.data.tokenizer import write_tokenizer  # noqa: E402
from beringia.model import Decoder, DecoderConfig, KeyValueCache, initialise, save_model  # noqa: E402
from beringia.qualify.effects import RoundingNoise, distances, judge_outputs, judge_trace  # noqa: E402
from beringia.qualify.reference import DRAWS  # noqa: E402
from beringia.qualify.rounding_draw import Change, RoundingDraw  # noqa: E402
from beringia.qualify.sketches import sketch  # noqa: E402
from beringia.qualify.subject import Batch, DecoderSubject  # noqa: E402
from beringia.qualify.trace import Trace, TraceExtent, Tracer  # noqa: E402
from beringia.records.certificate import ProbeResult  # noqa: E402

Outputs = list[torch.Tensor]
Sketches = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class CompiledSubject(DecoderSubject):
    """The decoder with its calls compiled: training, inference and decoding, each with fixed shapes."""

    def place(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        placed = super().place(model, device, dtype)
        placed.compile(dynamic=False)  # in place: parameters keep their names
        return placed

    def decode(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, Decoder)
        cache = KeyValueCache(model.config.num_hidden_layers)
        model(batch["tokens"][:, :-1], cache=cache)  # through __call__, which is what is compiled
        return model(batch["tokens"][:, -1:], cache=cache)


class World:
    """One model in one dtype: float64, eager mode, its noise."""

    def __init__(self, subject: DecoderSubject, dtype: torch.dtype, plan: TraceExtent) -> None:
        self.subject, self.dtype, self.plan = subject, dtype, plan
        self.chip = open_chip("cpu")
        tracer = Tracer(subject, plan)
        exact, self.routes = tracer.in_float64()
        self.eager = self.trace(tracer)
        draws = [self.trace(tracer, RoundingDraw(seed, dtype)) for seed in range(DRAWS)]
        self.noise = RoundingNoise.of(exact, self.eager, draws)
        self.exact_outputs = self.outputs(subject, torch.float64)
        self.eager_outputs = self.outputs(subject, dtype)
        # The last matrix of the middle layer.
        self.scaled = f"model.layers.{subject.build().config.num_hidden_layers // 2}.mlp.down_proj.weight"

    def trace(self, tracer: Tracer, change: Change | None = None) -> Trace:
        return tracer.on_chip(self.chip, self.dtype, self.routes, begin_step=lambda: None, change=change)

    def outputs(self, subject: DecoderSubject, dtype: torch.dtype) -> Outputs:
        """Whole, of every batch."""
        model = subject.place(subject.build(), self.chip.device, dtype)
        with torch.no_grad():
            return [subject.outputs(model, subject.batch(number)) for number in range(self.plan.batches)]

    def scale_by(self, factor: float) -> Change:
        """One matrix scaled: the control."""
        return lambda name, weight: factor * weight if name == self.scaled else weight


# ---- the stacks


def compiled(world: World) -> dict[str, Any]:
    """torch.compile against eager mode, and the controls."""
    subject = CompiledSubject(world.subject.source, layers=world.subject.layers)
    tracer = Tracer(subject, world.plan)
    torch.compiler.reset()
    counters.clear()
    trace = world.trace(tracer)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def control(change: Change) -> tuple[list[ProbeResult], Sketches]:
        found = world.trace(tracer, change)
        return judge_trace(world.noise, found), found.sketches

    return {
        **judged(judge_trace(world.noise, trace)),
        **all_differences(world, world.outputs(subject, world.dtype)),
        "gradients_with_equal_bits": equal_gradients(trace, world.eager),
        "compiled": {"graphs": graphs, "graph_breaks": breaks},
        "controls": controls(world, trace.sketches, control),
    }


def exported(world: World, provider: str) -> dict[str, Any]:
    """ONNX Runtime's forward pass against eager mode's, and the controls."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

    try:
        outputs = run_onnx(world, provider, None)
    except Missing as missing:
        return {"missing": str(missing)}

    def control(change: Change) -> tuple[list[ProbeResult], Sketches]:
        found = sketched(run_onnx(world, provider, change))
        return [judge_outputs(world.noise, found)], found

    return {
        **judged([judge_outputs(world.noise, sketched(outputs))]),
        **all_differences(world, outputs),
        "controls": controls(world, sketched(outputs), control),
    }


def controls(
    world: World, sound: Sketches, run: Callable[[Change], tuple[list[ProbeResult], Sketches]]
) -> list[dict[str, Any]]:
    """The stack with one matrix scaled, until a scale is refused."""
    found: list[dict[str, Any]] = []
    for factor in SCALES:
        probes, sketches = run(world.scale_by(factor))
        found.append({"scale": factor, **judged(probes), "moved": moved(world, sketches, sound)})
        if not found[-1]["fit"]:
            break
    return found


def run_onnx(world: World, provider: str, change: Change | None) -> Outputs:
    """Outputs of all batches, from a graph exported with the shape of the first."""
    model = world.subject.build()
    model.set_compute_dtype(world.dtype)
    if change is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, parameter))
    batches = [world.subject.batch(number)["tokens"] for number in range(world.plan.batches)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        with redirect_stdout(sys.stderr):
            torch.onnx.export(model.eval(), (batches[0],), path, dynamo=True, verbose=False)
        session = open_session(path, provider)
        (tokens,) = session.get_inputs()
        return [torch.from_numpy(session.run(None, {tokens.name: batch.numpy()})[0]) for batch in batches]


def open_session(path: Path, provider: str) -> Any:
    """One provider for the whole graph: ONNX Runtime would otherwise give to the CPU what another one lacks."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(f"{provider} is not in this ONNX Runtime, only {onnxruntime.get_available_providers()}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return onnxruntime.InferenceSession(path, options, providers=[provider])


# ---- figures


def judged(probes: list[ProbeResult]) -> dict[str, Any]:
    """Whether all probes passed, and the largest effect by kind; of the loss, the share of its margin."""
    effects: dict[str, float] = defaultdict(float)
    for probe in probes:
        measure = probe.measures[0]
        kind = probe.subject if probe.subject.startswith("loss") else probe.subject.split()[0]
        effects[kind] = max(effects[kind], measure.used if kind == "loss" else measure.used * measure.bound)
    failed = sum(probe.outcome != "passed" for probe in probes)
    return {"fit": failed == 0, "probes": len(probes), "failed": failed, "effects": dict(effects)}


def moved(world: World, found: Sketches, sound: Sketches) -> dict[str, float]:
    """How far a control is from the same stack without it, in noise floors: the worst batch and tensor of a kind."""
    floors = world.noise.floors()
    here, there = (replace(world.noise.exact, sketches=sketches) for sketches in (found, sound))
    worst: dict[str, float] = defaultdict(float)
    for (kind, name, _), distance in distances(here, there).items():
        worst[kind] = max(worst[kind], distance / floors[kind, name].overall)
    return dict(worst)


def sketched(outputs: Outputs) -> Sketches:
    return {f"outputs/{number}": sketch("outputs", tensor) for number, tensor in enumerate(outputs)}


def all_differences(world: World, outputs: Outputs) -> dict[str, Any]:
    return {
        "to_eager": differences(outputs, world.eager_outputs),
        "to_float64": differences(outputs, world.exact_outputs),
        "eager_to_float64": differences(world.eager_outputs, world.exact_outputs),
    }


def differences(found: Outputs, reference: Outputs) -> dict[str, Any]:
    """Over all batches. Elements below their batch's root mean square have no relative difference: they may be 0."""
    here, there = (torch.stack(outputs).double() for outputs in (found, reference))
    far = (here - there).abs()
    size = there.square().mean((1, 2, 3), keepdim=True).sqrt()
    large = there.abs() >= size
    return {
        "equal_bits": all(map(torch.equal, found, reference)),
        "equal_elements": float((far == 0).double().mean()),
        "largest_absolute": float(far.max()),
        "largest_relative": float((far / there.abs())[large].max()),
        "norm_relative": float(far.norm() / there.norm()),
    }


def equal_gradients(one: Trace, other: Trace) -> float:
    """Share of gradients whose sketches have the same bits."""
    names = [name for name in one.sketches if name.startswith("gradient/")]
    return sum(torch.equal(one.sketches[name], other.sketches[name]) for name in names) / len(names)


# ---- the run


@contextmanager
def small_model() -> Iterator[str]:
    """The directory of a small dense model, with a tokenizer."""
    with tempfile.TemporaryDirectory() as temporary:
        small = Path(temporary) / "dense-small"
        config = DecoderConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            # A product of this width then neither grows nor shrinks what goes through it.
            initializer_range=HIDDEN**-0.5,
        )
        decoder = Decoder(config)
        initialise(decoder, SEED)
        save_model(decoder, small)
        write_tokenizer("bytes", small)
        yield str(small)


def measure(subject: DecoderSubject, provider: str) -> list[dict[str, Any]]:
    """Every stack in every dtype."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        print(f"{subject.name} {name}: float64, eager mode, noise", file=sys.stderr)
        world = World(subject, dtype, TraceExtent())
        model = {"model": subject.name, "layers": subject.build().config.num_hidden_layers, "dtype": name}
        for stack, run in (("compile", compiled), ("onnxruntime", lambda world: exported(world, provider))):
            print(f"{subject.name} {name}: {stack}", file=sys.stderr)
            rows.append({**model, "stack": stack, "controls_scale": world.scaled, **run(world)})
    return rows


def must_hold(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By dtype, over the stacks that ran."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        ran = [row for row in rows if row["dtype"] == dtype and "missing" not in row]
        refused = [not row["controls"][0]["fit"] for row in ran]
        found[dtype] = {
            "fit": f"{sum(row['fit'] for row in ran)}/{len(ran)}",
            f"refused_at_{SCALES[0]}": f"{sum(refused)}/{len(ran)}",
            "holds": all(row["fit"] for row in ran) and all(refused),
        }
    return found


def versions(provider: str) -> dict[str, Any]:
    """What the figures depend on."""
    import onnx
    import onnxruntime

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "provider": provider,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", help="a Hugging Face directory to take beside the small model")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of ONNX Runtime")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the exporter tells what it does not find
    warnings.simplefilter("ignore", FutureWarning)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache, small_model() as small:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows += measure(DecoderSubject(small), options.provider)
        if options.model is not None:
            rows += measure(DecoderSubject(options.model, layers=options.layers), options.provider)
    document = {
        "benchmark": "qualify-stacks",
        "date": time.strftime("%Y-%m-%d"),
        "machine": versions(options.provider),
        "stacks": rows,
        "must_hold": must_hold(rows),
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
