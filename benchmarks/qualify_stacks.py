"""Whether other software on the same CPU, really different and sound, is found fit, and a small defect in it refused.

    make peers
    python benchmarks/qualify_stacks.py --json [--model DIR] [--provider CPUExecutionProvider]

The reference is torch's eager mode. Against it stand two other implementations of the same model:

* `compile`: forward and backward pass through torch.compile (inductor); the whole trace of a qualification (outputs,
  decoding, gradients, updates, losses) in float32 and bfloat16. The optimizer is torch's own in both.
* `onnxruntime`: the forward pass, exported to ONNX with fixed shapes and run by ONNX Runtime; outputs of the same
  batches in float32. Where a provider lacks an operator in a dtype, its own sentence stands in place of figures.

Judged as `beringia qualify` judges a lockstep trace: distance from float64 over the noise floor (`effects.py`). Calls
are not watched: neither stack makes those of eager mode. Beside the effects stand the differences themselves. Must hold: each
stack is fit, and each with one weight matrix scaled by `SCALE` is refused.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers/bin/python"
SCALE = 1.02
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
from beringia.qualify.effects import Noise, judge_outputs, judge_trace, power_of  # noqa: E402
from beringia.qualify.reference import DRAWS  # noqa: E402
from beringia.qualify.subject import Batch, DecoderSubject  # noqa: E402
from beringia.qualify.trace import Change, Plan, Trace, Tracer, one_ulp, sketch  # noqa: E402
from beringia.qualify.verdict import judge  # noqa: E402
from beringia.records.certificate import ProbeResult  # noqa: E402

Outputs = list[torch.Tensor]


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

    def __init__(self, source: str, dtype: torch.dtype, plan: Plan) -> None:
        self.source, self.dtype, self.plan = source, dtype, plan
        self.subject = DecoderSubject(source)
        self.chip = open_chip("cpu")
        tracer = Tracer(self.subject, plan)
        exact, self.routes = tracer.in_float64()
        self.eager = self.trace(tracer)
        draws = [self.trace(tracer, one_ulp(seed, dtype)) for seed in range(DRAWS)]
        self.noise = Noise.of(exact, self.eager, draws)
        self.exact_outputs = self.outputs(self.subject, torch.float64)
        self.eager_outputs = self.outputs(self.subject, dtype)

    def trace(self, tracer: Tracer, change: Change | None = None) -> Trace:
        return tracer.on_chip(self.chip, self.dtype, self.routes, begin_step=lambda: None, change=change)

    def outputs(self, subject: DecoderSubject, dtype: torch.dtype) -> Outputs:
        """Whole, of every batch."""
        model = subject.place(subject.build(), self.chip.device, dtype)
        with torch.no_grad():
            return [subject.outputs(model, subject.batch(number)) for number in range(self.plan.batches)]

    def scaled_weight(self) -> str:
        """Which matrix the control scales: the last of the middle layer."""
        return f"model.layers.{self.subject.build().config.num_hidden_layers // 2}.mlp.down_proj.weight"

    def scale(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return SCALE * weight if name == self.scaled_weight() else weight


# ---- what is measured


def compiled(world: World) -> dict[str, Any]:
    """torch.compile against eager mode, and the control."""
    subject = CompiledSubject(world.source)
    tracer = Tracer(subject, world.plan)
    torch.compiler.reset()
    counters.clear()
    trace = world.trace(tracer)
    graphs = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    outputs = world.outputs(subject, world.dtype)
    control = judge_trace(world.noise, world.trace(tracer, world.scale))
    return {
        **judged(world, judge_trace(world.noise, trace)),
        "to_eager": differences(outputs, world.eager_outputs),
        "to_float64": differences(outputs, world.exact_outputs),
        "eager_to_float64": differences(world.eager_outputs, world.exact_outputs),
        "gradients_with_equal_bits": equal_gradients(trace, world.eager),
        "compiled": graphs,
        "control": judged(world, control),
    }


def exported(world: World, provider: str) -> dict[str, Any]:
    """ONNX Runtime's forward pass against eager mode's, and the control."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

    try:
        outputs = run_onnx(world, provider, None)
    except Missing as missing:
        return {"missing": str(missing)}
    control = run_onnx(world, provider, world.scale)
    return {
        **judged(world, [judge_outputs(world.noise, sketches(outputs))]),
        "to_eager": differences(outputs, world.eager_outputs),
        "to_float64": differences(outputs, world.exact_outputs),
        "eager_to_float64": differences(world.eager_outputs, world.exact_outputs),
        "control": judged(world, [judge_outputs(world.noise, sketches(control))]),
    }


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


def judged(world: World, probes: list[ProbeResult]) -> dict[str, Any]:
    """The verdict of these probes alone, and the largest effect by kind."""
    effects: dict[str, float | None] = {}
    for probe in probes:
        measure = probe.measures[0]
        kind = probe.subject if probe.subject.startswith("loss") else probe.subject.split()[0]
        value = measure.value if measure.name == "effect" or measure.value is None else measure.used
        held = effects.get(kind, 0.0)
        effects[kind] = None if value is None or held is None else max(held, value)
    failed = [probe.subject for probe in probes if probe.outcome != "passed"]
    return {
        "verdict": judge(probes, None, power_of(world.plan.batches)).verdict,
        "fit": not failed,
        "probes": len(probes),
        "failed": len(failed),
        "effects": effects,
    }


def sketches(outputs: Outputs) -> dict[str, torch.Tensor]:
    return {f"outputs/{number}": sketch("outputs", tensor) for number, tensor in enumerate(outputs)}


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
def models(directory: str | None) -> Iterator[dict[str, str]]:
    """Names and directories: a small dense model, and the one that was asked for."""
    with tempfile.TemporaryDirectory() as temporary:
        small = Path(temporary) / "dense-small"
        config = DecoderConfig(
            family="llama",
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
        yield {"dense-small": str(small)} | ({} if directory is None else {Path(directory).name: directory})


def measure(source: str, provider: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every stack in every dtype."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        began = time.perf_counter()
        world = World(source, dtype, Plan())
        say(f"{dtype}: float64, eager mode, noise: {time.perf_counter() - began:.0f} s")
        for stack, run in (("compile", compiled), ("onnxruntime", lambda world: exported(world, provider))):
            began = time.perf_counter()
            found = run(world)
            seconds = time.perf_counter() - began
            say(f"{dtype} {stack}: {found.get('verdict', 'missing')} {seconds:.0f} s")
            rows.append(
                {
                    "model": world.subject.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "stack": stack,
                    "control_scales": world.scaled_weight(),
                    **found,
                    "seconds": seconds,
                }
            )
    return rows


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
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of ONNX Runtime")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the exporter tells what it does not find
    warnings.simplefilter("ignore", FutureWarning)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache, models(options.model) as found:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name, source in found.items():
            rows += measure(source, options.provider, lambda text, name=name: print(name, text, file=sys.stderr))
    ran = [row for row in rows if "missing" not in row]
    document = {
        "benchmark": "qualify-stacks",
        "date": time.strftime("%Y-%m-%d"),
        "machine": versions(options.provider),
        "scale_of_control": SCALE,
        "stacks": rows,
        "must_hold": {
            "stacks_fit": f"{sum(row['fit'] for row in ran)}/{len(ran)}",
            "controls_refused": f"{sum(not row['control']['fit'] for row in ran)}/{len(ran)}",
            "holds": all(row["fit"] and not row["control"]["fit"] for row in ran),
        },
    }
    print(json.dumps(document, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
