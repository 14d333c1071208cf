"""What a model does on every chip that is here: logits, training steps, the engine. The card script runs these too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from guarded import alarms_of_a_full_check, trainer

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.engine import Engine, Sampling
from beringia.errors import ChipUnavailable
from beringia.model import load_model
from beringia.numerics.state_hash import hash_state

TIMES_THE_CPUS = 8
"""Of the CPU's own largest error in float32: products of other libraries add in another order (a few times the error),
while ten-bit or 16-bit products would have thousands of times."""


@pytest.fixture(params=["cpu", "cuda", "npu"])
def chip(request: pytest.FixtureRequest) -> Iterator[Chip]:
    try:
        chip = open_chip(request.param)
    except ChipUnavailable as absent:
        pytest.skip(str(absent))
    yield chip
    chip.close()


def tokens() -> torch.Tensor:
    return torch.randint(4, 54, (3, 40), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def largest_error(chip: Chip) -> float:
    """Of float32 logits, against float64 on the CPU."""
    exact = load_model("r2-nano", seed=1).double()
    exact.set_compute_dtype(torch.float64)
    decoder = load_model("r2-nano", seed=1).to(chip.device)
    found = decoder(tokens().to(chip.device)).cpu().double()
    return float((found - exact(tokens())).abs().max())


def test_float32_logits_are_as_exact_as_the_cpus(chip: Chip) -> None:
    assert largest_error(chip) <= TIMES_THE_CPUS * largest_error(open_chip("cpu"))


def test_training_steps_repeat_bit_for_bit_and_the_guard_finds_nothing(chip: Chip) -> None:
    hashes = []
    for _ in range(2):
        made = trainer(chip.name)
        losses = [made.train_step().loss for _ in range(4)]
        assert alarms_of_a_full_check(made) == []
        hashes.append((losses, hash_state(dict(made.decoder.state_dict()), {})))
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
def test_a_compiled_step_has_the_eager_steps_loss(chip: Chip) -> None:
    if chip.compiler_missing():
        pytest.skip(str(chip.compiler_missing()))
    losses = []
    for compiled in (False, True):
        made = trainer(chip.name, share=None, dtype=torch.float32)
        if compiled:
            made.compile()
        losses.append([made.train_step().loss for _ in range(2)])
    # Fused operators round less often: some roundings of float32 in a loss that is a mean over 128 targets.
    assert losses[0] == pytest.approx(losses[1], rel=2.0**-16)


def test_the_engine_answers_as_on_the_cpu(chip: Chip) -> None:
    prompts = tokens()[:, :12].tolist()
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_end=True)
    answers = [
        [
            completion.tokens
            for completion in Engine("r2-nano", on, dtype=torch.float32, seed=1).generate(prompts, sampling)
        ]
        for on in (chip, open_chip("cpu"))
    ]
    assert answers[0] == answers[1]
