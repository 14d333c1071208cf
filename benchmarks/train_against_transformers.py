"""Training `r2-micro` on the CPU: our decoder against transformers' `DeepseekV3ForCausalLM`. Prints one JSON object.

    python benchmarks/train_against_transformers.py --json [--rounds 15] [--steps 4]

float32, 32 x 64 tokens, AdamW, the same weights, the same batches, no dropped tokens, no multi-token prediction. Theirs
is a plain eager loop with each experts implementation that transformers has for the CPU; the fastest counts. Ours runs
in processes set up as `beringia train` sets up its workers, which keep freed memory: eager, compiled, and compiled with
one process a core, each with its share of the batch (DDP over gloo): products this small hardly gain from a second
thread. Printed, not compared: theirs in a process that keeps freed memory too, and our products in bfloat16.

Every arm has a process of its own and waits without computing until it is its turn: a block of steps each, in an order
that changes every round, so that a noisy machine disturbs all alike. Ratios are taken within a round; figures are
medians with 95 % intervals (order statistics). Compilation is part of an arm's first step, printed apart.

Must hold: losses within 1e-4 over 50 steps, and 1.5 times the tokens per second; 1.8 is the stretch. The control beside
the loss difference is what transformers itself differs by when its weights are nudged by their last bit: a token near a
tie then goes to another expert, and from there on the runs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beringia.machine.threads import prepare_threads, usable_cores

# isort: split
prepare_threads()  # before torch loads

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from beringia.machine.memory import keep_freed_memory  # noqa: E402
from beringia.model import load_model, save_model  # noqa: E402

BATCH, TOKENS, VOCABULARY = 32, 64, 54
LEARNING_RATE = 3e-4
LOSS_STEPS, LOSS_LIMIT = 50, 1e-4
SPEED_LIMIT, SPEED_STRETCH = 1.5, 1.8
EMULATES_BF16 = not torch.cpu._is_avx512_bf16_supported()
"""A CPU without bfloat16 instructions converts in software: many times slower."""
COMPARED = ("ours compiled", "ours compiled, a process a core")

Step = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    experts: str = ""
    """transformers' experts implementation; empty for our decoder."""
    compiled: bool = False
    dtype: torch.dtype = torch.float32
    nudged: bool = False
    keeps_memory: bool = False
    ranks: int = 1
    timed: bool = True
    slow: bool = False
    """So much slower than the rest that its first steps are fewer and a round is one step."""


WAYS = (
    Way("transformers eager", experts="eager"),
    Way("transformers grouped_mm", experts="grouped_mm"),
    Way("transformers batched_mm", experts="batched_mm", slow=True),
    Way("transformers grouped_mm, keeping memory", experts="grouped_mm", keeps_memory=True),
    Way("control", experts="grouped_mm", nudged=True, timed=False),
    Way("ours eager", keeps_memory=True),
    Way("ours compiled", compiled=True, keeps_memory=True),
    Way("ours compiled, a process a core", compiled=True, keeps_memory=True, ranks=usable_cores()),
    Way("ours compiled, bfloat16 products", compiled=True, dtype=torch.bfloat16, keeps_memory=True, slow=EMULATES_BF16),
    Way(
        "ours compiled, bfloat16 products, a process a core",
        compiled=True,
        dtype=torch.bfloat16,
        keeps_memory=True,
        ranks=usable_cores(),
        slow=EMULATES_BF16,
    ),
)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What all arms train on, over and over: a walk over the vocabulary that can be learned, with some noise."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, VOCABULARY, (LOSS_STEPS, BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (LOSS_STEPS, BATCH, 1), generator=generator)
    tokens = (start + stride * torch.arange(TOKENS + 1)) % VOCABULARY
    noise = torch.randint(0, VOCABULARY, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, noise, tokens)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


# In an arm's process


def their_step(directory: Path, way: Way) -> Step:
    """transformers in a plain loop, as its documentation trains."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation=way.experts
    ).train()
    if way.nudged:
        nudge(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        logits = model(tokens_BT, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Change every weight by up to one unit in its last place."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2.0**-22)


def our_step(directory: Path, way: Way) -> Step:
    """A training step of our decoder with a fused optimizer, on this rank's share of the batch.

    The correction bias stands still, as in transformers.
    """
    decoder = load_model(directory)
    decoder.set_compute_dtype(way.dtype)
    if decoder.mtp is not None:
        decoder.mtp.requires_grad_(False)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    if way.compiled:
        decoder.leave_experts_eager()
        decoder.compile()
    forward = decoder if way.ranks == 1 else DistributedDataParallel(decoder, forward_sync_buffers=False)

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        losses = forward(tokens_BT, labels_BT, mtp=False)
        loss = losses.main_sum / losses.target_count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(mean_over_ranks(loss.detach()).item())

    return step


def mean_over_ranks(loss: torch.Tensor) -> torch.Tensor:
    """Mean of the ranks' losses, which have equally many targets each."""
    if not dist.is_initialized():
        return loss
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def serve(way: Way, rank: int, port: int, directory: Path) -> None:
    """An arm's process: for each line `first count` on standard input, train so many steps from batch `first` on.

    Rank 0 answers with their losses and how many seconds they took.
    """
    if way.keeps_memory:
        keep_freed_memory()
    if way.ranks > 1:
        torch.set_num_threads(max(1, usable_cores() // way.ranks))
        store = dist.TCPStore("127.0.0.1", port, way.ranks, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=way.ranks)
    step = their_step(directory, way) if way.experts else our_step(directory, way)
    data = [tuple(part.chunk(way.ranks)[rank] for part in batch) for batch in batches()]
    for line in sys.stdin:
        first, count = map(int, line.split())
        started = time.perf_counter()
        losses = [step(*data[index % len(data)]) for index in range(first, first + count)]
        if rank == 0:
            print(json.dumps({"losses": losses, "seconds": time.perf_counter() - started}), flush=True)
    if way.ranks > 1:
        dist.destroy_process_group()


# In the process that compares


@dataclass
class Arm:
    """One way to train in its processes, with the losses of its first steps and the seconds of a step by round."""

    way: Way
    processes: list[subprocess.Popen[str]]
    losses: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.way.name

    def train(self, first: int, count: int) -> tuple[list[float], float]:
        """Losses of so many steps, and the seconds that they took together."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{first} {count}\n")
            process.stdin.flush()
        output = self.processes[0].stdout
        assert output is not None
        line = output.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early: what it said is above")
        answer = json.loads(line)
        return answer["losses"], answer["seconds"]

    def close(self) -> None:
        """Let its processes end."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()


def start(way: Way, directory: Path) -> Arm:
    """The processes of one arm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--serve", way.name]
    return Arm(
        way,
        [
            subprocess.Popen(
                [*command, str(rank), str(port), str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(way.ranks)
        ],
    )


def first_losses(arm: Arm) -> None:
    """An arm's first steps: its losses, its warm-up, and how long its very first step took (compilation)."""
    losses, arm.first_step_seconds = arm.train(0, 1)
    more, seconds = arm.train(1, 2 if arm.way.slow else LOSS_STEPS - 1)
    arm.losses = losses + more
    print(f"{arm.name}: first step {arm.first_step_seconds:.1f} s, then {seconds / len(more):.3f} s", file=sys.stderr)


def take_turns(arms: list[Arm], rounds: int, steps: int) -> None:
    """Each round every arm trains some steps, in shuffled order; a round's figure is the mean seconds of a step."""
    order = random.Random(0)
    for number in range(rounds):
        for arm in order.sample(arms, len(arms)):
            count = 1 if arm.way.slow else steps
            arm.rounds.append(arm.train(number * steps, count)[1] / count)


def median_with_interval(values: list[float]) -> dict[str, float]:
    """Median and the order statistics that hold it between them in 95 % of samples (binomial with p = 1/2)."""
    ordered = sorted(values)
    half_width = 0.98 * len(ordered) ** 0.5
    low = max(0, int(len(ordered) / 2 - half_width))
    high = min(len(ordered) - 1, int(len(ordered) / 2 + half_width))
    return {"median": statistics.median(ordered), "low": ordered[low], "high": ordered[high]}


def ratio(slow: Arm, fast: Arm) -> dict[str, float]:
    """How many times the tokens per second, round by round."""
    return median_with_interval([a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)])


def summary(arms: list[Arm]) -> dict[str, Any]:
    """Speeds of all arms, ratios to transformers' best, and the largest loss difference of arms that did all steps."""
    named = {arm.name: arm for arm in arms}
    plain = [arm for arm in arms if arm.way.experts and arm.way.timed and not arm.way.keeps_memory]
    theirs = min(plain, key=lambda arm: statistics.median(arm.rounds))
    kept = named["transformers grouped_mm, keeping memory"]
    ours = {name: arm for name, arm in named.items() if not arm.way.experts}
    ratios = {name: ratio(theirs, arm) for name, arm in ours.items()}
    differences = {
        name: max(abs(a - b) for a, b in zip(arm.losses, theirs.losses, strict=True))
        for name, arm in (ours | {"control": named["control"]}).items()
        if len(arm.losses) == LOSS_STEPS
    }
    best = max(COMPARED, key=lambda name: ratios[name]["median"])
    return {
        "tokens_per_second": {arm.name: BATCH * TOKENS / statistics.median(arm.rounds) for arm in arms if arm.rounds},
        "step_seconds": {arm.name: median_with_interval(arm.rounds) for arm in arms if arm.rounds},
        "fastest_step_seconds": {arm.name: min(arm.rounds) for arm in arms if arm.rounds},
        "transformers_best": theirs.name,
        "ours_best": best,
        "ratio_to_transformers_best": ratios,
        "ratio_to_transformers_keeping_memory": {name: ratio(kept, arm) for name, arm in ours.items()},
        "first_step_seconds": {arm.name: arm.first_step_seconds for arm in arms},
        "largest_loss_difference": differences,
        "loss_steps": LOSS_STEPS,
        "last_loss": {arm.name: arm.losses[-1] for arm in arms if len(arm.losses) == LOSS_STEPS},
        "holds": {
            "losses": all(differences[name] <= LOSS_LIMIT for name in COMPARED),
            "speed": ratios[best]["low"] >= SPEED_LIMIT,
            "speed_stretch": ratios[best]["low"] >= SPEED_STRETCH,
        },
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="indent nothing: one line")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps of each arm in a round")
    parser.add_argument("--serve", nargs=4, metavar=("WAY", "RANK", "PORT", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        name, rank, port, directory = arguments.serve
        way = next(way for way in WAYS if way.name == name)
        serve(way, int(rank), int(port), Path(directory))
        return
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        save_model(load_model("r2-micro", seed=0), directory)
        arms = []
        for way in WAYS:
            arms.append(start(way, directory))
            first_losses(arms[-1])
        take_turns([arm for arm in arms if arm.way.timed], arguments.rounds, arguments.steps)
        for arm in arms:
            arm.close()
    result = {"machine": machine(), "rounds": arguments.rounds, "steps": arguments.steps, **summary(arms)}
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
