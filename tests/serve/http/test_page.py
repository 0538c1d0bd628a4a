"""The page in headless Chromium, at a desk's width and at a phone's."""

import pytest

from ...browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(start):
    running = start(engine_pace=0.001, engine_context=256)
    for name, folder in (("law", "one"), ("code", "two")):
        running.engine.load(name, running.app.state.served.settings.packs_folder / folder)
    return running


@pytest.fixture(autouse=True)
def quiet_and_at_home(browser, served):
    """No error, and no request to another place."""
    browser.events.clear()
    yield
    assert browser.errors() == []
    assert all(url == "about:blank" or url.startswith("http://127.0.0.1:") for url in browser.requests())


def text_of(browser, selector):
    return browser.value(f"document.querySelector('{selector}').textContent")


def ask(browser, prompt):
    browser.value("document.querySelector('#prompt').focus()")
    browser.call("Input.insertText", text=prompt)
    browser.tap("#send")
    browser.wait_for("!document.querySelector('#send').disabled")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_its_window(browser, served, width, dark):
    browser.open(served.url, width=width, dark=dark)
    browser.value("document.querySelector('#settings').open = true")
    browser.tap("#experts")
    ask(browser, "a" * 60)
    browser.tap(".t")
    assert browser.value("document.documentElement.scrollWidth") <= width
    ink, paper = (browser.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == dark
    small = "[...document.querySelectorAll('button:not(.t), fieldset label')].filter((e) => e.offsetHeight)"
    assert browser.value(f"Math.min(...{small}.map((e) => e.offsetHeight))") >= 30


def test_a_chat_streams_and_is_remembered(browser, served):
    browser.open(served.url, width=390)
    assert text_of(browser, "#model") == "toy"
    ask(browser, "the <b>lamp</b>")
    assert text_of(browser, ".turn.user") == "the <b>lamp</b>"
    assert text_of(browser, ".turn.assistant").startswith("user: the <b>lamp</b>\nassistant: ")
    assert "tokens," in text_of(browser, "#speed")
    ask(browser, "more")
    prompt = served.engine.tokenizer.decode(served.engine.requests[-1].prompt)
    assert prompt.startswith("user: the <b>lamp</b>\nassistant: user: the")
    assert prompt.endswith("user: more\nassistant: ")
    browser.tap("#clear")
    assert browser.value("document.querySelector('#said').childElementCount") == 0


def test_packs_and_settings_are_sent(browser, served):
    browser.open(served.url)
    for pack in ("law", "code"):
        browser.tap(f"label[for='pack-{pack}']")
    browser.value("document.querySelector('#settings').open = true")
    browser.value("document.querySelector('#max-tokens').value = 3; document.querySelector('#seed').value = 5")
    browser.tap("label[for='mode-completion']")
    ask(browser, "the lamp")
    request = served.engine.requests[-1]
    assert request.packs == ("law", "code")
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.temperature) == (3, 5, 0.8)
    assert text_of(browser, ".turn .given") == "the lamp"
    assert text_of(browser, ".turn .end") == " [most tokens reached]"


def test_a_tap_on_a_token_shows_its_experts(browser, served):
    browser.open(served.url)
    browser.tap("label[for='mode-completion']")
    browser.tap("#experts")
    ask(browser, "the lamp")
    browser.tap(".t")
    token = served.engine.requests[-1].prompt[0]
    assert text_of(browser, ".layer h3") == "model.layers.1.ffw"
    assert text_of(browser, ".chips li") == f"{token} · 0.750"
    assert browser.value("document.querySelectorAll('.t[aria-pressed=\"true\"]').length") == 1


def test_an_answer_can_be_stopped(browser, served, monkeypatch):
    monkeypatch.setattr(served.engine, "pace", 0.1)
    browser.open(served.url)
    browser.value("document.querySelector('#prompt').focus()")
    browser.call("Input.insertText", text="the lamp")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.turn.assistant')?.textContent.length > 2")
    browser.tap("#stop")
    browser.wait_for("document.querySelector('.turn .end')?.textContent === ' [stopped]'")
    assert served.engine.drain(5)
    assert served.engine.finished["cancelled"] == 1
    served.engine._draining = False


def test_a_key_is_asked_for_and_kept_in_the_tab(browser, start):
    locked = start(api_keys=("secret",))
    browser.open(locked.url)
    assert not browser.value("document.querySelector('#locked').hidden")
    assert "needs a key" in text_of(browser, "#problem")
    browser.value("document.querySelector('#key').value = 'secret'")
    browser.tap("#unlock button")
    browser.wait_for("document.querySelector('#locked').hidden")
    browser.open(locked.url)
    assert browser.value("document.querySelector('#locked').hidden")
    browser.events[:] = [event for event in browser.events if " 401 " not in str(event)]
    browser.value("sessionStorage.clear()")


def test_what_goes_wrong_is_said(browser, served, monkeypatch):
    monkeypatch.setattr(served.engine, "fail", "the numbers are not finite")
    browser.open(served.url)
    ask(browser, "the lamp")
    assert text_of(browser, "#problem") == "the numbers are not finite"
    assert not browser.value("document.querySelector('#problem').hidden")
