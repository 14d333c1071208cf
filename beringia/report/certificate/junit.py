"""A certificate as a JUnit file, which CI systems (Jenkins, GitLab, GitHub's reporters) show as tests.

A suite for each kind of probe, a case for each probe. The suite `operators` also has a case for each call beyond its
bound, and one for each module with all its other calls. Facts without a bound and probes that could not decide are
skipped, with the reason. Whether the chip may be used is the certificate's verdict, a property of each suite: a failed
case alone does not say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from beringia.records.certificate import Certificate, Measure, OperatorCheck, ProbeResult
from beringia.records.files import write_text
from beringia.report.certificate.evidence import by_kind, error_words, index_words
from beringia.report.certificate.model_map import OUTSIDE, shape_words, used_words
from beringia.report.certificate.sentence import verdict_sentence
from beringia.report.words import count, share_words, significant

_FORBIDDEN = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


@dataclass(frozen=True)
class _Case:
    name: str
    result: Literal["passed", "failure", "skipped"]
    message: str = ""
    text: str = ""
    seconds: float = 0.0
    output: str = ""


def write_junit(certificate: Certificate, path: Path) -> None:
    """Write the file; it appears complete or not at all."""
    suites = {kind: [_probe_case(probe) for probe in probes] for kind, probes in by_kind(certificate.probes).items()}
    if certificate.operators:
        suites["operators"] = suites.get("operators", []) + _operator_cases(certificate.operators)
    root = ElementTree.Element("testsuites", _totals("Beringia certificate", [c for s in suites.values() for c in s]))
    for number, (kind, cases) in enumerate(suites.items()):
        root.append(_suite(certificate, number, kind, cases))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _suite(certificate: Certificate, number: int, kind: str, cases: Sequence[_Case]) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", _totals(kind, cases))
    # The common schema wants the time without a zone.
    suite.attrib |= {"id": str(number), "timestamp": _clean(certificate.created[:19]), "package": "beringia"}
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(certificate).items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    seen: dict[str, int] = {}
    for case in cases:
        seen[case.name] = seen.get(case.name, 0) + 1
        # CI systems follow a case from run to run by its name: two must not share one.
        name = case.name if seen[case.name] == 1 else f"{case.name} ({seen[case.name]})"
        suite.append(_element(kind, name, case))
    return suite


def _totals(name: str, cases: Sequence[_Case]) -> dict[str, str]:
    results = [case.result for case in cases]
    return {
        "name": _clean(name),
        "tests": str(len(cases)),
        "failures": str(results.count("failure")),
        "errors": "0",
        "skipped": str(results.count("skipped")),
        "time": f"{sum(case.seconds for case in cases):.3f}",
    }


def _properties(certificate: Certificate) -> dict[str, str]:
    return {
        "verdict": certificate.verdict,
        "sentence": str(verdict_sentence(certificate)),
        "chip": certificate.chip,
        "truth": certificate.identity.truth,
        "identity": certificate.identity_hash,
        "model": certificate.model.name,
        "scope": certificate.scope,
        "beringia": certificate.beringia,
    }


def _element(kind: str, name: str, case: _Case) -> ElementTree.Element:
    attributes = {"classname": f"beringia.{_clean(kind)}", "name": _clean(name), "time": f"{case.seconds:.3f}"}
    element = ElementTree.Element("testcase", attributes)
    if case.result != "passed":
        found = ElementTree.SubElement(element, case.result, {"message": _clean(case.message)})
        if case.result == "failure":
            found.set("type", _clean(kind))
        found.text = _clean(case.text) or None
    if case.output:
        ElementTree.SubElement(element, "system-out").text = _clean(case.output)
    return element


def _probe_case(probe: ProbeResult) -> _Case:
    lines = "\n".join(_measure_line(measure) for measure in probe.measures)
    if probe.outcome == "failed":
        rules_out = {"train": "Rules out training. ", "infer": "Rules out training and serving. ", "neither": ""}
        return _Case(probe.subject, "failure", rules_out[probe.rules_out] + probe.summary, lines, probe.seconds)
    if probe.outcome == "passed":
        return _Case(probe.subject, "passed", seconds=probe.seconds)
    why = "Told only, it has no bound: " if probe.outcome == "told" else "Could not decide: "
    return _Case(probe.subject, "skipped", why + probe.summary, lines, probe.seconds)


def _operator_cases(checks: Iterable[OperatorCheck]) -> list[_Case]:
    beyond, within = [], dict[str, list[OperatorCheck]]()
    for check in checks:
        if check.used > 1:
            beyond.append(check)
        else:
            within.setdefault(check.module or OUTSIDE, []).append(check)
    wrong = [_Case(check.name, "failure", f"{check.name}: {used_words(check)}", _check_text(check)) for check in beyond]
    # Their number is no part of the name, which must stay the same from run to run.
    return wrong + [
        _Case(f"{module}: all calls but those beyond their bound", "passed", output=count(len(calls), "call"))
        for module, calls in within.items()
    ]


def _check_text(check: OperatorCheck) -> str:
    if check.refused:
        return check.refused
    lines = [f"arguments {shape_words(check)}; {check.attributes}", f"result {check.dtype}"]
    if check.worst_element:
        place = index_words(check.worst_element)
        lines.append(f"worst element {place}: found {check.found}, expected {check.expected}")
    lines.append(f"error {error_words(check)}")
    return "\n".join([*lines, *(_measure_line(measure) for measure in check.measures)])


def _measure_line(measure: Measure) -> str:
    value = f"{significant(measure.value)} {measure.unit}".strip()
    share = share_words(measure.used)
    return f"{measure.name}: {value}, bound {significant(measure.bound)}, share {share} ({measure.reason})"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
