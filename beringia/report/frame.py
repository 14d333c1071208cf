"""What every page is made with: the templates, figures in two widths, tables, the few numbers at the top.

Knows nothing of runs or certificates. Templates escape every value: recipes, error messages and operators' arguments
are other people's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from beringia.report.words import clock, count, duration, percent, share_words, short_hash, significant

TEMPLATES = Path(__file__).parent / "templates"
WIDE_PIXELS = 1052
NARROW_PIXELS = 358


@dataclass(frozen=True)
class Figure:
    """A picture drawn wide and narrow, with the sentence that says what to see."""

    name: str
    picture: Markup
    caption: str


@dataclass(frozen=True)
class Fact:
    """One of the few numbers at the top."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class PageTable:
    """A folded table. Columns whose name starts with `#` hold numbers and are set to the right."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def environment() -> Environment:
    """Jinja with our templates and the words that pages use."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["inline"] = _inline
    made.filters.update(
        significant=significant,
        clock=clock,
        duration=duration,
        percent=percent,
        short_hash=short_hash,
        count=count,
        share_words=share_words,
        breakable=breakable,
    )
    return made


def both_widths(draw: Callable[[int], Markup]) -> Markup:
    """A picture drawn twice; the style sheet shows the one that fits, so letters keep their size."""
    wide, narrow = draw(WIDE_PIXELS), draw(NARROW_PIXELS)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)


def breakable(words: object) -> Markup:
    """Words whose long names may be broken after a dot or an underscore, and whose numbers keep their per cent."""
    words = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(words))
    return Markup(re.sub(r"(?<=\w)(?<!\baten)([._])(?=[A-Za-z_])", r"\1<wbr>", str(escape(words))))


def _inline(name: str) -> Markup:
    """A style sheet or script of ours, put into the page as it is."""
    return Markup((TEMPLATES / name).read_text())
