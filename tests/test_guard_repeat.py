"""A repeated layer gives the same bits, and products agree with their operands; what breaks either is seen."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from guarded import changed_output, trainer

from beringia.train.guard.capture import SiteCapture, weights_of
from beringia.train.guard.checks.repeat import Again
from beringia.train.guard.finding import Finding
from beringia.train.guard.products import Product, ProductLog, judge_product
from beringia.train.trainer import Trainer

SITES = ("layers.0", "layers.1", "layers.3")  # dense, experts, multi-token


def findings(made: Trainer, site: str, *, sharded: bool = False, draw: int = 0) -> list[Finding]:
    """What a repeat of a layer finds in the pass of the next step, which is not taken."""
    capture = SiteCapture(made.decoder, site)
    made._accumulate_gradients()
    capture.close()
    weights = weights_of(made.decoder, site)
    found = Again(made.decoder, sharded=sharded, alone=True).judge(capture, weights, draw)
    made.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest) -> Trainer:
    return trainer(dtype=request.param, share=None)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_sound_layer_repeats_every_bit_of_the_step(made: Trainer, site: str, sharded: bool) -> None:
    found = findings(made, site, sharded=sharded)
    repeated = [finding.tensor for finding in found if finding.detector == "repeat"]
    assert {"output", "input.gradient", "self_attn.o_proj.weight.gradient"} <= set(repeated)
    assert not [finding for finding in found if finding.alarming]


def test_a_repeat_counts_no_tokens_and_changes_no_gradient(made: Trainer) -> None:
    counts = [count.clone() for count in made.decoder.expert_counts().values()]
    made._accumulate_gradients()
    once = [count - before for count, before in zip(made.decoder.expert_counts().values(), counts, strict=True)]
    capture = SiteCapture(made.decoder, "layers.1")
    made._accumulate_gradients()
    capture.close()
    gradients = {name: p.grad.clone() for name, p in made.decoder.named_parameters() if p.grad is not None}
    Again(made.decoder, sharded=False, alone=False).judge(capture, {}, 0)
    twice = [count - before for count, before in zip(made.decoder.expert_counts().values(), counts, strict=True)]
    assert all(torch.equal(2 * one, two) for one, two in zip(once, twice, strict=True))
    assert all(torch.equal(p.grad, gradients[n]) for n, p in made.decoder.named_parameters() if p.grad is not None)
    made.optimizer.zero_grad(set_to_none=True)


def test_a_layer_that_gives_other_bits_each_time_is_seen(made: Trainer) -> None:
    noise = torch.Generator().manual_seed(0)

    def shake(output: torch.Tensor) -> torch.Tensor:
        return output + 1e-2 * output.detach() * torch.rand(output.shape, generator=noise).to(output.dtype)

    with changed_output(made.decoder.layers[0].self_attn, shake):
        alarming = [finding for finding in findings(made, "layers.0") if finding.alarming]
    assert alarming[0].tensor == "output"


def test_a_gradient_whose_memory_changed_after_the_backward_pass_is_seen(made: Trainer) -> None:
    capture = SiteCapture(made.decoder, "layers.0")
    made._accumulate_gradients()
    capture.close()
    gradient = made.decoder.layers[0].mlp.down_proj.weight.grad
    gradient.view(torch.int32)[3, 5] ^= 1
    found = Again(made.decoder, sharded=False, alone=True).judge(capture, {}, 0)
    made.optimizer.zero_grad(set_to_none=True)
    assert [(f.tensor, f.value) for f in found if f.alarming] == [("mlp.down_proj.weight.gradient", 1.0)]


# ---- products


def product(dtype: torch.dtype, rows: int = 256, terms: int = 128, columns: int = 64) -> Product:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(rows, terms, generator=generator).to(dtype)
    right = torch.randn(terms, columns, generator=generator).to(dtype)
    return Product("product 0", left, right, None, left @ right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_product_uses_a_small_part_of_its_bound(dtype: torch.dtype) -> None:
    used = [judge_product("here", product(dtype), seed).used for seed in range(10)]
    assert max(used) < 0.5 and min(used) > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(0, 0), (15, 3), (7, 1)])
def test_a_stuck_tile_is_seen_wherever_it_lies(dtype: torch.dtype, tile: tuple[int, int]) -> None:
    stuck = product(dtype)
    row, column = tile
    stuck.result[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 0.0
    assert all(judge_product("here", stuck, seed).alarming for seed in range(10))


def test_a_product_of_operands_that_cancel_is_not_held_to_what_no_sum_can_keep() -> None:
    """Columns that sum to nothing: the result is all rounding error of partial sums."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(64, 512, generator=generator)
    left = torch.cat((half, -half), dim=1)
    right = torch.randn(512, 32, generator=generator).repeat(2, 1)
    assert not judge_product("here", Product("product", left, right, None, left @ right), 0).alarming


def test_products_of_a_single_term_are_sound_whatever_the_signs() -> None:
    """An expert that one token reaches has such gradients; what the projection itself rounds, all rows share there."""
    generator = torch.Generator().manual_seed(0)
    used = []
    for seed in range(500):
        left, right = torch.randn(32, 1, generator=generator), torch.randn(1, 32, generator=generator)
        used.append(judge_product("here", Product("product", left, right, None, left @ right), seed).used)
    assert max(used) < 0.5


def test_the_log_notes_products_of_both_passes_and_batches() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 6, requires_grad=True)
    with ProductLog() as log:
        (torch.bmm((x @ weight).unsqueeze(0), torch.randn(1, 6, 2)).sum()).backward()
    assert len(log.products) == 5  # forward, two gradients; batched forward and one gradient
    assert not [p for p in log.products if judge_product("here", p, 0).alarming]


def test_nondeterministic_reductions_of_a_chip_are_seen(tmp_path: Path) -> None:
    script = tmp_path / "order.toml"
    script.write_text('summary = "x"\n[[faults]]\nkind = "nondeterministic-reduction"\nfrom_step = 0\n')
    made = trainer("emulated:h800", faults=str(script), share=None)
    with closing(made.chip):
        found = [finding for finding in findings(made, "layers.0") if finding.alarming]
    assert found and found[0].detector == "repeat"


def test_a_tile_stuck_in_every_product_of_a_chip_is_seen_outside_the_sample(tmp_path: Path) -> None:
    script = tmp_path / "tile.toml"
    script.write_text('summary = "x"\n[[faults]]\nkind = "stuck-tile"\nfrom_step = 0\nrow = 5\ncolumn = 1\n')
    made = trainer("emulated:h800", faults=str(script), share=None)
    with closing(made.chip):
        found = [finding for finding in findings(made, "layers.0") if finding.alarming]
    assert found and {finding.detector for finding in found} == {"products"}
