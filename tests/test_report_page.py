"""The page of a run: complete, self-contained, safe, and readable in a browser."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from pages import Elements, browse, measured_at, needs_browser
from report_story import EMULATED, PROCESSOR, Story, state_hash, write_story

from beringia.records import events
from beringia.report.history import read_history
from beringia.report.page import render_report, write_report

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_story(tmp_path_factory.mktemp("runs") / "r2-nano"))


@pytest.fixture(scope="module")
def page(page_path: Path) -> str:
    return page_path.read_text()


def hostile_story(directory: Path) -> Story:
    """A run in which every free text is an attempt to inject markup."""
    story = Story(directory)
    story.qualify(EVIL, "infer", EVIL)
    identity = EMULATED.model_copy(update={"sku": EVIL, "note": EVIL, "driver": EVIL, "switches": {EVIL: EVIL}})
    story.tell(events.RunStarted(name=EVIL, recipe_hash=EVIL, beringia=EVIL, steps=200, prefer=(EVIL,)))
    story.decide("start", EVIL, to_chip=EVIL)
    story.open(EVIL, identity, EVIL, EVIL)
    story.tell(events.Fallback(what=EVIL, asked=EVIL, used=EVIL, reason=EVIL))
    story.train(1, 120)
    story.alarm(121, 3.0, EVIL)
    story.fault(EVIL, "transient", EVIL, 121)
    story.decide("rollback", EVIL, to_step=50, lost_steps=71, to_chip=EVIL)
    story.tell(events.CheckpointRejected(step=100, file=EVIL, message=EVIL))
    story.decide("cross", EVIL, to_step=50, to_chip="fallback")
    story.open("fallback", PROCESSOR.model_copy(update={"sku": EVIL}))
    story.cross(50, canary_from=0)
    story.finish("given-up", EVIL)
    return story


def test_the_page_is_one_closed_document_without_anything_from_elsewhere(page: str) -> None:
    elements = Elements(page)
    assert elements.stack == []
    for tag, attributes in elements.found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith(("#", "data:"))
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def qualified_page(directory: Path) -> str:
    """Of a run whose first chip was refused, and whose second may train; the second's certificate has a page."""
    story = Story(directory, steps=20)
    story.qualify("preferred", "infer", "model.layers.3.mlp: aten.mm.default (backward, call 1)")
    story.qualify("fallback", "train")
    story.begin()
    story.open("fallback")
    story.train(1, 20)
    story.finish()
    story.end()
    (directory / "certificates").mkdir()
    (directory / "certificates" / "fallback.html").write_text("")
    return render_report(read_history(directory))


def test_what_qualification_found_stands_on_the_page_with_time_verdict_and_certificate(tmp_path: Path) -> None:
    page = qualified_page(tmp_path / "run")
    section = page[page.index("<h2>Qualification</h2>") : page.index("<h2>Everything else</h2>")]
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row.replace("<wbr>", "")).split()) for row in section.split("<tr>")[2:4]]
    assert rows[0].startswith("preferred infer : may serve, must not train model.layers.3.mlp: aten.mm.default")
    assert rows[1].startswith("fallback train : may train and serve 12 bounds hold 18 s page")
    assert [a.get("href") for tag, a in Elements(page).found if tag == "a"] == ["certificates/fallback.html"]
    assert "qualification, 18 s: train" in page


def test_the_runs_clock_begins_with_the_first_chips_qualification(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", steps=20)
    began = story.time
    story.qualify("preferred", "train")
    story.begin()
    history = read_history(story.end())
    assert history.started == began and history.qualified[0].seconds == 18.0


def test_ids_are_unique(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_answer_comes_before_every_number(page: str) -> None:
    body = page[page.index("<main>") :]
    assert body.index("<h1>") < body.index("<svg") < body.index("<table")
    heading = body[body.index("<h1>") : body.index("</h1>")]
    assert "Ascend 910B (emulated) to Intel Xeon Platinum 8481C (real) at step 200" in heading


def test_every_chip_name_in_the_pictures_says_real_or_emulated(page: str) -> None:
    lanes = re.findall(r'class="lane-title halo">(.*?)</text>', page)
    assert len(lanes) == 4
    assert all(
        ("EMULATED" in lane) == ("preferred" in lane) and ("REAL" in lane) == ("fallback" in lane) for lane in lanes
    )


def test_the_page_shows_retry_rollback_crossing_and_their_reasons(page: str) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in ("retry from step 50", "rollback to step 100", "cross to fallback from step 200", "fault 507014"):
        assert words in text
    assert "layers.0 alarmed again after a rollback: the fault of this chip is persistent" in text
    assert "✓ identical" in text
    assert "✓ the one that was due" in text
    assert "✓ inside its band" in text
    assert "3 of 3 loads" in text


def test_the_values_in_the_charts_are_in_tables_too(page: str) -> None:
    for name in ("Alarms of the guard", "Faults as the chips reported them", "Checkpoints", "Evaluations", "Steps"):
        assert f"<summary>{name} " in page


def test_what_others_wrote_cannot_inject_markup(tmp_path: Path) -> None:
    page = write_report(hostile_story(tmp_path / "run").end()).read_text()
    elements = Elements(page)
    assert elements.stack == []
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert "img" not in [tag for tag, _ in elements.found]
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)


def test_a_different_state_and_a_batch_that_was_not_due_stand_out(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 100)
    story.decide("cross", "lost", to_chip="fallback", to_step=100)
    story.open("fallback")
    resume = events.Resumed(
        step=100, cursor=3232, state_hash_expected=state_hash(100), state_hash=state_hash(99), load_seconds=0.1
    )
    story.tell(resume)
    crossing = events.Crossing(
        from_chip="preferred",
        to_chip="fallback",
        step=100,
        state_hash_before=state_hash(100),
        state_hash_after=state_hash(99),
        band=0.01,
        difference=0.02,
        seconds=1.0,
        imports_seconds=0.5,
        load_seconds=0.1,
        canary_seconds=0.0,
    )
    story.tell(crossing)
    page = write_report(story.end()).read_text()
    assert "✗ different" in page
    assert "✗ not the one that was due" in page
    assert "✗ outside its band" in page
    assert "0 of 1 load " in page


def test_a_failed_canary_is_shown_though_no_crossing_came_of_it(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open_preferred()
    story.train(1, 100)
    story.decide("cross", "lost", to_chip="fallback", to_step=100)
    story.open("fallback")
    story.tell(
        events.Canary(
            from_step=50,
            to_step=100,
            difference=0.21,
            band=0.04,
            parts={},
            passed=False,
            seconds=1.0,
            message="too far",
        )
    )
    page = write_report(story.end()).read_text()
    assert "✗ A canary failed" in page
    assert "crossing at step 100, not completed" in page


def test_the_note_that_a_chip_was_never_run_stands_beside_it(tmp_path: Path) -> None:
    note = "contract-tested, never run on Ascend"
    story = Story(tmp_path / "run")
    story.begin()
    story.open("preferred", EMULATED.model_copy(update={"note": note}))
    page = write_report(story.end()).read_text()
    assert page.count(note) >= 2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, steps: int) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    if steps:
        story.open("fallback")
        story.train(1, steps)
    assert "r2-nano is not finished" in write_report(story.end()).read_text()


def test_a_run_whose_loss_is_not_finite_says_so(tmp_path: Path) -> None:
    story = Story(tmp_path / "run")
    story.begin()
    story.open("fallback")
    story.train(1, 5)
    broken = events.StepDone(
        step=6, loss=None, gradient_norm=None, learning_rate=1e-3, tokens=1, seconds=0.1, cursor=192
    )
    story.tell(broken, after=0.1)
    story.tell(broken.model_copy(update={"step": 7}), after=0.1)
    assert "step 6: loss not finite" in write_report(story.end()).read_text()


@pytest.mark.slow
def test_a_hundred_thousand_steps_make_a_page_below_two_megabytes(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", steps=100_000)
    story.begin()
    story.open("fallback")
    story.train(1, 100_000)
    page = render_report(read_history(story.end()))
    assert len(page.encode()) < 2_000_000
    assert "300 of 100,000 rows, evenly spread" in page
    assert "lowest and highest step of each pixel" in page


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_is_cut_off_and_no_words_overlap(page: str, tmp_path: Path, width: int) -> None:
    measured = measured_at(page, tmp_path, width)
    assert '"late":[]' in measured, measured[-2000:]
    assert '"over":[]' in measured, measured[-2000:]
    assert '"fit":[]' in measured, measured[-2000:]
    assert '"scroll":0' in measured, measured[-2000:]
    assert f'"width":{width}' in measured, measured[-2000:]


@needs_browser
@pytest.mark.slow
def test_in_a_browser_the_page_loads_nothing_and_logs_no_error(page: str, tmp_path: Path) -> None:
    count = "document.body.append('loaded ' + performance.getEntriesByType('resource').length)"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{count}</script></body>"))
    seen = browse(tmp_path / "page.html", tmp_path / "profile", "--dump-dom")
    assert "loaded 0" in seen
    assert "CONSOLE" not in seen


@needs_browser
@pytest.mark.slow
def test_in_a_browser_the_pointer_over_the_loss_shows_the_exact_value(page: str, tmp_path: Path) -> None:
    move = """<script>
    const chart = document.querySelectorAll(".wide svg[data-hover]")[0], box = chart.getBoundingClientRect();
    const [x, y, words] = JSON.parse(chart.dataset.hover)[20];
    const at = {clientX: box.left + x * box.width / chart.viewBox.baseVal.width,
                clientY: box.top + y * box.height / chart.viewBox.baseVal.height};
    chart.dispatchEvent(new PointerEvent("pointermove", at));
    document.body.append(document.getElementById("tip").textContent === words ? "shown: " + words : "not shown");
    </script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", move + "</body>"))
    seen = browse(tmp_path / "page.html", tmp_path / "profile", "--dump-dom", "--window-size=1280,900")
    assert re.search(r"shown: step \d+: loss [\d.]+, preferred \(emulated\)", seen)
