"""The page of a certificate: one self-contained HTML file that opens from a disk without a network.

The verdict comes first, then its reasons, then the map of the model, then the evidence, then everything else folded. It
reads without JavaScript: a cell of the map is a link to its card, and the style sheet shows the card that is the
target.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from beringia.records.certificate import Certificate
from beringia.records.files import write_text
from beringia.records.signature import Signed
from beringia.report.certificate import evidence
from beringia.report.certificate.effects import MARKS, draw_effects, effects_caption, effects_of
from beringia.report.certificate.model_map import LEVELS, ModelMap, model_map, shape_words, style_of, used_words
from beringia.report.certificate.sentence import chip_words, largest_share, operator_words, verdict_sentence
from beringia.report.charts import mark
from beringia.report.frame import Figure, both_widths, environment
from beringia.report.words import count

_KINDS = {"gradient": "gradient of a parameter", "update": "update of a layer", "outputs": "outputs"}
_KINDS |= {"decode": "decoding", "losses": "losses of training", "serve": "a way of serving"}
_KINDS |= {"accumulated": "gradients over unlike batches", "buffer": "a buffer after training"}


def write_certificate_page(signed: Signed[Certificate], path: Path) -> None:
    """Write the certificate's page; the file appears complete or not at all."""
    write_text(path, render_certificate(signed))


def render_certificate(signed: Signed[Certificate]) -> str:
    """The page as text."""
    certificate = signed.record
    model = model_map(certificate.operators)
    made = environment()
    made.filters.update(
        shapes=shape_words,
        used_words=used_words,
        operator=operator_words,
        error_words=evidence.error_words,
        index=evidence.index_words,
        telling=evidence.telling,
        largest_share=largest_share,
        level=style_of,
    )
    return made.get_template("certificate.html.jinja").render(
        title=f"{chip_words(certificate.identity)}: certificate for {certificate.model.name}",
        signed=signed,
        certificate=certificate,
        created=_moment(certificate.created),
        sentence=verdict_sentence(certificate),
        facts=evidence.facts_of(certificate, model),
        basis=evidence.basis_of(certificate),
        model=model,
        levels=LEVELS,
        map_caption=_map_caption(model),
        beyond=evidence.beyond_table(model),
        lockstep=_lockstep(certificate),
        marks=_marks(certificate),
        groups=evidence.probe_groups(certificate.probes),
        compared=evidence.compared_identities(certificate.identity, certificate.reference),
        tables=evidence.data_tables(certificate, model),
    )


def _moment(created: str) -> str:
    """`2026-11-25 18:40 UTC`; what is no time is shown as it stands."""
    try:
        return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return created


def _map_caption(model: ModelMap) -> str:
    cells = count(len(model.cells), "cell")
    if not model.beyond:
        return f"What to see: none of {cells} is hatched or crossed, so no operator is beyond its bound."
    layers = [layer.name for layer in model.layers if layer.beyond]
    where = ", ".join(layers[:4]) + (f" and {len(layers) - 4:,} more" if len(layers) > 4 else "")
    few = "is hatched or crossed" if len(model.beyond) == 1 else "are hatched or crossed"
    return f"What to see: {len(model.beyond):,} of {cells} {few}: beyond the bound or refused, in {where}."


def _lockstep(certificate: Certificate) -> Figure | None:
    effects = effects_of(certificate.probes)
    if not effects:
        return None
    return Figure("Lockstep", both_widths(lambda width: draw_effects(effects, width)), effects_caption(effects))


def _marks(certificate: Certificate) -> list[tuple[Markup, str]]:
    """The key of the chart: the marks that it has."""
    present = {effect.kind for effect in effects_of(certificate.probes)}
    shapes = [(MARKS[kind], words) for kind, words in _KINDS.items() if kind in present]
    return [(Markup(mark(7, 8, shape, style)), words) for (shape, style), words in shapes]
