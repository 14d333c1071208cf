"""Small models of the four families, and every operator call of a training step and a step of decoding on a chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.chips.emulated.device import register
from beringia.chips.open import open_chip
from beringia.model import Decoder, DecoderConfig, initialise
from beringia.numerics.state_hash import hash_state
from beringia.qualify.operators.check import check
from beringia.qualify.operators.watch import Call, Watch
from beringia.qualify.subject import TRAINING, DecoderSubject, on_device
from beringia.qualify.trace import make_optimizer
from beringia.records.certificate import ModelFingerprint, OperatorCheck

# torch's autograd makes its queues at the first backward pass of a process and learns of no device later.
register()

_GROUPED = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
CONFIGS = {
    "deepseek_v3": replace(
        _GROUPED,
        num_key_value_heads=4,
        latent=True,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        moe_intermediate_size=20,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
    "llama": _GROUPED,
    "qwen2": replace(_GROUPED, attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(_GROUPED, qk_norm=True, head_dim=16),
}


@dataclass(frozen=True)
class SmallSubject(DecoderSubject):
    """A model of the family that `source` names, with drawn weights, norms and biases, on drawn tokens."""

    samples: int = 2
    tokens: int = 16

    def build(self) -> Decoder:
        decoder = Decoder(CONFIGS[self.source])
        initialise(decoder, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.dim() < 2:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return decoder

    def fingerprint(self) -> ModelFingerprint:
        weights = hash_state(self.build().state_dict(), {})
        return ModelFingerprint(name=self.source, configuration="5f" * 32, weights=weights, parameters=1)

    def _row(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(number + 1000 * self.seed)
        return torch.randint(0, 61, (self.tokens + 1,), generator=generator).tolist()


@contextmanager
def opened(name: str, fault: str = "", directory: Path | None = None) -> Iterator[Chip]:
    """A chip; with one fault, given by its fields, in training step 1."""
    script = None
    if fault:
        assert directory is not None
        script = directory / "fault.toml"
        script.write_text(f'summary = "test"\n[[faults]]\n{fault}\n')
    chip = open_chip(name, faults=None if script is None else str(script))
    chip.begin_step(1)
    try:
        yield chip
    finally:
        chip.close()


def calls_of(function: Callable[[], object], model: nn.Module | None = None, device: str = "cpu") -> list[Call]:
    """The operator calls that a function makes."""
    calls: list[Call] = []
    with Watch(model or nn.Identity(), torch.device(device), calls.append):
        function()
    return calls


def watched(subject: DecoderSubject, chip: Chip, dtype: torch.dtype) -> list[OperatorCheck]:
    """Every operator call of a training step and of a step of decoding, judged. Raises NotKnown."""
    checks: list[OperatorCheck] = []

    def take(call: Call) -> None:
        judged = check(call)
        if judged is not None:
            checks.append(judged)

    model = subject.place(subject.build(), chip.device, dtype)
    optimizer = make_optimizer(model, fused=chip.capabilities.fused_optimizer)
    batch = on_device(subject.batch(0), chip.device)
    with Watch(model, chip.device, take) as watch:
        subject.loss(model, batch).backward()
        with watch.direction("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
            optimizer.step()
            subject.after_update(model)
        with watch.direction("decode"), torch.no_grad():
            subject.decode(model, batch)
    return checks
