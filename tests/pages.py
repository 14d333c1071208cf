"""Pages under test: their elements, and what a browser makes of them."""

from __future__ import annotations

import html
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from waiting import GIVE_UP_SECONDS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")


class Elements(HTMLParser):
    """Every element with its attributes, every id, and whether what was opened was closed."""

    VOID = frozenset({"meta", "link", "br", "wbr", "col"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def browse(page: Path, profile: Path, *arguments: str) -> str:
    """Open a page in headless Chromium; returns the document after its script ran, followed by the browser's log."""
    assert BROWSER is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    fixed += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    fixed += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"  # the browser itself must not look for updates either
    command = [BROWSER, *fixed, offline, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=GIVE_UP_SECONDS, env=dict(os.environ), check=True
    )
    return done.stdout + done.stderr


MEASURE = """
<script>
const width = document.documentElement.clientWidth;
const shown = element => element.getClientRects().length > 0 && !element.closest("details:not([open])");
const inside = element => {
  const box = element.getBoundingClientRect();
  return box.left >= -1 && box.right <= width + 1;
};
const words = "svg text, h1, h2, h3, p, li, dd, figcaption, table.fit td, .block";
const late = [...document.querySelectorAll(words)].filter(shown)
  .filter(element => !inside(element)).map(element => element.textContent.trim().slice(0, 40));
const texts = [...document.querySelectorAll("svg.chart text")].filter(shown);
const boxes = texts.map(text => [text, text.getBoundingClientRect()]);
const over = [];
boxes.forEach(([one, a], index) => boxes.slice(index + 1).forEach(([two, b]) => {
  const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (wide > 2 && high > 5) over.push(one.textContent + " / " + two.textContent);
}));
const fit = [...document.querySelectorAll("dt, dd")].filter(shown)
  .filter(element => element.scrollWidth > element.clientWidth + 1).map(element => element.textContent.trim());
const short = [...document.querySelectorAll("table.fit tr")].filter(shown)
  .filter(row => !row.closest(".unseen") && row.clientWidth < 0.9 * row.closest("table").clientWidth)
  .map(row => row.textContent.trim().slice(0, 40));
const report = document.createElement("pre");
report.id = "measured";
const scroll = document.documentElement.scrollWidth - width;
report.textContent = JSON.stringify({late, over, fit, short, scroll, width});
document.body.append(report);
</script>
"""


def measured_at(page: str, directory: Path, width: int) -> str:
    """What a browser measures on the page at this width: JSON of what is cut off, overlaps or does not fit."""
    # A window cannot be narrower than about 500 pixels, so the page is looked at through a frame.
    (directory / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    frame = directory / "frame.html"
    show = "onload=\"document.body.append(this.contentDocument.getElementById('measured').textContent)\""
    frame.write_text(f'<body><iframe src="page.html" width="{width}" height="900" {show}></iframe></body>')
    seen = browse(
        frame, directory / "profile", "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,900"
    )
    return html.unescape(seen)
