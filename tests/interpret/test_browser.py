"""The page in headless Chromium, at a desk's width and at a phone's."""

import pytest

from peerlm.interpret import inspect

from ..browser import CHROMIUM, Browser

MINUS = "\u2212"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package chromium")


@pytest.fixture(scope="module")
def page(saved, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    inspect(saved, text, output=path, context=16, shown=40, edits=6, progress=False)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def quiet_and_offline(browser, page):
    """No error, and no request but for the page itself."""
    browser.events.clear()
    yield
    assert browser.errors() == []
    assert all(url.partition(":")[0] in ("about", "file") for url in browser.requests())
    assert {url.partition("#")[0].rpartition("/")[2] for url in browser.requests()} <= {"about:blank", "page.html"}


def text_of(browser, selector):
    return browser.value(f"document.querySelector('{selector}').textContent")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 375])
def test_it_fits_its_window(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert (
        browser.value(
            "[...document.querySelectorAll('section')].filter((s) => s.id !== 'found' && !s.offsetHeight).length"
        )
        == 0
    )
    ink, paper = (browser.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == dark
    assert browser.value(
        "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 8, 8).data.some((v) => v)"
    )


def test_text_is_shown_as_text(browser, page, text):
    browser.open(page)
    assert browser.value("document.title") == "model <b>: experts"
    assert text_of(browser, "h1") == "model <b>: experts"
    strip = text_of(browser, "#strip").replace("⏎\n", "\n").replace("·", "")
    assert strip.removeprefix("<|endoftext|>") in text.read_text(encoding="utf-8")
    assert len(strip) > 30
    browser.value(
        "(() => { const q = document.querySelector('#query'); q.value = '<'; q.dispatchEvent(new Event('input')); })()"
    )
    assert browser.value("document.querySelectorAll('script').length") == 2


def test_a_tap_on_a_token_shows_its_experts(browser, page):
    browser.open(page, width=375)
    browser.tap(".t[data-place='7']")
    assert "number 7 of" in text_of(browser, "#token-body")
    assert browser.value("document.querySelectorAll('#token-body tbody tr').length") > 0
    rows = "[...document.querySelectorAll('#token-body tbody tr')]"
    cells = rows + ".map((r) => [1, 2, 3].map((c) => r.cells[c].innerText))"
    strength = [[float(cell.split()[-1].replace(MINUS, "-")) for cell in row] for row in browser.value(cells)]
    for weight, activation, product in strength:
        assert product == pytest.approx(weight * activation, rel=0.02)
    assert "token=7" in browser.value("location.hash")
    assert browser.value("document.querySelector('.t[data-place=\"7\"]').getAttribute('aria-pressed')") == "true"


def test_keys_move_along_the_text_and_the_grid(browser, page):
    browser.open(page, "#layer=1&token=3")
    browser.value("document.querySelector('.t[data-place=\"3\"]').focus()")
    browser.press("ArrowRight")
    assert "number 4 of" in text_of(browser, "#token-body")
    assert browser.value("document.activeElement.dataset.place") == "4"
    browser.value("document.querySelector('#use canvas').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert "i 1, j 1: expert 9" in text_of(browser, "#use .readout")
    browser.press("Enter")
    assert "expert=9" in browser.value("location.hash")
    assert "sub-keys (1, 1)" in text_of(browser, "#expert-body")


def test_an_address_opens_a_layer_and_an_expert(browser, page):
    browser.open(page, "#layer=2&expert=11")
    assert browser.value("document.querySelector('#layers input:checked').id") == "layer-1"
    assert "11 of 64 in layer 2 · sub-keys (1, 3)" in text_of(browser, "#expert-body")
    browser.value("location.hash = '#layer=1&expert=999'")
    browser.wait_for("document.querySelector('#expert-body').textContent.includes('Layer 1 has no expert 999')")
    browser.value("document.querySelector('#layer-1').click()")
    assert "layer=2" in browser.value("location.hash")


def test_search_finds_tokens_and_experts(browser, page):
    browser.open(page)
    assert browser.value("document.querySelector('#found').hidden")
    browser.value("document.querySelector('#query').focus()")
    browser.call("Input.insertText", text="keeper")
    found = text_of(browser, "#found-body")
    assert "2 of " in found
    assert "Experts that make it likelier" in found
    assert browser.value("document.querySelectorAll('.t.found').length") == 2
    assert browser.value("document.querySelectorAll('#found-body a').length") > 1


def test_a_click_knocks_an_expert_out(browser, page):
    browser.open(page)
    before = browser.value("document.querySelector('#tint').value")
    browser.tap("#edits-body table button")
    assert before == "loss"
    assert browser.value("document.querySelector('#tint').value") == "edit"
    shown = text_of(browser, "#edits-body")
    assert "Knock out expert" in shown
    assert "nats per token" in shown
    assert browser.value("document.querySelectorAll('.t[style*=\"rgba\"]').length") > 0
    browser.tap("#edits-body table button[aria-pressed='true']")
    assert "Knock out expert" not in text_of(browser, "#edits-body p")


def test_a_page_of_a_single_token_of_a_memory_works(browser, tokenizer, text, new_model, tmp_path):
    model = new_model("pkm", vocab_size=len(tokenizer), num_values=150**2, pairing="shells")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    inspect(tmp_path / "model", text, output=tmp_path / "page.html", limit=2, shown=1, edits=1, progress=False)
    browser.open(tmp_path / "page.html", "#layer=1&expert=1")
    assert "product-key memory" in text_of(browser, "#use-body")
    assert "each cell 2 \u00d7 2" in text_of(browser, "#use-body")
    assert "never retrieved in this text" in text_of(browser, "#expert-body")
    assert "None was measured" in text_of(browser, "#edits-body")
