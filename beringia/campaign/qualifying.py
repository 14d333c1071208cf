"""The campaign's first stage: every chip is qualified, so that one that must not train costs minutes, not a run.

Writes `certificates/<label>.json` with its page and JUnit report into the run directory, and one event a chip. A chip
that a campaign has qualified already (it was interrupted) is not asked again, unless the recipe asks something else of
it now (another chip under its label, another model, more ranks), or it has another identity (another driver, another
torch). Does nothing where the recipe lets chips train without certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from beringia.data import choose_tokenizer
from beringia.errors import BeringiaError, InputError, RecipeError
from beringia.history.log import read_events
from beringia.qualify.hardware.collective_cases import MOST_RANKS
from beringia.qualify.qualification import Request, describe, qualify, reference_for
from beringia.records.certificate import Certificate
from beringia.records.command_line import command_line
from beringia.records.events import AnyEvent, ChipOpened, Qualified, RunFinished
from beringia.records.files import sha256_of_file
from beringia.records.inputs import look_at_inputs, placed, weights_of
from beringia.records.model_source import configuration_hash, other_vocabulary
from beringia.records.recipe import Recipe
from beringia.records.record import canonical_hash
from beringia.records.run_directory import RunDirectory
from beringia.records.signature import load_or_create_key, public_key_of, read_signed, sign, write_signed
from beringia.report.certificate import write_certificate_page, write_junit
from beringia.supervise.beginning import with_own_model
from beringia.supervise.chip_command import chip_command
from beringia.supervise.run_files import recorded_inputs, taking_run

_LENGTHS_TIMES = 4
"""Attention is tried up to so many times the run's sequences: it will not see longer ones."""


def qualify_chips(
    recipe: Recipe,
    recipe_text: str,
    run: RunDirectory,
    on_event: Callable[[AnyEvent], None] | None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Qualify the chips of `train.prefer` that have no certificate yet."""
    if recipe.qualify.unqualified == "allow":
        return
    if _missing(recipe, run):
        _trusted_key(recipe, run)
    with taking_run(recipe, recipe_text, run, on_event) as taken:
        missing, qualified, next_chip = _missing(taken.recipe, run), _qualified(run), _trains_next(taken.recipe, run)
        for label in taken.recipe.train.prefer:
            tried = qualified.get(label) if label == next_chip else None
            if label in missing or (tried is not None and _is_another_chip(taken.recipe, run, label, tried)):
                say(f"{label}: qualification")
                found = qualify_chip(taken.recipe, run, label, _named(label, say))
                taken.log.append(found, epoch=taken.lock.epoch, chip=label)


def _missing(recipe: Recipe, run: RunDirectory) -> list[str]:
    outdated = _outdated(recipe, run)
    return [
        label for label in recipe.train.prefer if label in outdated or not (run.certificates / f"{label}.json").exists()
    ]


def _outdated(recipe: Recipe, run: RunDirectory) -> set[str]:
    """Chips that a campaign in this directory has qualified for something else than the recipe asks now. Certificates
    that somebody put there are not among them: whether they fit is seen when the chip is opened."""
    asked = {label: event.asked for label, event in _qualified(run).items() if _is_its_own(run, label, event)}
    if not any(asked.values()):
        return set()
    # The caller's recipe may be as the user wrote it: what its paths hold is compared.
    whole = with_own_model(placed(recipe, look_at_inputs(recipe, recorded_inputs(run))), run)
    now = {label: _asked_now(whole, run, label) for label in recipe.train.prefer if asked.get(label) is not None}
    return {label for label, one in now.items() if one not in (None, asked[label])}


def _qualified(run: RunDirectory) -> dict[str, Qualified]:
    """What a campaign here found of each chip last, by label."""
    told = (event for event in read_events(run.events) if isinstance(event, Qualified))
    return {event.chip: event for event in told if event.chip is not None}


def _trains_next(recipe: Recipe, run: RunDirectory) -> str | None:
    """The chip that is opened anyway: others may be held by somebody else, or be hours away. None where the run is
    finished."""
    chip: str | None = recipe.train.prefer[0]
    for event in read_events(run.events):
        if isinstance(event, ChipOpened) and event.chip in recipe.train.prefer:
            chip = event.chip
        elif isinstance(event, RunFinished):
            chip = None
    return chip


def _asked_now(recipe: Recipe, run: RunDirectory, label: str) -> str | None:
    """None where what the recipe names cannot be looked at: that is told where it is needed."""
    try:
        return asked_of(recipe, run, request_for(recipe, run, label))
    except InputError:
        return None


def asked_of(recipe: Recipe, run: RunDirectory, request: Request) -> str:
    """Hash of all that the evidence depends on, files by what they hold. How the chip's machine is reached is not among
    it, nor what the chip is: that is seen when it is opened."""
    preset, path = recipe.model.preset, recipe.model.path
    faults = request.faults
    order = request.order("candidate", Path()).model_dump(mode="json")
    order |= {
        "model": configuration_hash(preset, path, request.vocabulary_size),
        "weights": None if path is None else weights_of(path, recorded_inputs(run)),
        "faults": sha256_of_file(Path(faults)) if faults is not None and Path(faults).is_file() else faults,
        "ranks": request.ranks_tried if request.collectives else 1,
    }
    return canonical_hash(order)


def _is_another_chip(recipe: Recipe, run: RunDirectory, label: str, tried: Qualified) -> bool:
    """Whether the certificate that a campaign made of it is for another identity than it has now. Not where the chip
    cannot be opened, which is told where it is needed."""
    if not _is_its_own(run, label, tried):
        return False
    try:
        request = replace(request_for(recipe, run, label), patience_seconds=recipe.supervise.start_seconds)
        found = describe(request, run.root / "qualify")
    except BeringiaError:
        return False
    return found.identity.hash != tried.identity_hash


def _is_its_own(run: RunDirectory, label: str, told: Qualified) -> bool:
    """Whether the certificate is the one that a campaign told of, and not one that somebody has put in its place; nor
    damaged, which is told where it is needed."""
    try:
        found = read_signed(run.certificates / f"{label}.json", Certificate).record
    except BeringiaError:
        return False
    return (found.identity_hash, found.seconds) == (told.identity_hash, told.seconds)


def _named(label: str, say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: say(f"{label}: {text}")


def _trusted_key(recipe: Recipe, run: RunDirectory) -> Ed25519PrivateKey:
    """The key that signs here. Raises RecipeError where the recipe would not count its signature: to be told before
    minutes are spent."""
    key = load_or_create_key()
    public, trusted = public_key_of(key), recipe.qualify.trusted_keys
    if trusted and public not in trusted:
        raise RecipeError(
            f"Certificates made here are signed by the key {public}, which is not in qualify.trusted_keys: name it "
            f"there, or put certificates by a trusted key into {run.certificates}, one for each chip of train.prefer "
            "(<label>.json)."
        )
    return key


def qualify_chip(
    recipe: Recipe, run: RunDirectory, label: str, say: Callable[[str], None] = lambda text: None
) -> Qualified:
    """Qualify one chip for the run's model, write its certificate into the run directory, and tell of it."""
    key = _trusted_key(recipe, run)
    request = request_for(recipe, run, label)
    directory = run.root / "qualify"
    bundle = reference_for(request, directory, say)
    certificate = qualify(request, bundle, say).model_copy(update={"command": command_line()})
    signed = sign(certificate, key)
    write_certificate_page(signed, run.certificates / f"{label}.html")
    write_junit(certificate, run.certificates / f"{label}.xml")
    # Last: it is what says that the chip has been qualified.
    write_signed(run.certificates / f"{label}.json", signed)
    return _event(certificate, run, label, asked_of(recipe, run, request))


def request_for(recipe: Recipe, run: RunDirectory, label: str) -> Request:
    """What the recipe asks of a chip, as a request to qualify it."""
    section = recipe.chips[label]
    preset = recipe.model.preset
    model = preset or recipe.model.path
    assert model is not None
    # A preset gets the vocabulary of the run's tokenizer; a directory has the one that it has.
    vocabulary = None if preset is None else choose_tokenizer(recipe.data, recipe.model).vocabulary_size
    compute = recipe.train.compute
    return Request(
        chip=section.use,
        model=model,
        faults=section.faults,
        seed=recipe.seed,
        vocabulary_size=other_vocabulary(preset, vocabulary),
        compute_dtype=None if compute == "auto" else compute,
        run_tokens=recipe.data.sequence_length,
        longest=max(2056, _LENGTHS_TIMES * recipe.data.sequence_length),
        collectives=section.ranks > 1,
        ranks=min(max(2, section.ranks), MOST_RANKS),
        command=chip_command(label, section, run=run),
    )


def _event(certificate: Certificate, run: RunDirectory, label: str, asked: str | None = None) -> Qualified:
    first = certificate.first_wrong
    return Qualified(
        used=certificate.chip,
        identity_hash=certificate.identity_hash,
        verdict=certificate.verdict,
        reasons=certificate.reasons,
        first_wrong=None if first is None else first.check.name,
        certificate=str(Path(run.certificates.name) / f"{label}.json"),
        seconds=certificate.seconds,
        asked=asked,
    )
