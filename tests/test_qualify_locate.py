"""What a planted fault leaves behind names the fault: real faults of an emulated chip in a real training step."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest
import torch
from small_models import SmallSubject, calls_of, opened, watched
from torch import nn

from beringia.chips.chip import Chip
from beringia.chips.emulated.fault_script import Fault
from beringia.qualify.evidence import Unrepeatable
from beringia.qualify.locate import first_wrong, locate
from beringia.qualify.operators.check import check, refused, worse_than_reference
from beringia.qualify.operators.watch import Place, Watch
from beringia.qualify.probing import Evidence
from beringia.qualify.qualification import located_in
from beringia.qualify.recording import AT_REST, Recorder
from beringia.qualify.trace import TraceExtent, Tracer
from beringia.records.certificate import Located, Measure, OperatorCheck

SUBJECT = SmallSubject("llama")
MASK = "a mask or a length that is not respected"
COMES_AND_GOES = "results that differ from run to run: an order of additions, or a fault that comes and goes"
RACE = "wrong results that differ from run to run: additions lost in a race"
FAULTS = {
    'kind = "bit-flip"\ntarget = "activations"\nsites = [0]\nbits = [28, 29]': ("flipped bits", "mm", "forward"),
    'kind = "bit-flip"\ntarget = "gradients"\nsites = [3]\nbits = [27, 27]': ("flipped bits", "mm", "backward"),
    'kind = "bit-flip"\ntarget = "activations"\nsites = [1]\nbits = [21, 21]': ("flipped bits", "mm", "forward"),
    'kind = "stuck-tile"\nsize = 16\nsites = [4]': ("a stuck tile of the matrix unit", "mm", "forward"),
    'kind = "stuck-tile"\nsize = 16\nrow = 1\nvalue = 0.5\nsites = [2]': (
        "a stuck tile of the matrix unit",
        "mm",
        "forward",
    ),
    'kind = "mask-ignored"\nlength = 8': (MASK, "attention", "forward"),
    'kind = "wrong-backward"\nlength = 8\nstrength = 0.8': (MASK, "attention", "backward"),
    'kind = "wrong-function"\noperator = "silu"\nstrength = 0.03': (
        "a wrong factor in every element",
        "silu",
        "forward",
    ),
    'kind = "garbage-index"\nbeyond = 20': ("numbers in wrong places", "embedding", "forward"),
    'kind = "short-accumulator"\nbits = 7': ("a short accumulator", "mm", "forward"),
}


@cache
def first_of(fault: str, subject: SmallSubject = SUBJECT) -> OperatorCheck:
    """The first wrong call of a training step in bfloat16."""
    with TemporaryDirectory() as directory, opened("emulated:h800", fault, Path(directory)) as chip:
        found = first_wrong(watched(subject, chip, torch.bfloat16))
    assert found is not None
    return found


def fits(found: Located, phrase: str) -> bool:
    return any(known.startswith(phrase) for known in found.consistent_with)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_the_first_wrong_operator_and_fits_its_description(fault: str) -> None:
    phrase, operator, direction = FAULTS[fault]
    found = first_of(fault)
    assert operator in found.operator and found.direction == direction
    assert fits(locate(found), phrase), (locate(found).consistent_with, found)


def test_the_place_of_a_stuck_tile_and_of_an_ignored_mask_is_named() -> None:
    tile = first_of('kind = "stuck-tile"\nsize = 16\nrow = 1\nvalue = 0.5\nsites = [2]')
    assert (tile.wrong_from, tile.wrong_to, tile.found) == ((16, 0), (31, 15), 0.5)
    mask = first_of('kind = "mask-ignored"\nlength = 8')
    assert mask.wrong_from[-2] == 8 and mask.module == "model.layers.0.self_attn"


def test_a_factor_is_measured() -> None:
    fault = 'kind = "wrong-function"\noperator = "silu"\nstrength = 0.03'
    found = first_of(fault)
    assert found.factor == pytest.approx(1.03, abs=2e-3) and found.wrong_share > 0.9


def test_long_sums_in_a_short_accumulator_shrink_and_are_called_that(tmp_path: Path) -> None:
    with opened("emulated:h800", 'kind = "short-accumulator"\nbits = 7', tmp_path) as chip:
        generator = torch.Generator().manual_seed(0)
        shapes = ((64, 2048), (2048, 48))
        a, b = (torch.randn(shape, generator=generator).bfloat16().to(chip.device) for shape in shapes)
        (call,) = calls_of(lambda: a @ b, device=chip.device.type)
    found = check(call)
    assert found is not None and found.wrong_share > 0.5 and found.factor is not None and found.factor < 0.99
    assert fits(locate(found), "a short accumulator")
    larger = found.model_copy(update={"factor": 2.0 - found.factor})
    assert not fits(locate(larger), "a short accumulator"), "cutting makes no number larger"


def test_a_cast_that_truncates_is_called_that() -> None:
    """Told from rounding by the mean of the errors, which takes some hundred rows."""
    fault = 'kind = "wrong-cast"\nrounding = "truncate"\ndirection = "forward"\nsites = [4]'
    found = first_of(fault, SmallSubject("llama", samples=4, tokens=64))
    assert found.operator == "aten._to_copy.default" and found.wrong_share == 0.0
    assert fits(locate(found), "results truncated instead of rounded"), found


def test_a_product_that_saturates_hides_infinity(tmp_path: Path) -> None:
    fault = 'kind = "saturate"\nlimit = 65504.0'
    with opened("emulated:v100", fault, tmp_path) as chip:
        a = torch.full((20, 16), 200.0, dtype=torch.float16).to(chip.device)
        (call,) = calls_of(lambda: a @ a.mT, device=chip.device.type)
    found = check(call)
    assert found is not None and found.used > 1.0
    located = locate(found)
    assert fits(located, "saturation") and not fits(located, "an overflow inside")
    assert any("saturating overflow mode" in remedy for remedy in located.mitigations)


def test_small_numbers_that_are_flushed_are_called_that(tmp_path: Path) -> None:
    with opened("emulated:v100", 'kind = "flush"\nthreshold = 6.1e-5', tmp_path) as chip:
        a = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).mul(2e-4).half().to(chip.device)
        b = torch.eye(16).mul(0.1).half().to(chip.device)
        (call,) = calls_of(lambda: a @ b, device=chip.device.type)
    found = check(call)
    assert found is not None and fits(locate(found), "subnormal numbers flushed to zero")


def test_infinity_where_float64_has_a_number_is_an_overflow_inside() -> None:
    a = torch.full((4, 4), 2.0)
    (call,) = calls_of(lambda: a @ a)
    call.results[0][1, 2] = float("inf")
    found = check(call)
    assert found is not None
    located = locate(found)
    assert fits(located, "an overflow inside") and not fits(located, "saturation"), found


def test_an_operator_that_is_missing_is_called_that() -> None:
    with opened("emulated:h800") as chip:
        model = nn.Conv1d(4, 4, 1).to(chip.device)
        watch = Watch(model, chip.device, lambda call: None)
        with pytest.raises(NotImplementedError), watch:
            model(torch.ones(1, 4, 6).to(chip.device))
    assert watch.refused is not None
    assert locate(refused(watch.refused)).consistent_with == ("an operator that the chip does not have",)


def test_weights_that_change_between_two_steps_are_memory_that_does_not_keep(tmp_path: Path) -> None:
    fault = 'kind = "bit-flip"\ntarget = "weights"\nsites = [2]\nbits = [20, 24]\nfrom_step = 2'
    subject = SUBJECT
    with opened("emulated:exact", fault, tmp_path) as chip:
        found = first_wrong(recorded(subject, chip))
    assert found is not None and found.operator == AT_REST
    assert found.module == list(dict(subject.build().named_parameters()))[2]
    assert found.found != found.expected and found.measures[0].value == 1.0
    assert fits(locate(found), "memory that does not keep what was written")


def recorded(subject: SmallSubject, chip: Chip) -> list[OperatorCheck]:
    tracer = Tracer(subject, TraceExtent(1, 1))
    _, routes = tracer.in_float64()
    return Recorder(subject, chip, torch.float32).record(tracer, routes).checks


def test_sound_memory_is_not_called_wrong() -> None:
    with opened("emulated:exact") as chip:
        assert first_wrong(recorded(SUBJECT, chip)) is None


def test_a_stuck_tile_is_said_before_a_race_and_bits_that_flip_instead_of_one() -> None:
    tile = locate(first_of('kind = "stuck-tile"\nsize = 16\nsites = [4]'), repeatable=False)
    assert [known.split(":")[0] for known in tile.consistent_with] == [
        "a stuck tile of the matrix unit",
        "wrong results that differ from run to run",
    ]
    assert tile.mitigations == ("replace the device", "switch deterministic algorithms on")
    flips = locate(
        first_of('kind = "bit-flip"\ntarget = "activations"\nsites = [0]\nbits = [28, 29]'), repeatable=False
    )
    assert flips.consistent_with == ("flipped bits",)
    assert flips.mitigations == ("replace the device, or run it with error correction on",)


def test_a_call_that_was_sound_and_does_not_repeat_itself_is_an_order_of_additions_or_comes_and_goes() -> None:
    with opened("emulated:h800") as chip:
        sound = watched(SUBJECT, chip, torch.bfloat16)[0]
    located = locate(sound, repeatable=False)
    assert located.consistent_with == (COMES_AND_GOES,)
    assert located.mitigations == (
        "switch deterministic algorithms on; if results still differ then, replace the device",
    )


NAMES = {
    "wrong-backward": (MASK,),
    "mask-ignored": (MASK,),
    "bit-flip": ("flipped bits", "memory that does not keep what was written"),
    "stuck-tile": ("a stuck tile of the matrix unit",),
    "nan-to-zero": ("saturation",),
    "nondeterministic-reduction": ("results that differ from run to run",),
    "wrong-cast": ("results truncated instead of rounded", "a wrong factor in every element"),
    "short-accumulator": ("a short accumulator",),
    "saturate": ("saturation",),
    "flush": ("subnormal numbers flushed to zero",),
    "wrong-function": ("a wrong factor in every element",),
    "wrong-layout": ("numbers in wrong places",),
    "garbage-index": ("numbers in wrong places",),
    "lost-additions": ("wrong results that differ from run to run",),
    "wrong-optimizer": ("an update that is not the optimizer's",),
}
"""What names a kind of fault that makes wrong numbers."""
WITHOUT_WRONG_CALLS = {
    "wrong-collective",  # has probes of its own
    "exception",
    "collective-timeout",
    "hang",
    "out-of-memory",
    "slowness",
}


def test_every_kind_of_fault_has_its_names() -> None:
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Fault)[0])}
    assert kinds == NAMES.keys() | WITHOUT_WRONG_CALLS


def named_rightly(fault: str, located: Located) -> bool:
    """The first hypothesis names the kind of the fault, or none fits."""
    planted = tomllib.loads(fault)
    names = NAMES[planted["kind"]] + ((COMES_AND_GOES,) if "rate" in planted else ())
    return not located.consistent_with or located.consistent_with[0].startswith(names)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_hypothesis_names_the_planted_kind_whether_or_not_a_pass_repeats(fault: str) -> None:
    found = first_of(fault)
    for repeatable in (True, False):
        located = locate(found, repeatable=repeatable)
        if repeatable or located.consistent_with[0] != RACE:
            assert named_rightly(fault, located), located.consistent_with


MORE_FAULTS = (
    'kind = "bit-flip"\ntarget = "activations"\nsites = [1, 3, 5, 7]\nbits = [23, 29]\nflips = 4',
    'kind = "bit-flip"\ntarget = "activations"\nsites = [1]\nbits = [25, 30]\nrate = 0.5',
    'kind = "bit-flip"\ntarget = "activations"\nsites = [1]\nbits = [20, 30]\nwidth = 3',
    'kind = "bit-flip"\ntarget = "optimizer-state"\nsites = [2]\nbits = [20, 24]',
    'kind = "stuck-tile"\nsize = 4\nrow = 1\ncolumn = 1\nsites = [2]',
    'kind = "stuck-tile"\nsize = 16\nrate = 0.5\nvalue = 0.5',
    'kind = "stuck-tile"\nsize = 16\ndirection = "backward"\nvalue = 0.25',
    'kind = "mask-ignored"',
    'kind = "wrong-backward"\noperator = "linear"\nlength = 8\nstrength = 0.8',
    'kind = "nan-to-zero"',
    'kind = "nondeterministic-reduction"',
    'kind = "wrong-cast"',
    'kind = "wrong-cast"\nrounding = "floor"',
    'kind = "wrong-cast"\nrounding = "scaled"\nstrength = 0.03',
    'kind = "short-accumulator"\nbits = 3\nterms = 8',
    'kind = "short-accumulator"\nbits = 6\nattention = true',
    'kind = "saturate"\nlimit = 1.0',
    'kind = "saturate"\nlimit = 3.0',
    'kind = "flush"\nthreshold = 0.01',
    'kind = "wrong-function"\noperator = "silu"\nstrength = 0.5\nbeyond = 0.5',
    'kind = "wrong-function"\noperator = "products"\nstrength = 0.05\nbeyond = 2.0',
    'kind = "wrong-function"\noperator = "attention"\nstrength = 0.05',
    'kind = "wrong-layout"\nstrength = 0.5',
    'kind = "lost-additions"\nstrength = 0.05',
    'kind = "lost-additions"\noperator = "embedding"\nstrength = 0.3',
    *(
        f'kind = "wrong-optimizer"\nerror = "{error}"\nstrength = 0.5'
        for error in ("stale-moment", "no-bias-correction", "weight-decay-twice", "lost-update", "scaled")
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", (*FAULTS, *MORE_FAULTS))
def test_the_first_hypothesis_of_a_whole_recording_names_the_planted_kind(
    fault: str, seed: int, tmp_path: Path
) -> None:
    subject = SmallSubject("llama", seed=seed)
    tracer = Tracer(subject, TraceExtent(1, 1))
    _, routes = tracer.in_float64()
    with opened("emulated:h800", fault, tmp_path) as chip:
        recording = Recorder(subject, chip, torch.bfloat16).record(tracer, routes)
    evidence = Evidence(checks=recording.checks)
    if recording.unrepeatable:
        place = recording.first_unrepeatable or Place("", "", "forward", 0, 0)
        evidence.take(
            Unrepeatable(**{name: getattr(place, name) for name in Unrepeatable.model_fields if name != "kind"})
        )
    located = located_in(evidence)
    assert located is None or named_rightly(fault, located), (located.consistent_with, located.check)


def test_a_sound_call_fits_no_fault_and_a_struck_one_does_not_fit_those_of_other_operators() -> None:
    with opened("emulated:h800") as chip:
        checks = watched(SUBJECT, chip, torch.bfloat16)
    assert first_wrong(checks) is None
    assert not any(locate(found).consistent_with for found in checks)
    index = first_of('kind = "garbage-index"\nbeyond = 20')
    assert not fits(locate(index), "a short accumulator") and not fits(locate(index), "a stuck tile")
    flipped = first_of('kind = "bit-flip"\ntarget = "activations"\nsites = [0]\nbits = [28, 29]')
    assert not fits(locate(flipped), "a stuck tile"), "one element is no tile"


def beside(used: float, error: float, own: float | None, module: str) -> OperatorCheck:
    measure = Measure(name="root mean square error", value=used, bound=1.0, reason="")
    return OperatorCheck(
        module=module,
        operator="aten.nll_loss_forward.default",
        direction="forward",
        ordinal=0,
        position=0,
        shapes=(),
        dtype="bfloat16",
        basis="",
        error=error,
        reference_error=own,
        measures=(measure,),
    )


def test_a_call_that_is_no_worse_than_the_reference_s_is_named_only_where_no_other_is_wrong() -> None:
    both_s, own, unknown = beside(10.7, 0.1, 0.1, "both's"), beside(2.0, 0.2, 0.1, "own"), beside(2.0, 0.2, None, "?")
    assert first_wrong([both_s, own]) is own and first_wrong([both_s, unknown]) is unknown
    assert first_wrong([both_s]) is both_s
    assert not worse_than_reference(both_s) and worse_than_reference(own) and worse_than_reference(unknown)
    assert not worse_than_reference(beside(0.9, 0.2, 0.1, "within its bound"))
    one_element = Measure(name="worst element", value=50.0, bound=1.0, reason="")
    struck = beside(0.8, 0.1, 0.1, "one number, where the reference keeps its bound")
    assert worse_than_reference(struck.model_copy(update={"measures": (*struck.measures, one_element)}))
    for name, value in {"not finite on one side": 6.0, "small numbers lost": 2.0, "worst element": 11.0}.items():
        more = Measure(name=name, value=value, bound=1.0, reason="")
        assert worse_than_reference(both_s.model_copy(update={"measures": (*both_s.measures, more)})), name
    milder = Measure(name="worst element", value=9.0, bound=1.0, reason="")
    assert not worse_than_reference(both_s.model_copy(update={"measures": (*both_s.measures, milder)}))
    grave = both_s.model_copy(update={"refused": "no such kernel"})
    assert worse_than_reference(grave) and first_wrong([both_s, grave]) is grave
