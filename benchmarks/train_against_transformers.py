"""Training `r2-micro` on the CPU: our decoder against transformers' `DeepseekV3ForCausalLM`. Prints one JSON object.

    python benchmarks/train_against_transformers.py --json [--rounds 15] [--steps 4]

float32, 32 x 64 tokens, AdamW, the same weights, the same batches, no dropped tokens, no multi-token prediction. Theirs
is a plain eager loop with each experts implementation that transformers has for the CPU; the fastest counts. Ours is
eager, compiled, and compiled with one process a core, each with its share of the batch (DDP over gloo): products this
small hardly gain from a second thread. Products in bfloat16 are printed, not compared: other arithmetic. Arms take
turns, a block of steps each, in an order that changes every round, so that a noisy machine disturbs all alike. Ratios
are taken within a round; figures are medians with 95 % intervals (order statistics).

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

from beringia.threads import prepare_threads, usable_cores

# isort: split
prepare_threads()  # before torch loads

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from beringia.model import load_model, save_model  # noqa: E402

BATCH, TOKENS, VOCABULARY = 32, 64, 54
LEARNING_RATE = 3e-4
LOSS_STEPS, LOSS_LIMIT = 50, 1e-4
SPEED_LIMIT, SPEED_STRETCH = 1.5, 1.8
THEIR_EXPERTS = ("eager", "grouped_mm", "batched_mm")
COMPARED = ("ours compiled", "ours compiled, a process a core")
STOP = -1

Step = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Arm:
    """One way to train, with the losses of its first steps and the seconds of its steps in each round."""

    name: str
    step: Step
    threads: int
    losses: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What all arms train on, over and over: a walk over the vocabulary that can be learned, with some noise."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, VOCABULARY, (LOSS_STEPS, BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (LOSS_STEPS, BATCH, 1), generator=generator)
    tokens = (start + stride * torch.arange(TOKENS + 1)) % VOCABULARY
    noise = torch.randint(0, VOCABULARY, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, noise, tokens)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def their_arm(directory: Path, experts: str, *, nudged: bool = False) -> Arm:
    """transformers in a plain loop, as its documentation trains."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation=experts
    ).train()
    if nudged:
        nudge(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        logits = model(tokens_BT, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Arm("control" if nudged else f"transformers {experts}", step, usable_cores())


@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Change every weight by up to one unit in its last place."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2.0**-22)


def our_step(directory: Path, *, compiled: bool, dtype: torch.dtype = torch.float32, ranks: int = 1) -> Step:
    """A training step of our decoder with a fused optimizer, on this rank's share of the batch.

    The correction bias stands still, as in transformers.
    """
    decoder = load_model(directory)
    decoder.set_compute_dtype(dtype)
    if decoder.mtp is not None:
        decoder.mtp.requires_grad_(False)
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    if compiled:
        decoder.leave_experts_eager()
        decoder.compile()
    forward = DistributedDataParallel(decoder, forward_sync_buffers=False) if ranks > 1 else decoder

    def step(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        losses = forward(tokens_BT, labels_BT, mtp=False)
        loss = losses.main_sum / losses.target_count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


class ManyProcesses:
    """Our decoder on one process a core. This process is rank 0; the others wait for its word and follow."""

    def __init__(self, directory: Path) -> None:
        self.ranks = usable_cores()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._others = [
            subprocess.Popen([sys.executable, __file__, "--follow", str(rank), str(port), str(directory)])
            for rank in range(1, self.ranks)
        ]
        meet(0, self.ranks, port)
        self._step = our_step(directory, compiled=True, ranks=self.ranks)

    def step(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        """One step of all ranks; the mean loss."""
        tell(tokens_BT)
        loss = self._step(*share(tokens_BT, labels_BT, 0, self.ranks))
        return mean_over_ranks(loss)

    def close(self) -> None:
        """Let the others end."""
        tell(torch.full((BATCH, TOKENS), STOP))
        dist.destroy_process_group()
        for process in self._others:
            process.wait()


def meet(rank: int, ranks: int, port: int) -> None:
    """Join the process group."""
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def tell(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Rank 0's batch, on every rank."""
    dist.broadcast(tokens_BT, 0)
    return tokens_BT


def mean_over_ranks(loss: float) -> float:
    """Mean of the ranks' losses, which have equally many targets each."""
    value = torch.tensor(loss)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def share(tokens_BT: torch.Tensor, labels_BT: torch.Tensor, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the batch."""
    return tokens_BT.chunk(ranks)[rank], labels_BT.chunk(ranks)[rank]


def follow(rank: int, port: int, directory: Path) -> None:
    """What the other processes do: the step that rank 0 does, until it says stop."""
    torch.set_num_threads(1)
    ranks = usable_cores()
    meet(rank, ranks, port)
    step = our_step(directory, compiled=True, ranks=ranks)
    labels = {tuple(tokens[0].tolist()): target for tokens, target in batches()}
    while True:
        tokens_BT = tell(torch.empty(BATCH, TOKENS, dtype=torch.int64))
        if tokens_BT[0, 0] == STOP:
            break
        mean_over_ranks(step(*share(tokens_BT, labels[tuple(tokens_BT[0].tolist())], rank, ranks)))
    dist.destroy_process_group()


def make_arms(directory: Path, many: ManyProcesses) -> list[Arm]:
    """All arms, with the same weights."""
    cores = usable_cores()
    bfloat16 = our_step(directory, compiled=True, dtype=torch.bfloat16)
    return [
        *(their_arm(directory, experts) for experts in THEIR_EXPERTS),
        their_arm(directory, "eager", nudged=True),
        Arm("ours eager", our_step(directory, compiled=False), cores),
        Arm("ours compiled", our_step(directory, compiled=True), cores),
        Arm("ours compiled, a process a core", many.step, 1),
        Arm("ours compiled, bfloat16 products", bfloat16, cores),
    ]


def first_losses(arms: list[Arm], data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The first steps of each arm: its losses, its warm-up, and how long its very first step took (compilation)."""
    for arm in arms:
        torch.set_num_threads(arm.threads)
        started = time.perf_counter()
        arm.losses.append(arm.step(*data[0]))
        arm.first_step_seconds = time.perf_counter() - started
        few = 3 if arm.name.endswith("batched_mm") else len(data)  # ten times slower than the others
        arm.losses += [arm.step(*batch) for batch in data[1:few]]


def take_turns(arms: list[Arm], data: list[tuple[torch.Tensor, torch.Tensor]], rounds: int, steps: int) -> None:
    """Each round every arm trains `steps` steps, in shuffled order; a round's figure is the mean seconds of a step."""
    order = random.Random(0)
    for number in range(rounds):
        for arm in order.sample(arms, len(arms)):
            torch.set_num_threads(arm.threads)
            started = time.perf_counter()
            for index in range(steps):
                arm.step(*data[(number * steps + index) % len(data)])
            arm.rounds.append((time.perf_counter() - started) / steps)


def median_with_interval(values: list[float]) -> dict[str, float]:
    """Median and the order statistics that hold it between them in 95 % of samples (binomial with p = 1/2)."""
    ordered = sorted(values)
    half_width = 0.98 * len(ordered) ** 0.5
    low = max(0, int(len(ordered) / 2 - half_width))
    high = min(len(ordered) - 1, int(len(ordered) / 2 + half_width))
    return {"median": statistics.median(ordered), "low": ordered[low], "high": ordered[high]}


def summary(arms: list[Arm]) -> dict[str, Any]:
    """Speeds of all arms, ratios to transformers' best, and the largest difference of losses."""
    named = {arm.name: arm for arm in arms}
    theirs = min((named[f"transformers {e}"] for e in THEIR_EXPERTS), key=lambda arm: statistics.median(arm.rounds))
    ours = {name: arm for name, arm in named.items() if name.startswith("ours")}
    ratios = {
        name: median_with_interval([slow / fast for slow, fast in zip(theirs.rounds, arm.rounds, strict=True)])
        for name, arm in ours.items()
    }
    differences = {
        name: max(abs(a - b) for a, b in zip(arm.losses, theirs.losses, strict=True))
        for name, arm in (ours | {"control": named["control"]}).items()
    }
    best = max(COMPARED, key=lambda name: ratios[name]["median"])
    return {
        "tokens_per_second": {arm.name: BATCH * TOKENS / statistics.median(arm.rounds) for arm in arms if arm.rounds},
        "step_seconds": {arm.name: median_with_interval(arm.rounds) for arm in arms if arm.rounds},
        "fastest_step_seconds": {arm.name: min(arm.rounds) for arm in arms if arm.rounds},
        "transformers_best": theirs.name,
        "ours_best": best,
        "ratio_to_transformers_best": ratios,
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
    parser.add_argument("--follow", nargs=3, metavar=("RANK", "PORT", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        rank, port, directory = arguments.follow
        follow(int(rank), int(port), Path(directory))
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = batches()
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        save_model(load_model("r2-micro", seed=0), directory)
        many = ManyProcesses(directory)
        arms = make_arms(directory, many)
        first_losses(arms, data)
        slow = [arm for arm in arms if arm.name.endswith("batched_mm")]
        timed = [arm for arm in arms if arm not in slow and arm.name != "control"]
        take_turns(timed, data, arguments.rounds, arguments.steps)
        take_turns(slow, data, arguments.rounds, 1)
        many.close()
    result = {"machine": machine(), "rounds": arguments.rounds, "steps": arguments.steps, **summary(arms)}
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
