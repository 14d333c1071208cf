"""The story of recipes/r2-nano.toml as a run directory, without training: for tests of the report, and to look at.

`python tests/report_story.py DIRECTORY` writes the run and its page.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from beringia.records import events
from beringia.records.events import Event
from beringia.records.identity import ChipIdentity
from beringia.records.jsonl import JsonLinesWriter
from beringia.records.manifest import CleanCheck
from beringia.records.record import canonical_hash
from beringia.records.run_directory import RunDirectory

EMULATED = ChipIdentity(
    vendor="emulated",
    sku="Ascend 910B",
    truth="emulated",
    driver="none",
    runtime="emulated fast",
    torch="2.13.0+cpu",
    plugin="none",
    switches={"fidelity": "fast", "matrix": "bfloat16 128x24", "subnormals": "flushed", "overflow": "infinite"},
)
PROCESSOR = ChipIdentity(
    vendor="cpu",
    sku="Intel Xeon Platinum 8481C",
    truth="real",
    driver="none",
    runtime="AVX512",
    torch="2.13.0+cpu",
    plugin="none",
    switches={"deterministic_algorithms": "True", "float32_matmul_precision": "highest", "threads": "2"},
)
RECIPE = {
    "name": "r2-nano",
    "seed": 7,
    "model": {"preset": "r2-nano"},
    "chips": {"preferred": {"use": "emulated:ascend-910b", "faults": "r2-2025"}, "fallback": {"use": "auto"}},
    "data": {"task": "digit-sum"},
    "train": {"prefer": ["preferred", "fallback"], "steps": 600},
}
SITES = ("embed_tokens", "layers.0", "layers.1", "layers.2", "lm_head")


class Story:
    """Writes events with a clock that moves as the run does."""

    def __init__(self, directory: Path, *, steps: int = 600) -> None:
        self.run = RunDirectory(directory)
        self.writer = JsonLinesWriter(self.run.events)
        self.run.resolved_recipe.write_text(json.dumps({**RECIPE, "train": {**RECIPE["train"], "steps": steps}}))  # type: ignore[dict-item]
        self.random = random.Random(7)
        self.time = 1_764_000_000.0
        self.sequence = 0
        self.epoch = 1
        self.steps = steps
        self.chip: str | None = None

    def tell(self, event: Event, after: float = 0.0) -> None:
        """Append one event, `after` seconds since the last."""
        self.time += after
        chip = event.chip if event.chip is not None else self.chip
        told = event.model_copy(
            update={"time": self.time, "sequence": self.sequence, "epoch": self.epoch, "chip": chip}
        )
        self.writer.append(told.model_dump(mode="json"))
        self.sequence += 1

    def begin(self) -> None:
        self.tell(
            events.RunStarted(
                name="r2-nano",
                recipe_hash=canonical_hash(RECIPE),
                beringia="0.1.0",
                steps=self.steps,
                prefer=("preferred", "fallback"),
            )
        )

    def qualify(self, label: str, verdict: str, first_wrong: str | None = None, *, seconds: float = 18.0) -> None:
        event = events.Qualified(
            used=label,
            identity_hash="ab" * 32,
            verdict=verdict,  # type: ignore[arg-type]
            reasons=("12 bounds hold",),
            first_wrong=first_wrong,
            certificate=f"certificates/{label}.json",
            seconds=seconds,
        )
        self.tell(event.model_copy(update={"chip": label}), after=seconds)

    def open(self, label: str, identity: ChipIdentity = PROCESSOR, asked: str = "auto", used: str = "cpu") -> None:
        self.chip = label
        self.tell(
            events.ChipOpened(
                asked=asked,
                used=used,
                identity=identity,
                identity_hash=identity.hash,
                ranks=1,
                compute_dtype="bfloat16" if identity is EMULATED else "float32",
                sharding="none",
            ),
            after=4.2,
        )

    def open_preferred(self) -> None:
        self.open("preferred", EMULATED, "emulated:ascend-910b", "emulated:ascend-910b")

    def decide(self, action: str, reason: str, **details: Any) -> None:
        self.tell(events.Decision(action=action, reason=reason, **details), after=0.05)  # type: ignore[arg-type]

    def resume(self, step: int) -> None:
        self.tell(
            events.Resumed(
                step=step,
                cursor=32 * step,
                state_hash_expected=state_hash(step),
                state_hash=state_hash(step),
                load_seconds=0.11,
                first_sample=canonical_hash(["sample", 32 * step]),
            ),
            after=0.3,
        )

    def loss(self, step: int) -> float:
        understood = 0.35 / (1 + math.exp(min(50.0, (step - 330) / 40)))
        return 0.55 + 2.6 * math.exp(-step / 70) + understood + self.random.gauss(0, 0.05)

    def train(self, first: int, last: int, *, seconds: float = 0.33, checks: bool = True) -> None:
        """Steps `first` to `last`: a checkpoint every 50, trusted 30 later, checks every 10, evaluations every 200."""
        for step in range(first, last + 1):
            took = seconds * (1 + abs(self.random.gauss(0, 0.08)))
            self.tell(
                events.StepDone(
                    step=step,
                    loss=self.loss(step),
                    mtp_loss=self.loss(step) + 0.2,
                    gradient_norm=0.4 + abs(self.random.gauss(0, 0.2)),
                    learning_rate=2e-3,
                    tokens=1664,
                    seconds=took,
                    cursor=32 * step,
                    guard_seconds=took * 0.009,
                ),
                after=took,
            )
            if checks and step % 10 == 3:
                self.check(step)
            if step % 50 == 0:
                self.checkpoint(step)
            if step % 50 == 30 and step > 50:
                checked = tuple(CleanCheck(site=site, replica=0, step=step - place) for place, site in enumerate(SITES))
                self.tell(
                    events.CheckpointTrusted(step=step - 30, state_hash=state_hash(step - 30), checks=checked),
                    after=0.01,
                )
            if step % 200 == 0:
                self.evaluate(step)

    def check(self, step: int, site: str | None = None, share: float | None = None) -> None:
        site = site or SITES[(step // 10) % len(SITES)]
        share = (
            share if share is not None else math.exp(self.random.gauss(-2.6 if self.chip == "preferred" else -3.5, 0.7))
        )
        bound = 3.1e-3
        self.tell(
            events.CheckDone(
                step=step,
                detector="layer-shadow",
                site=site,
                tensor="input.gradient",
                value=share * bound,
                bound=bound,
                seconds=0.02,
            ),
            after=0.02,
        )
        if step % 20 == 3:
            self.tell(
                events.CheckDone(
                    step=step, detector="repeat", site=site, tensor="output", value=0.0, bound=0.0, seconds=0.004
                )
            )

    def alarm(self, step: int, share: float, site: str = "layers.0") -> None:
        self.check(step, site, share)
        self.tell(
            events.Alarm(
                step=step,
                detector="layer-shadow",
                site=site,
                tensor="input.gradient",
                value=share * 3.1e-3,
                bound=3.1e-3,
                message=f"The gradient of {site}'s input differs from float64 by {share:.1f} times its bound.",
            )
        )

    def checkpoint(self, step: int) -> None:
        directory = f"checkpoints/step-{step:06d}"
        (self.run.root / directory).mkdir(parents=True, exist_ok=True)
        (self.run.root / directory / "manifest.json").write_text("{}")
        self.tell(
            events.CheckpointWritten(
                step=step,
                directory=directory,
                bytes=5_214_332,
                state_hash=state_hash(step),
                pause_seconds=0.004,
                write_seconds=0.06,
            ),
            after=0.07,
        )

    def evaluate(self, step: int, *, samples: int = 256) -> None:
        accuracy = 0.1 + 0.32 * step / self.steps
        self.tell(
            events.Evaluated(
                step=step,
                loss=self.loss(step) + 0.02,
                sequences=256,
                accuracy=accuracy,
                accuracy_low=accuracy - 0.055,
                accuracy_high=accuracy + 0.06,
                samples=samples,
                chance=0.1,
                seconds=4.1,
            ),
            after=4.1,
        )

    def fault(self, code: str, category: str, message: str, step: int | None) -> None:
        self.tell(events.Fault(step=step, code=code, category=category, message=message), after=0.4)  # type: ignore[arg-type]

    def cross(self, step: int, *, canary_from: int, passed: bool = True, after_hash: str | None = None) -> None:
        self.tell(
            events.Canary(
                from_step=canary_from,
                to_step=step,
                difference=0.0131 if passed else 0.21,
                band=0.0384,
                parts={"one-ulp perturbation": 0.0121, "roundoff of preferred": 0.0258, "roundoff of fallback": 0.0005},
                passed=passed,
                seconds=3.4,
                message="" if passed else "The replayed update differs by 5.5 times the band.",
            ),
            after=3.4,
        )
        self.resume(step)
        self.tell(
            events.Crossing(
                from_chip="preferred",
                to_chip="fallback",
                step=step,
                state_hash_before=state_hash(step),
                state_hash_after=after_hash or state_hash(step),
                band=0.0384,
                difference=0.0131,
                seconds=5.1,
                imports_seconds=3.1,
                load_seconds=0.11,
                canary_seconds=3.4,
            ),
            after=0.1,
        )

    def export(self) -> None:
        self.tell(
            events.Exported(step=self.steps, directory="export", largest_difference=2.4e-6, bound=1.1e-5), after=6.0
        )

    def finish(self, status: str = "done", message: str = "All steps are done.") -> None:
        self.tell(events.RunFinished(status=status, step=self.steps, message=message), after=0.1)  # type: ignore[arg-type]

    def end(self) -> Path:
        self.writer.close()
        return self.run.root


def state_hash(step: int) -> str:
    """A stand-in for the hash of the live tensors at a step."""
    return canonical_hash(["state", step])


def write_story(directory: Path) -> Path:
    """The whole story: a retry, a rollback, the crossing, the end."""
    story = Story(directory)
    story.begin()
    story.decide("start", "first chip of train.prefer", to_chip="preferred")
    story.open_preferred()
    story.tell(
        events.Fallback(what="compile", asked="torch.compile", used="eager", reason="this chip has no compiler backend")
    )
    story.train(1, 86)
    story.fault("507014", "transient", "aicore timeout [AICORE_TIMEOUT] device 0", 87)
    story.decide(
        "retry",
        "507014 is transient on this chip (1 of 3 within 200 steps)",
        to_chip="preferred",
        to_step=50,
        lost_steps=36,
    )
    story.open_preferred()
    story.resume(50)
    story.train(51, 163)
    story.alarm(164, 5.8)
    story.decide(
        "rollback",
        "layers.0 input.gradient at 5.8 times its bound; step 100 is the last trusted checkpoint",
        to_chip="preferred",
        to_step=100,
        lost_steps=63,
    )
    story.open_preferred()
    story.resume(100)
    story.train(101, 238)
    story.alarm(239, 6.1)
    story.alarm(239, 2.3, "layers.1")
    story.decide(
        "cross",
        "layers.0 alarmed again after a rollback: the fault of this chip is persistent",
        to_chip="fallback",
        to_step=200,
        lost_steps=38,
    )
    story.open("fallback")
    story.cross(200, canary_from=150)
    story.train(201, 600, seconds=0.24)
    story.export()
    story.finish()
    return story.end()


if __name__ == "__main__":
    from beringia.report.page import write_report

    print(write_report(write_story(Path(sys.argv[1]))))
