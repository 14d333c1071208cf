"""Requests that a machine makes up from the server's own description: no 5xx, no hang."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from served import serving
from waiting import GIVE_UP_SECONDS

EXAMPLES = 80


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_whatever_is_asked_is_answered_or_refused(mode: schemathesis.GenerationMode) -> None:
    statuses: Counter[int] = Counter()
    with serving("r2-nano", "--chip", "cpu", "--new-tokens", "32") as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        if mode is schemathesis.GenerationMode.NEGATIVE:  # a GET without parameters cannot be wrong
            operations = [operation for operation in operations if operation.method == "post"]
        for operation in operations:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                answer = case.call(timeout=GIVE_UP_SECONDS)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500, (answer.status_code, answer.text, case.as_curl_command())
                if 400 <= answer.status_code < 500:
                    assert answer.json()["error"]["message"]

            ask()
        assert server.get("/health").status_code == 200
        assert server.metric("beringia_requests_open") == 0
    assert statuses[400] + statuses[404] > EXAMPLES // 2, statuses
