"""The chat page in a real browser, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browsing
from pages import needs_browser
from served import Server, serving

from beringia.data.tokenizer import write_tokenizer
from beringia.model import load_model, save_model

pytestmark = pytest.mark.slow  # each has a server and a browser of its own

ASK = """
document.getElementById('text').value = 'What is 3 + 4?';
document.getElementById('temperature').value = '0.8';
document.getElementById('most').value = '60';
document.getElementById('ask').requestSubmit();
"""
DONE = "document.getElementById('send').textContent === 'Send' && document.querySelector('.facts')?.textContent"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that begins every answer with a thought: its template opens one."""
    directory = tmp_path_factory.mktemp("model") / "r2-thinking"
    save_model(load_model("r2-nano", vocabulary_size=261), directory)
    write_tokenizer("bytes", directory)
    with serving(directory, "--chip", "emulated:ascend-910b", "--dtype", "float32") as running:
        yield running


@needs_browser
def test_it_streams_an_answer_with_its_probabilities_and_says_which_chip_answers(
    server: Server, tmp_path: Path
) -> None:
    with browsing(tmp_path / "profile") as browser:
        browser.open(server.url)
        assert "emulated" in browser.run("document.querySelector('.badge').textContent")
        assert "Ascend910B" in browser.run("document.querySelector('header').textContent")
        browser.run(ASK)
        facts = browser.wait_for(DONE)
        assert "60 tokens" in facts and "tokens/s" in facts and "cut off" in facts
        assert browser.run("document.querySelectorAll('.answer .token[tabindex]').length") > 20
        tip = browser.run(
            "(() => { const token = document.querySelector('.answer .token[tabindex]');"
            "token.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
            "return document.getElementById('tip').textContent })()"
        )
        assert tip.count("%") >= 4
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        assert browser.errors == []
        browser.picture(tmp_path / "page.png")
        browser.open(server.url, width=390, dark=True)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_it_asks_for_a_key_where_one_is_needed_and_shows_what_is_wrong(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    started = serving("r2-nano", "--chip", "cpu", "--api-key-file", str(keys))
    with started as running, browsing(tmp_path / "profile") as browser:
        browser.open(running.url)
        assert browser.run("document.getElementById('keyed').hidden")
        browser.run(ASK)
        assert "key is missing or wrong" in browser.wait_for("document.querySelector('.error')?.textContent")
        assert not browser.run("document.getElementById('keyed').hidden")
        browser.run("document.getElementById('key').value = 'secret';" + ASK)
        assert browser.wait_for(DONE.replace("querySelector('.facts')?", "querySelectorAll('.facts')[1]?"))


@needs_browser
def test_an_answer_can_be_stopped(tmp_path: Path) -> None:
    with serving("r2-nano", "--chip", "cpu") as running, browsing(tmp_path / "profile") as browser:
        browser.open(running.url)
        browser.run(ASK.replace("'60'", "'3000'"))
        browser.wait_for("document.querySelectorAll('.answer .token').length > 5")
        browser.run("document.getElementById('ask').requestSubmit()")
        assert "stopped" in browser.wait_for(DONE)
        browser.wait_for("true")
        assert running.metric("beringia_requests_open") == 0
