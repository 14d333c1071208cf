"""A certificate's page, its JUnit file and its table on a terminal: true, complete, safe, readable in a browser."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from certificates import ATTENTION, certificate, realistic
from pages import Elements, browse, measured_at, needs_browser
from rich.console import Console

from beringia.records.certificate import Certificate, Located, Measure, OperatorCheck, ProbeResult
from beringia.records.signature import Signed
from beringia.report.certificate.effects import effects_of
from beringia.report.certificate.junit import write_junit
from beringia.report.certificate.model_map import MOST_CARDS, MOST_OPEN, model_map, style_of
from beringia.report.certificate.page import render_certificate, write_certificate_page
from beringia.report.certificate.sentence import verdict_sentence
from beringia.report.certificate.terminal import print_certificate

VERDICTS = ("train", "infer", "unfit", "inconclusive")
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\x00\x1b[31m"


def signed(made: Certificate) -> Signed[Certificate]:
    return Signed[Certificate](record=made, public_key="ab" * 32, signature="cd" * 64)


@pytest.fixture(scope="module")
def infer() -> Certificate:
    return realistic("infer")


@pytest.fixture(scope="module")
def page(infer: Certificate, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("certificates") / "page.html"
    write_certificate_page(signed(infer), path)
    return path.read_text()


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.replace("<wbr>", ""))).split())


def heading(page: str) -> str:
    return text_of(page[page.index("<h1>") : page.index("</h1>")])


def cells(page: str, style: str) -> list[str]:
    """Titles of the map's cells that look so."""
    return re.findall(rf'<[ai] (?:href="#c\d+" )?class="{style}" title="([^"]*)"', page)


def refused(check: OperatorCheck) -> OperatorCheck:
    return check.model_copy(update={"refused": "not implemented for this device", "measures": (), "error": None})


def hostile() -> Certificate:
    """A certificate in which every free text is an attempt to inject markup."""
    made = certificate(verdict="infer")
    check = made.operators[0].model_copy(update=dict.fromkeys(("module", "operator", "attributes", "basis"), EVIL))
    identity = made.identity.model_copy(update={"sku": EVIL, "note": EVIL, "switches": {EVIL: EVIL}})
    probes = [
        ProbeResult(probe=EVIL, subject=EVIL, outcome=outcome, summary=EVIL)
        for outcome in ("failed", "passed", "told", "inconclusive")
    ]
    free = {"chip": EVIL, "reasons": (EVIL,), "mitigations": (EVIL,), "created": EVIL, "probes": tuple(probes)}
    located = Located(check=check, consistent_with=(EVIL,), mitigations=(EVIL,))
    return certificate(
        identity, verdict="infer", reference=identity, operators=(check, refused(check)), first_wrong=located, **free
    )


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (
            "train",
            "Ascend 910B emulated : train on it and serve on it: 3,134 operator checks and 42 probes found nothing",
        ),
        (
            "infer",
            "Ascend 910B emulated : serve on it, do not train on it: "
            "aten._scaled_dot_product_fused_attention_overrideable_backward of model.layers.2.self_attn is wrong "
            "(backward).",
        ),
        ("unfit", "Ascend 910B emulated : neither train nor serve on it: outputs: farther from float64"),
        (
            "inconclusive",
            "Ascend 910B emulated : not decided, so neither train nor serve on it yet: a sound chip would be found "
            "equal with a probability of only 62 %, 80 % is needed.",
        ),
    ],
)
def test_the_verdict_is_the_first_sentence_and_the_chips_name_has_its_badge(verdict: str, words: str) -> None:
    page = render_certificate(signed(realistic(verdict)))
    assert heading(page).startswith(words)
    assert page.index("<h1>") < page.index('<dl class="facts">') < page.index("<table")
    assert '<span class="badge emulated">emulated</span>' in page[page.index("<h1>") : page.index("</h1>")]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_without_a_located_operator_and_without_reasons_still_has_a_sentence(verdict: str) -> None:
    made = realistic(verdict, first_wrong=None, reasons=(), probes=(), operators=(), power=0.9)
    assert render_certificate(signed(made))
    assert str(verdict_sentence(made)).startswith("Ascend 910B (emulated): ")
    assert str(verdict_sentence(made)).endswith(".")


def test_what_failed_is_the_reason_where_no_operator_was_located() -> None:
    words = str(verdict_sentence(realistic("infer", first_wrong=None)))
    assert "do not train on it: gradient model.layers.2.self_attn" in words


def test_an_operator_that_is_wrong_in_the_backward_pass_is_no_reason_against_serving(infer: Certificate) -> None:
    assert "backward" not in str(verdict_sentence(realistic("unfit")))


def test_the_page_is_one_closed_document_without_anything_from_elsewhere(page: str) -> None:
    elements = Elements(page)
    assert elements.stack == []
    for tag, attributes in elements.found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith(("#", "data:"))
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_ids_are_unique_and_every_cell_leads_to_a_card_that_is_there(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#(c\d+)"', page))
    assert links
    assert links <= set(ids)


def test_reasons_values_and_identities_are_on_the_page(page: str, infer: Certificate) -> None:
    text = text_of(page)
    for words in (*infer.reasons, *infer.mitigations, *(probe.summary for probe in infer.probes)):
        assert words in text
    assert "Consistent with: a mask or a length that is not respected" in text
    assert "relative error 0.0370; the reference chip's own is 0.00210 (this chip: 18 times it)" in text
    assert "[1, 2, 31, 31]: found −5.86510 × 10⁻⁵, expected 0" in text
    assert "6.4 % of the elements, from [0, 0, 17, 0] to [3, 3, 31, 63]" in text
    for words in ("Intel Xeon Platinum 8481C", "nearest-even", infer.identity_hash, infer.model.weights, "ab" * 32):
        assert words in text


def test_a_wrong_operator_is_hatched_and_a_refused_one_is_crossed(infer: Certificate) -> None:
    checks = [refused(check) if check.operator == "aten.topk.default" else check for check in infer.operators]
    page = render_certificate(signed(realistic("infer", operators=tuple(checks))))
    assert [title.split(":")[0] for title in cells(page, "beyond")] == [f"{ATTENTION[:-8]}, 5 calls"]
    assert len(cells(page, "refused")) == 4
    style = page[page.index("<style>") : page.index("</style>")]
    assert re.search(r"a\.beyond {[^}]*repeating-linear-gradient[^}]*outline", style)


def test_the_map_has_every_module_in_the_order_of_the_forward_pass(infer: Certificate) -> None:
    model = model_map(infer.operators)
    names = [layer.name for layer in model.layers]
    layers = [f"model.layers.{number}" for number in range(4)]
    assert names == ["model.embed_tokens", *layers, "model.norm", "lm_head", "outside the modules"]
    blocks = [block.name for block in model.layers[1].blocks]
    assert blocks[:2] == ["input_layernorm", "self_attn"]
    assert blocks[-1] == "mlp.shared_experts.down_proj"
    assert sum(len(cell.calls) for cell in model.cells) == len(infer.operators)


def test_the_colours_grow_with_the_share() -> None:
    shares = (0.0, 0.1, 0.4, 0.7, 0.8, 1.0, 1.01, float("inf"))
    assert [style_of(share) for share in shares] == ["u0", "u1", "u2", "u3", "u4", "u5", "beyond", "beyond"]


def test_every_wrong_cell_and_the_highest_of_each_module_have_a_card_though_not_all_do() -> None:
    model = model_map(realistic("infer", layers=8, repeats=1).operators)
    assert len(model.cards) == MOST_CARDS
    assert all(cell.card is not None for cell in model.beyond)
    highest: dict[tuple[str, str], float] = {}
    for cell in model.cells:
        place = cell.worst.module, cell.worst.direction
        highest[place] = max(cell.used, highest.get(place, 0.0))
    with_card = {(cell.worst.module, cell.worst.direction) for cell in model.cards}
    assert with_card == {place for place, used in highest.items() if used > 0}


def test_a_deep_model_folds_sound_layers_and_shows_the_wrong_one() -> None:
    model = model_map(realistic("infer", layers=30, repeats=1).operators)
    shown = [layer.name for run in model.runs if not run.folded for layer in run.layers]
    folded = [layer.name for run in model.runs if run.folded for layer in run.layers]
    assert "model.layers.28" in shown
    assert "model.layers.10" in folded
    assert len(shown) <= MOST_OPEN
    assert sorted(shown + folded) == sorted(layer.name for layer in model.layers)


def test_three_thousand_checks_make_a_page_below_two_megabytes(page: str, infer: Certificate) -> None:
    assert len(infer.operators) > 3000
    assert len(page.encode()) < 2_000_000


@pytest.mark.slow
def test_twenty_thousand_checks_where_every_call_is_wrong_make_a_page_below_four_megabytes() -> None:
    wrong = realistic("unfit", layers=40, repeats=3)
    checks = [
        check.model_copy(update={"measures": tuple(m.model_copy(update={"value": 9.0}) for m in check.measures)})
        for check in wrong.operators
    ]
    assert len(checks) > 18_000
    page = render_certificate(signed(realistic("unfit", operators=tuple(checks))))
    assert len(page.encode()) < 4_000_000
    assert "of 6,066 rows; the certificate's JSON file has all calls" in html.unescape(page)


def test_lockstep_shows_every_effect_and_its_bound(page: str, infer: Certificate) -> None:
    effects = effects_of(infer.probes)
    assert len(effects) == sum(probe.probe == "lockstep" for probe in infer.probes) - 1  # the loss is in nats
    assert page.count(">bound</text>") == 2  # wide and narrow
    assert "log scale" in page
    text = text_of(page)
    assert "3 of 29 marks lie right of the dashed bound" in text
    assert "the bound is 1.5, twice that for losses of training" in text
    for effect in effects:
        assert html.escape(effect.words) in page


def test_a_number_that_is_not_finite_says_so() -> None:
    # The sample's first check has a measure without a value.
    text = text_of(render_certificate(signed(certificate(verdict="infer"))))
    assert "not finite" in text
    assert "not a number" in text


@pytest.mark.parametrize(("value", "beyond"), [(0.0, False), (2.0, True), (5e-324, True)])
def test_a_bound_of_0_is_written_everywhere(infer: Certificate, tmp_path: Path, value: float, beyond: bool) -> None:
    exact = Measure(name="effect", value=value, bound=0.0, unit="noise floors", reason="exact")
    probe = ProbeResult(probe="lockstep", subject="outputs", outcome="failed", summary="s", measures=(exact,))
    check = infer.operators[0].model_copy(update={"measures": (exact,)})
    made = infer.model_copy(update={"probes": (probe,), "operators": (check,)})
    (effect,) = effects_of(made.probes)
    assert effect.beyond is beyond and "bound 0" in effect.words
    assert effect.words in html.unescape(render_certificate(signed(made)))
    write_junit(made, tmp_path / "junit.xml")
    assert "bound 0" in (tmp_path / "junit.xml").read_text()
    print_certificate(made, Console(file=io.StringIO(), width=100))


def test_what_others_wrote_cannot_inject_markup() -> None:
    elements = Elements(render_certificate(signed(hostile())))
    assert elements.stack == []
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert "img" not in [tag for tag, _ in elements.found]
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)


def test_junit_has_a_case_for_each_probe_and_each_wrong_call_and_its_counts_agree(
    infer: Certificate, tmp_path: Path
) -> None:
    write_junit(infer, tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = root.findall("testsuite/testcase")
    modules = {check.module for check in infer.operators if check.used <= 1}
    wrong = sum(check.used > 1 for check in infer.operators)
    assert len(cases) == len(infer.probes) + len(modules) + wrong
    outcomes = Counter(probe.outcome for probe in infer.probes)
    assert len(root.findall(".//failure")) == outcomes["failed"] + wrong
    assert len(root.findall(".//skipped")) == outcomes["told"] + outcomes["inconclusive"]
    assert root.findall("testsuite/properties/property[@name='verdict'][@value='infer']")


def basis(made: Certificate) -> str:
    page = render_certificate(signed(made))
    start = page.index("What it rests on")
    return text_of(page[start : page.index("</section>", start)])


def test_the_page_says_what_the_certificate_rests_on_with_the_wrong_calls_and_what_ends_it(infer: Certificate) -> None:
    told = basis(infer)
    assert "bounds of probes 34 hold, 3 are broken" in told and "operator calls 3,129 right, 5 wrong or refused" in told
    assert "single device none, the chip is emulated" in told and "made by" not in told
    assert infer.identity_hash[:12] in told and infer.model.weights[:12] in told and "bfloat16" in told
    card = infer.reference.model_copy(update={"device": "8d2f-77"})
    real = infer.model_copy(update={"identity": card, "command": "beringia qualify cuda --model 'a b'"})
    assert "single device 8d2f-77" in basis(real) and "made by beringia qualify cuda --model 'a b'" in basis(real)
    assert "stands for the kind of chip" in basis(infer.model_copy(update={"identity": infer.reference}))


def test_a_fault_that_nobody_knows_is_said_to_be_one(infer: Certificate) -> None:
    assert infer.first_wrong is not None
    unknown = infer.first_wrong.model_copy(update={"consistent_with": ()})
    words = "No fault that is known here leaves such traces."
    assert words in text_of(render_certificate(signed(infer.model_copy(update={"first_wrong": unknown}))))
    assert words not in text_of(render_certificate(signed(infer)))
    console = Console(file=io.StringIO(), width=100)
    print_certificate(infer.model_copy(update={"first_wrong": unknown}), console)
    assert isinstance(console.file, io.StringIO)
    assert "consistent with no fault that is known here" in console.file.getvalue()


@pytest.mark.parametrize("made", [realistic("unfit", layers=2, repeats=1), certificate(), hostile()])
def test_junit_is_what_ci_systems_read(made: Certificate, tmp_path: Path) -> None:
    write_junit(made, tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert root.tag == "testsuites"
    kinds = {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite.get("name")
        assert [child.tag for child in suite] == ["properties"] + ["testcase"] * (len(suite) - 1)
        names = [(case.get("classname"), case.get("name")) for case in suite.findall("testcase")]
        assert len(names) == len(set(names))
        for kind, path in kinds.items():
            assert int(suite.get(kind, "-1")) == len(suite.findall(path))
        for case in suite.findall("testcase"):
            assert {child.tag for child in case} <= {"failure", "skipped", "system-out"}
            assert all(child.get("message") for child in case if child.tag != "system-out")
    for kind, path in kinds.items():
        assert int(root.get(kind, "-1")) == len(root.findall(f"testsuite/{path}"))


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_table_fits_the_terminal(verdict: str, columns: int) -> None:
    console = Console(file=io.StringIO(), width=columns)
    print_certificate(realistic(verdict, layers=3, repeats=1), console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert max(len(line) for line in printed.splitlines()) <= min(columns, 100)
    assert printed.startswith("Ascend 910B (emulated): ")
    assert len(re.findall(r"✓ within|✗ beyond", printed)) == 5


def test_the_terminal_names_the_first_wrong_operator_and_the_reasons(infer: Certificate) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_certificate(infer, console)
    assert isinstance(console.file, io.StringIO)
    printed = " ".join(console.file.getvalue().split())
    for words in (
        "because the first wrong operator",
        "over 1,000 times its bound",
        "helps use attention made of single",
    ):
        assert words in printed
    assert "element [1, 2, 31, 31]" in printed


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_in_a_browser_nothing_is_cut_off_and_no_words_overlap(verdict: str, width: int, tmp_path: Path) -> None:
    page = render_certificate(signed(realistic(verdict))).replace("<details>", "<details open>")
    measured = measured_at(page, tmp_path, width)
    for nothing in ('"late":[]', '"over":[]', '"fit":[]', '"short":[]', '"scroll":0', f'"width":{width}'):
        assert nothing in measured, measured[-3000:]


CONTRAST = """<script>
const light = color => { const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3)
  .map(part => part / 255).map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const style = query => getComputedStyle(document.querySelector(query));
const paper = light(getComputedStyle(document.body).backgroundColor);
const ratios = ["h1", ".quiet", ".no", "figcaption", ".block > b"].map(query => light(style(query).color))
  .map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
const scale = [0, 1, 2, 3, 4, 5].map(level => light(style(".key .u" + level).backgroundColor));
const steps = scale.slice(1).map((one, place) => one - scale[place]);
document.body.append(`paper ${paper < 0.2 ? "dark" : "light"}, contrast ${Math.min(...ratios) >= 4.5}, ` +
  `scale ${steps.every(step => step > 0) || steps.every(step => step < 0)}`);
</script></body>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "name"), [("1", "light"), ("0", "dark")])
def test_in_a_browser_light_and_dark_keep_contrast_and_a_scale_of_lightness(
    page: str, tmp_path: Path, scheme: str, name: str
) -> None:
    (tmp_path / "page.html").write_text(page.replace("</body>", CONTRAST))
    wish = f"--blink-settings=preferredColorScheme={scheme}"
    seen = browse(tmp_path / "page.html", tmp_path / "profile", "--dump-dom", wish)
    assert f"paper {name}, contrast true, scale true" in seen


@needs_browser
@pytest.mark.slow
def test_in_a_browser_without_javascript_a_cell_opens_its_card(page: str, tmp_path: Path) -> None:
    shown = (
        "[...document.querySelectorAll('.drawer')].filter(card => card.getClientRects().length).map(card => card.id)"
    )
    follow = f"""<script>
    const before = {shown}; document.querySelector("a.beyond").click();
    setTimeout(() => document.body.append("cards " + before.length + ": " + {shown}), 200);
    </script></body>"""
    # The page's own script is taken out: what follows is the style sheet's doing.
    quiet = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    (tmp_path / "page.html").write_text(quiet.replace("</body>", follow))
    seen = browse(tmp_path / "page.html", tmp_path / "profile", "--dump-dom")
    assert "cards 0: c0" in seen
