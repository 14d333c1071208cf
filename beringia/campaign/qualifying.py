"""The campaign's first stage: every chip is qualified, so that one that must not train costs minutes, not a run.

Writes `certificates/<label>.json` with its page and JUnit report into the run directory, and one event a chip. A chip
that has its certificate already (the campaign was interrupted) is not asked again, unless it was qualified for a recipe
that the run has begun anew from. Does nothing where the recipe lets chips train without certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from beringia.errors import InputError, RecipeError
from beringia.history.log import read_events
from beringia.qualify.hardware.collective_cases import MOST_RANKS
from beringia.qualify.qualification import Request, qualify, reference_for
from beringia.records.certificate import Certificate
from beringia.records.command_line import command_line
from beringia.records.events import AnyEvent, Qualified, RecipeChanged
from beringia.records.inputs import weights_of
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.records.signature import load_or_create_key, public_key_of, read_signed, sign, write_signed
from beringia.report.certificate import write_certificate_page, write_junit
from beringia.supervise.chip_command import chip_command
from beringia.supervise.run_files import recorded_inputs, taking_run

_ASKED = {"seed", "model.preset", "model.path", "train.compute", "data.sequence_length"}
"""Keys of the recipe that say what a chip is qualified for: see `request_for`."""

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
        for label in _missing(taken.recipe, run):
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
    qualified, outdated = set[str](), set[str]()
    for event in read_events(run.events):
        if isinstance(event, Qualified) and event.chip is not None:
            qualified.add(event.chip)
            outdated.discard(event.chip)
        elif isinstance(event, RecipeChanged) and event.anew and _ASKED.intersection(event.changes):
            outdated |= qualified
    path = recipe.model.path
    weights = weights_of(path, recorded_inputs(run)) if path is not None and qualified else None
    if weights is not None:
        outdated |= {label for label in qualified if _weights_tried(run, label) not in (None, weights)}
    return outdated


def _weights_tried(run: RunDirectory, label: str) -> str | None:
    try:
        return read_signed(run.certificates / f"{label}.json", Certificate).record.weight_files
    except InputError:  # damaged, or gone: told where it is asked for
        return None


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
    return _event(certificate, run, label)


def request_for(recipe: Recipe, run: RunDirectory, label: str) -> Request:
    """What the recipe asks of a chip, as a request to qualify it."""
    section = recipe.chips[label]
    model = recipe.model.preset or recipe.model.path
    assert model is not None
    compute = recipe.train.compute
    return Request(
        chip=section.use,
        model=model,
        faults=section.faults,
        seed=recipe.seed,
        compute_dtype=None if compute == "auto" else compute,
        run_tokens=recipe.data.sequence_length,
        longest=max(2056, _LENGTHS_TIMES * recipe.data.sequence_length),
        collectives=section.ranks > 1,
        ranks=min(max(2, section.ranks), MOST_RANKS),
        command=chip_command(label, section, run=run),
    )


def _event(certificate: Certificate, run: RunDirectory, label: str) -> Qualified:
    first = certificate.first_wrong
    return Qualified(
        used=certificate.chip,
        identity_hash=certificate.identity_hash,
        verdict=certificate.verdict,
        reasons=certificate.reasons,
        first_wrong=None if first is None else first.check.name,
        certificate=str(Path(run.certificates.name) / f"{label}.json"),
        seconds=certificate.seconds,
    )
