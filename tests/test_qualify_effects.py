"""Sketches, traces, the noise floor, and the tests of equivalence: what a chip makes of a whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from small_models import SmallSubject, opened

from beringia.numerics.metrics import UNIT_ROUNDOFF, few
from beringia.qualify.effects import (
    EFFECT_ALLOWED,
    LOSS_MARGIN,
    RoundingNoise,
    _interval,
    cell_of,
    distances,
    judge_trace,
    layer_of,
    minus,
    numbers_of,
    power_of,
)
from beringia.qualify.rounding_draw import DOCUMENTED_ULPS, RoundingDraw
from beringia.qualify.sketches import WIDTH, sketch, sketches_of
from beringia.qualify.subject import DecoderSubject
from beringia.qualify.trace import ChosenRoutes, Trace, TraceExtent, Tracer
from beringia.records.certificate import POWER_NEEDED, ProbeResult

BF16 = torch.bfloat16
DRAWS = 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- sketches


@given(st.integers(1, WIDTH), st.text(max_size=5))
def test_a_small_tensor_is_its_own_sketch(count: int, name: str) -> None:
    x = random(count)
    assert torch.equal(sketch(name, x), x)
    assert torch.equal(sketch(name, x.view(-1, 1).float()), x.float().double())


def test_the_norm_of_the_sketch_of_a_difference_is_that_of_the_difference() -> None:
    """Within 20 %: four and a half standard deviations of sqrt(2 / WIDTH)."""
    for seed in range(60):
        x, y = random(70, 73, seed=seed), random(70, 73, seed=1000 + seed)
        close = x + 1e-3 * y
        name = f"tensor {seed}"
        found = (sketch(name, close) - sketch(name, x)).norm() / (close - x).norm()
        assert 0.8 < found < 1.2


def test_one_changed_element_shows_with_its_whole_size() -> None:
    x = random(5000)
    changed = x.clone()
    changed[1234] += 0.5
    assert (sketch("x", changed) - sketch("x", x)).abs().max() == pytest.approx(0.5)


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 3000))
def test_sketches_are_linear(a: float, b: float, count: int) -> None:
    x, y = random(count), random(count, seed=1)
    together = sketch("x", a * x + b * y)
    assert torch.allclose(together, a * sketch("x", x) + b * sketch("x", y), rtol=0, atol=1e-11 * (1 + abs(a) + abs(b)))


def test_tensors_of_other_names_have_other_signs() -> None:
    x = torch.ones(3000)
    assert torch.equal(sketch("a", x), sketch("a", x)) and not torch.equal(sketch("a", x), sketch("b", x))


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2.0**-24), (BF16, 2.0**-8)])
def test_weights_of_a_draw_move_by_up_to_a_unit_in_the_last_place(dtype: torch.dtype, roundoff: float) -> None:
    weight = random(4000).float() + 3
    moved = RoundingDraw(1, dtype)("w", weight)
    relative = ((moved.double() - weight.double()) / weight.double()).abs()
    assert relative.max() <= 2 * roundoff * 1.5 and relative.max() > 1.8 * roundoff
    assert torch.equal(moved, RoundingDraw(1, dtype)("w", weight))
    assert not torch.equal(moved, RoundingDraw(2, dtype)("w", weight))
    assert not torch.equal(moved, RoundingDraw(1, dtype)("v", weight))


@pytest.mark.parametrize(
    ("dtype", "times"), [(BF16, 1.0), (torch.float32, math.hypot(1.0, math.sqrt(24 / 6) / 1.1547))]
)
def test_a_matrix_moves_by_as_much_more_as_adding_its_rows_up_costs_in_float32(
    dtype: torch.dtype, times: float
) -> None:
    weight = random(24000).double().reshape(1000, 24)
    relative = (RoundingDraw(1, dtype)("w", weight) - weight) / weight
    # Evenly spread between plus and minus the largest.
    assert float(relative.square().mean().sqrt()) * math.sqrt(3) == pytest.approx(
        2 * UNIT_ROUNDOFF[dtype] * times, rel=0.02
    )


# ---- traces

SUBJECT = SmallSubject("llama")
PLAN = TraceExtent(batches=3, steps=2)


def traced(chip_name: str, routes: ChosenRoutes, fault: str = "", directory: Path | None = None) -> Trace:
    with opened(chip_name, fault, directory) as chip:
        return Tracer(SUBJECT, PLAN).on_chip(chip, BF16, routes, begin_step=lambda: chip.begin_step(1))


@pytest.fixture(scope="module")
def exact() -> tuple[Trace, ChosenRoutes]:
    return Tracer(SUBJECT, PLAN).in_float64()


def noise_of(subject: DecoderSubject, plan: TraceExtent, exact: tuple[Trace, ChosenRoutes]) -> RoundingNoise:
    """Of the CPU in bfloat16, and its draws."""
    tracer = Tracer(subject, plan)
    with opened("cpu") as chip:

        def made(change: object) -> Trace:
            return tracer.on_chip(chip, BF16, exact[1], begin_step=lambda: None, change=change)  # type: ignore[arg-type]

        return RoundingNoise.of(exact[0], made(None), [made(RoundingDraw(seed, BF16)) for seed in range(DRAWS)])


@pytest.fixture(scope="module")
def noise(exact: tuple[Trace, ChosenRoutes]) -> RoundingNoise:
    return noise_of(SUBJECT, PLAN, exact)


@pytest.mark.parametrize("chip", ["cpu", "emulated:h800"])
def test_the_same_chip_gives_the_same_trace_in_every_bit(chip: str, exact: tuple[Trace, ChosenRoutes]) -> None:
    first, second = (traced(chip, exact[1]) for _ in range(2))
    assert first.sketches.keys() == second.sketches.keys()
    assert all(torch.equal(first.sketches[name], second.sketches[name]) for name in first.sketches)
    assert torch.equal(first.losses_K, second.losses_K) and torch.equal(first.losses_N, second.losses_N)


def test_a_trace_holds_what_torch_itself_gives_in_float64(exact: tuple[Trace, ChosenRoutes]) -> None:
    trace, _ = exact
    model = SUBJECT.place(SUBJECT.build(), torch.device("cpu"), torch.float64)
    batch = SUBJECT.batch(1)
    loss = SUBJECT.loss(model, batch)
    loss.backward()
    assert trace.losses_K[1] == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(trace.sketches[f"gradient/1/{name}"], sketch(name, parameter.grad), rtol=1e-9, atol=1e-13)
    outputs = SUBJECT.outputs(model, batch).detach()
    assert torch.allclose(trace.sketches["outputs/1"], sketch("outputs", outputs), rtol=1e-9, atol=1e-12)
    assert len(trace.losses_N) == PLAN.steps and trace.losses_N[0] == pytest.approx(float(trace.losses_K[0]), rel=1e-12)


def test_gradients_are_judged_by_parameter_and_updates_by_layer() -> None:
    assert cell_of("gradient/2/model.layers.0.mlp.up.weight") == ("gradient", "model.layers.0.mlp.up.weight", "2")
    assert cell_of("update/model.layers.0.mlp.up.weight") == ("update", "model.layers.0", "")
    assert cell_of("outputs/3") == ("outputs", "", "3") and cell_of("decode") == ("decode", "", "")
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"


def failed(results: Sequence[ProbeResult]) -> set[str]:
    return {result.subject for result in results if result.outcome == "failed"}


def effects(results: Sequence[ProbeResult]) -> dict[str, float]:
    return {
        result.subject: float(measure.value if measure.value is not None else math.inf)
        for result in results
        for measure in result.measures
        if measure.name == "effect"
    }


def test_a_sound_chip_is_no_farther_from_float64_than_the_draws(
    noise: RoundingNoise, exact: tuple[Trace, ChosenRoutes]
) -> None:
    found = effects(judge_trace(noise, traced("emulated:h800", exact[1])))
    assert max(found.values()) < EFFECT_ALLOWED and len(found) > 20


def test_a_wrong_backward_fails_only_in_gradients_that_it_can_reach(
    noise: RoundingNoise, exact: tuple[Trace, ChosenRoutes], tmp_path: Path
) -> None:
    """Attention of the second layer: its projections, and everything before it; not what comes after."""
    fault = 'kind = "wrong-backward"\nlength = 4\nstrength = 0.8\nsites = [1]'
    found = failed(judge_trace(noise, traced("emulated:h800", exact[1], fault, tmp_path)))
    gradients = {subject.removeprefix("gradient ") for subject in found if subject.startswith("gradient ")}
    reached = ("model.embed_tokens", "model.layers.0.", "model.layers.1.input_layernorm")
    projections = tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    assert set(projections) <= gradients
    assert all(name.startswith((*reached, *projections)) for name in gradients), gradients
    assert not found & {"outputs", "decode", "loss"}


def test_a_wrong_forward_fails_in_the_outputs_and_rules_inference_out(
    noise: RoundingNoise, exact: tuple[Trace, ChosenRoutes], tmp_path: Path
) -> None:
    fault = 'kind = "mask-ignored"\nlength = 8'
    results = judge_trace(noise, traced("emulated:h800", exact[1], fault, tmp_path))
    assert failed(results) >= {"outputs", "decode"}
    assert {r.rules_out for r in results if r.subject in ("outputs", "decode", "loss")} == {"infer"}
    assert {r.rules_out for r in results if r.subject.startswith(("gradient", "update"))} == {"train"}


def test_a_wrong_optimizer_fails_in_updates_and_in_no_gradient(
    noise: RoundingNoise, exact: tuple[Trace, ChosenRoutes], tmp_path: Path
) -> None:
    fault = 'kind = "wrong-optimizer"\nerror = "scaled"\nstrength = 0.5'
    found = failed(judge_trace(noise, traced("emulated:h800", exact[1], fault, tmp_path)))
    assert found and all(subject.startswith(("update", "losses of training")) for subject in found)


def test_what_is_not_finite_or_missing_fails_and_is_written_as_null(noise: RoundingNoise) -> None:
    sketches = dict(noise.exact.sketches)
    sketches["outputs/1"] = sketches["outputs/1"] * float("nan")
    del sketches["decode"]
    trace = Trace(sketches, noise.exact.losses_K, noise.exact.losses_N)
    results = {result.subject: result for result in judge_trace(noise, trace)}
    for subject in ("outputs", "decode"):
        assert results[subject].outcome == "failed" and results[subject].measures[0].value is None
    assert failed(list(results.values())) == {"outputs", "decode"}
    far = distances(trace, noise.exact)
    assert {cell for cell, distance in far.items() if math.isinf(distance)} == {
        ("outputs", "", "1"),
        ("decode", "", ""),
    }
    nan = Trace(noise.exact.sketches, noise.exact.losses_K * float("nan"), noise.exact.losses_N * float("nan"))
    assert failed(judge_trace(noise, nan)) == {"loss", "losses of training"}


def test_float64_itself_has_no_effect(noise: RoundingNoise) -> None:
    results = judge_trace(noise, noise.exact)
    assert not failed(results) and set(effects(results).values()) == {0.0}


@pytest.mark.slow
def test_sound_chips_have_effects_below_one_for_r2_nano() -> None:
    subject, plan = DecoderSubject("r2-nano"), TraceExtent()
    exact = Tracer(subject, plan).in_float64()
    noise = noise_of(subject, plan, exact)
    for name in ("emulated:h800", "emulated:mi300x"):
        with opened(name) as chip:
            trace = Tracer(subject, plan).on_chip(chip, BF16, exact[1], begin_step=lambda: None)
        results = judge_trace(noise, trace)
        assert {result.outcome for result in results} == {"passed"}
        assert max(effects(results).values()) < 1.0


# ---- equivalence


@given(st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 6)), min_size=2, max_size=12, unique=True))
def test_the_interval_is_students_90_per_cent_one(values: list[float]) -> None:
    low, high = _interval(values)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.90)
    scale = max(map(abs, values))
    assert low == pytest.approx(theirs.low, rel=1e-9, abs=1e-9 * scale)
    assert high == pytest.approx(theirs.high, rel=1e-9, abs=1e-9 * scale)


def test_one_difference_leaves_everything_open() -> None:
    assert _interval([0.0]) == (-math.inf, math.inf)


def loss_of(differences: list[float], spread: float = 1e-3) -> ProbeResult:
    """How the loss is judged at these differences from float64, where the draws' are `spread` either way."""
    count = len(differences)
    base = torch.full((count,), 2.0, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * count)[:count].double()
    exact = Trace({}, base, base[:1])
    noise = RoundingNoise(exact, {}, ({},), spread * torch.stack([signs, -signs]), torch.full((2, 1), spread).double())
    found = Trace({}, base + torch.tensor(differences).double(), base[:1])
    (result,) = (result for result in judge_trace(noise, found) if result.subject == "loss")
    return result


MARGIN = LOSS_MARGIN * 1e-3


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.0] * 6, "passed"),
        ([1e-3, -1e-3, 5e-4, -5e-4, 1e-4, -1e-4], "passed"),
        ([1.9e-3] * 6, "passed"),  # different for certain, by less than matters
        ([2.1e-3] * 6, "failed"),
        ([-0.1, -0.11, -0.1, -0.09, -0.1, -0.1], "failed"),
        ([1e-2, -1e-2, 2e-2, -2e-2, 1e-2, -1e-2], "inconclusive"),  # noisy: not shown equal, and not different
        ([1e-3, 3e-3, 2e-3, 2e-3, 1e-3, 3e-3], "inconclusive"),
        ([1e-4], "inconclusive"),  # one batch proves nothing
        ([float("nan")], "failed"),
        ([float("inf"), 0.0, 0.0, 0.0], "failed"),
    ],
)
def test_the_loss_is_equivalent_different_or_open(differences: list[float], outcome: str) -> None:
    assert loss_of(differences).outcome == outcome


@given(st.lists(st.floats(-5e-3, 5e-3), min_size=2, max_size=8))
def test_the_loss_passes_where_students_interval_lies_within_the_margin(differences: list[float]) -> None:
    low, high = _interval(differences)
    assume(all(abs(abs(end) - MARGIN) > 1e-9 for end in (low, high)))
    inside, outside = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    assert loss_of(differences).outcome == ("passed" if inside else "failed" if outside else "inconclusive")


def test_power_grows_with_batches_and_one_batch_proves_nothing() -> None:
    powers = [power_of(batches) for batches in range(1, 30)]
    assert powers[0] == 0.0 and powers == sorted(powers) and powers[-1] > 0.999
    assert power_of(TraceExtent().batches) > POWER_NEEDED, "the default is enough"


@pytest.mark.parametrize("batches", [4, 6, 10])
def test_power_is_how_often_an_equal_chip_passes(batches: int) -> None:
    """Simulated: differences of a chip like the draws, in units of their standard deviation."""
    draws = random(20000, batches, seed=batches)
    half = stats.t.ppf(0.95, batches - 1) * draws.std(1) / math.sqrt(batches)
    passed = (draws.mean(1).abs() + half < LOSS_MARGIN).double().mean()
    assert power_of(batches) == pytest.approx(float(passed), abs=0.08)


# ---- infinities and NaN


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("size", [30, 3 * WIDTH])
def test_the_same_infinities_are_no_distance_and_others_are_infinitely_far(value: float, size: int) -> None:
    """As a model's outputs have them that masks a part of its vocabulary."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    x[[3, 7]] = value
    near = x * (1 + 1e-6)

    def trace(outputs: torch.Tensor) -> Trace:
        return Trace(sketches_of("outputs/0", "outputs", outputs), torch.ones(1), torch.ones(1))

    far = distances(trace(near), trace(x))["outputs", "", "0"]
    assert 0 < far < 1e-4
    assert distances(trace(x), trace(x))["outputs", "", "0"] == 0
    for other in (1.0, math.inf if value != math.inf else -math.inf, math.nan if value == value else 0.0):
        changed = x.clone()
        changed[7] = other
        for one, two in ((x, changed), (changed, x)):
            assert distances(trace(one), trace(two))["outputs", "", "0"] == math.inf
        changed[3] = other
        assert distances(trace(x), trace(changed))["outputs", "", "0"] == math.inf
        assert distances(trace(changed), trace(x))["outputs", "", "0"] == math.inf


EXTREMES = st.sampled_from([math.inf, -math.inf, math.nan, 1e308, -1e308, 1.0])


@given(EXTREMES, EXTREMES)
def test_a_difference_is_zero_exactly_where_both_are_the_same(one: float, other: float) -> None:
    found = float(minus(torch.tensor([one], dtype=torch.float64), torch.tensor([other], dtype=torch.float64)))
    assert (found == 0) == (one == other or (one != one and other != other))


# ---- what few numbers, and sums that cancel, are allowed


def difference_of(sketch: torch.Tensor) -> tuple[Trace, Trace]:
    none = torch.zeros(0)
    exact = torch.zeros_like(sketch)
    return Trace({"update/model.norm.weight": sketch}, none, none), Trace(
        {"update/model.norm.weight": exact}, none, none
    )


@given(st.integers(1, 900))
def test_so_many_equal_errors_count_as_so_many_numbers(count: int) -> None:
    errors = torch.zeros(900, dtype=torch.float64)
    errors[:count] = 3e-5
    (found,) = numbers_of(*difference_of(errors)).values()
    assert found == pytest.approx(count)


def test_one_error_beside_many_small_ones_counts_as_one() -> None:
    errors = 1e-6 * random(900)
    errors[5] = 1.0
    (found,) = numbers_of(*difference_of(errors)).values()
    assert found == pytest.approx(1.0, abs=1e-3)


def test_draws_that_one_number_decides_are_not_outvoted_by_one_that_many_do() -> None:
    single, many = torch.zeros(300, dtype=torch.float64), torch.full((300,), 1e-6, dtype=torch.float64)
    single[7] = 1e-6
    draws = [difference_of(errors)[0] for errors in (single, many, single, single)]
    exact = difference_of(single)[1]
    (found,) = RoundingNoise.of(exact, exact, draws).numbers.values()
    assert found == pytest.approx(4 / (3 + 1 / 300))


@given(st.integers(1, 400), st.integers(0, 2**31))
@settings(max_examples=200)
def test_the_root_mean_square_of_few_numbers_is_within_what_few_allows(count: int, seed: int) -> None:
    assert float(random(count, seed=seed).square().mean().sqrt()) <= few(count)


def test_few_allows_nothing_where_numbers_are_many() -> None:
    assert few(math.inf) == 1.0 and few(1e8) < 1.001 and few(1) > 4.0


def gradient_of(seed: int | None, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of a weight that rows x are multiplied with, in a draw, or as it is."""
    weight = torch.zeros(gradient.shape[1], x.shape[1], requires_grad=True)
    with RoundingDraw(seed, torch.float32).moving_results() if seed is not None else nullcontext():
        (x @ weight.T).backward(gradient)
    assert weight.grad is not None
    return weight.grad


def test_a_gradient_whose_rows_cancel_moves_by_the_size_of_its_terms() -> None:
    """The sum over 256 rows is almost nothing; what adding it up costs is not."""
    rows = random(128, 3, seed=1).float()
    x, gradient = torch.cat((rows, rows)), random(128, 2, seed=2).float()
    both = torch.cat((gradient, -gradient))
    moved = torch.stack([gradient_of(seed, x, both) for seed in range(200)]) - gradient_of(None, x, both)
    terms = (both.double().square().T @ x.double().square()).sqrt()
    wanted = UNIT_ROUNDOFF[torch.float32] * math.sqrt(256 / 6.0) * terms
    found = moved.double().square().mean(0).sqrt()
    torch.testing.assert_close(found, wanted, rtol=0.3, atol=0)


@pytest.mark.parametrize(("dtype", "moves"), [(torch.float32, True), (BF16, False)])
def test_elementary_functions_move_by_what_makers_say_where_results_are_stored_in_float32(
    dtype: torch.dtype, moves: bool
) -> None:
    x = random(5000).to(dtype)
    with RoundingDraw(1, dtype).moving_results():
        found = torch.exp(x)
    relative = ((found.double() - torch.exp(x).double()) / torch.exp(x).double()).abs()
    assert (float(relative.max()) > 0) == moves
    assert float(relative.max()) <= DOCUMENTED_ULPS * 2.0 * UNIT_ROUNDOFF[torch.float32] * 1.3
    with RoundingDraw(1, dtype).moving_results():
        assert torch.equal(x * 3 - 1, x * 3 - 1), "arithmetic stays"
