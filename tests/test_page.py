"""The page, in headless Chromium, against a server with a tiny model: pip install playwright, and Chromium on the path.

pytest -m soak tests/test_page.py
"""

import base64
import io
import shutil

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.served import HARMFUL, picture, png, wait

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path")]
# Of its own accord a browser looks for hosts that tests should not need.
QUIET = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

from tests.served import keys, model, running  # noqa: E402, F401 (fixtures)


@pytest.fixture
def page(running):  # noqa: F811
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB").new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None,
        )
        page.goto(running.url)
        yield page
        browser.close()
        assert not wrong


def states(page, name):
    return [card.get_attribute("data-state") for card in page.get_by_test_id(name).all()]


def test_it_draws_and_refuses(page, running):  # noqa: F811
    at = page.get_by_test_id
    wait(lambda: at("draw-size").locator("option").count() > 0)
    at("draw-prompt").fill("a red circle")
    at("draw-seed").fill("7")
    at("draw-prompt").press("Enter")
    wait(lambda: states(page, "draw-result") == ["done"])
    asked = running.client.images.generate(prompt="a red circle", extra_body={"seed": 7})
    drawn = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(asked.data[0].b64_json))).convert("RGB"))
    image = page.get_by_test_id("draw-result").first.locator("img")
    assert image.evaluate("image => image.naturalWidth") == drawn.shape[1]
    at("draw-prompt").fill(f"a lake {HARMFUL}")
    at("draw-prompt").press("Enter")
    wait(lambda: states(page, "draw-result") == ["refused"])
    playwright.expect(at("notice")).to_contain_text("living artist")
    at("tab-gallery").click()
    assert at("gallery-item").count() == 1


def test_it_edits_under_a_mask(page, running, monkeypatch):  # noqa: F811
    kept, add = [], running.engine._slots.add
    monkeypatch.setattr(
        running.engine._slots, "add", lambda request: kept.append(request.kept) or add(request)
    )
    at, side = page.get_by_test_id, running.side
    at("tab-edit").click()
    at("edit-file").set_input_files({"name": "in.png", "mimeType": "image/png", "buffer": png(picture(side))})
    at("edit-prompt").fill("a star")
    at("edit-canvas").scroll_into_view_if_needed()
    box = at("edit-canvas").bounding_box()
    where = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(*where(0.02, 0.02))
    page.mouse.down()
    page.mouse.move(*where(0.06, 0.04), steps=3)
    page.mouse.up()
    at("edit-button").click()
    wait(lambda: states(page, "edit-result") == ["done"])
    at("edit-clear").click()
    at("edit-button").click()
    wait(lambda: len(kept) == 2 and states(page, "edit-result") == ["done"])
    assert kept[0][0, 0] == -1 and (kept[0] >= 0).any() and kept[1] is None


def test_it_talks_and_takes_back(page):
    at = page.get_by_test_id
    at("tab-talk").click()
    for words in ("a red circle", "make it blue"):
        at("talk-box").fill(words)
        at("talk-send").click()
        wait(lambda: "Done" in page.locator("#talk-status").inner_text() and not at("talk-box").input_value())
    assert at("talk-turn").count() == 4
    at("talk-undo").click()
    wait(lambda: at("talk-turn").count() == 2)
    assert at("talk-box").input_value() == "make it blue"


def test_a_server_that_is_gone_is_said(page):
    at = page.get_by_test_id
    wait(lambda: at("draw-size").locator("option").count() > 0)
    page.context.set_offline(True)
    at("draw-prompt").fill("a red circle")
    at("draw-prompt").press("Enter")
    wait(lambda: states(page, "draw-result") == ["error"])
    playwright.expect(at("notice")).to_contain_text("did not answer")
