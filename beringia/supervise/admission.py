"""Whether a chip may train: what the run directory's certificates say of the chip that a worker has opened.

A certificate counts when its signature holds (by a key that the recipe trusts, where it names any), its chip identity
is the opened chip's, it is about the dtype that the chip computes in, its model's configuration is the recipe's (of a
preset with the vocabulary that the run's tokenizer gives it), it is about all layers, and, for several ranks, about
collectives. Where the recipe names a model directory, it must be about those files of weights, as they were when the
run began: outliers of trained weights are what it was tried with. Steps change weights, so those of later steps are not
compared; nor are a preset's, which are drawn: another seed's are as good evidence. Of several the newest that decides
counts: a later `unfit` overrules an earlier `train`, a later `inconclusive` only where a probe of it ruled training
out.

Reads files; decides nothing about the run (`decide.py` does) and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from beringia.errors import InputError, ModelError, Refusal
from beringia.records.certificate import NO_COLLECTIVES, Certificate, Verdict
from beringia.records.events import ChipOpened, Fallback, Unqualified
from beringia.records.inputs import weights_of
from beringia.records.model_source import OWN_SIZES, configuration_hash, layers_of
from beringia.records.recipe import ModelSection, Recipe
from beringia.records.run_directory import RunDirectory
from beringia.records.signature import read_signed, verify
from beringia.supervise.run_files import recorded_inputs


def admission(opened: ChipOpened, recipe: Recipe, run: RunDirectory) -> Fallback | Unqualified | None:
    """None for a chip that is qualified to train; otherwise the event to tell: a Fallback where the recipe lets it
    train all the same, Unqualified where it must not."""
    evidence = _evidence(opened, recipe, run)
    if evidence.verdict == "train":
        return None
    found = "none" if evidence.verdict is None else f"verdict {evidence.verdict}"
    refused = evidence.verdict is not None
    if recipe.qualify.unqualified == "allow" or (refused and recipe.qualify.on_refusal == "try"):
        return Fallback(what="qualification", asked="certificate", used=found, reason=evidence.words)
    return Unqualified(used=opened.used, identity_hash=opened.identity_hash, found=found, reason=evidence.words)


@dataclass(frozen=True)
class _Evidence:
    """The verdict that counts, None without any, and where it comes from."""

    verdict: Verdict | None
    words: str


def _evidence(opened: ChipOpened, recipe: Recipe, run: RunDirectory) -> _Evidence:
    model = recipe.model
    try:
        configuration = configuration_hash(model.preset, model.path, opened.vocabulary_size)
    except ModelError as problem:
        return _Evidence(None, f"no certificate can be compared with the model. {problem}".rstrip("."))
    weights = None if model.path is None else weights_of(model.path, recorded_inputs(run))
    fitting: list[tuple[str, Certificate]] = []
    others: list[str] = []
    for path in _about(opened.chip, recipe, run):
        try:
            signed = read_signed(path, Certificate)
            verify(signed, recipe.qualify.trusted_keys)
        except (InputError, Refusal) as problem:
            others.append(f"{path.name} does not count: {str(problem).rstrip('.')}")
            continue
        why_not = _mismatch(signed.record, opened, model, configuration, weights)
        if why_not is None:
            fitting.append((path.name, signed.record))
        else:
            others.append(f"{path.name} {why_not}")
    if not fitting:
        missing = f"no certificate for {opened.used} ({opened.identity_hash[:12]}) and {model.preset or model.path}"
        return _Evidence(None, "; ".join([f"{missing} lies in {run.certificates}", *others]))
    return _newest(fitting)


def _about(label: str | None, recipe: Recipe, run: RunDirectory) -> list[Path]:
    """The certificates that may be about the chip under this label: its own, if it has one; else all but those of other
    labels. Two lots of one part have one identity."""
    own = run.certificates / f"{label}.json"
    if label is not None and own.exists():
        return [own]
    others = {f"{other}.json" for other in recipe.chips if other != label}
    return sorted(path for path in run.certificates.glob("*.json") if path.name not in others)


def _mismatch(
    certificate: Certificate, opened: ChipOpened, model: ModelSection, configuration: str, weights: str | None
) -> str | None:
    """Why a valid certificate says nothing about this chip or model."""
    if certificate.identity_hash != opened.identity_hash:
        changed = certificate.identity.differences(opened.identity)
        if "sku" in changed or not changed:
            return f"is for another chip, {certificate.identity.sku} ({certificate.identity_hash[:12]})"
        words = ", ".join(f"{name} {there}, here {here}" for name, (there, here) in changed.items())
        return f"is for another identity of this chip ({words})"
    if certificate.compute_dtype != opened.compute_dtype:
        return f"is for computing in {certificate.compute_dtype}, and the run computes in {opened.compute_dtype}"
    if certificate.model.configuration != configuration:
        return _other_model(certificate, opened, model)
    if certificate.layers not in (None, layers_of(model.preset, model.path)):
        return f"is for {certificate.layers} of the model's layers, and the run trains all of them"
    if opened.ranks > 1 and NO_COLLECTIVES in certificate.untried:
        return (
            f"was made without trying collectives, and the run has {opened.ranks} ranks (qualify it where so many "
            "devices are, with `--ranks`)"
        )
    tried = certificate.weight_files
    says_nothing = tried is None and certificate.schema_version <= 1  # which had no such field
    if weights is not None and tried != weights and not says_nothing:
        there = "none that are named" if tried is None else tried[:12]
        return f"is for other weights of {certificate.model.name} ({there}, here {weights[:12]})"
    return None


def _other_model(certificate: Certificate, opened: ChipOpened, model: ModelSection) -> str:
    """What the certificate is for; of the same preset it is the vocabulary that differs."""
    tried, own = certificate.model, OWN_SIZES.get(model.preset or "")
    if own is None or tried.configuration != configuration_hash(model.preset, None, tried.vocabulary_size):
        return f"is for another model, {tried.name}"
    there, here = (size or own.vocabulary for size in (tried.vocabulary_size, opened.vocabulary_size))
    return (
        f"is for {tried.name} with a vocabulary of {there}, and the run trains it with one of {here} (qualify it with "
        f"`beringia qualify {opened.asked} --model {model.preset} --vocabulary {here}`)"
    )


def _newest(fitting: list[tuple[str, Certificate]]) -> _Evidence:
    conclusive = [pair for pair in fitting if pair[1].verdict != "inconclusive" or pair[1].rules_out("train")]
    name, certificate = max(conclusive or fitting, key=lambda pair: pair[1].created)
    because = f": {certificate.reasons[0].rstrip('.')}" if certificate.reasons else ""
    return _Evidence(certificate.verdict, f"{name} has the verdict {certificate.verdict}{because}")
