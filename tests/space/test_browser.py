"""The page as people use it, in a real browser."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: the page is not tested")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser is tested")

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-background-networking"]
BEEPS = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]  # Chromium's own microphone
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: the page is not tested in a browser")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *BEEPS])
        yield opened
        opened.close()


GARBAGE = "Waveform load error"  # what the browser itself says of a file that it cannot play


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page on a phone; it must ask nobody else for anything, and have no errors but those of garbage."""
    opened = browser.new_page(viewport=PHONE)
    opened.set_default_timeout(40_000)
    errors: list[str] = []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: errors.append(request.url) if _leaves(request.url, address) else None)
    opened.goto(address)
    opened.get_by_role("button", name="Analyze").wait_for()
    yield opened
    opened.close()
    assert not [error for error in errors if not error.startswith(GARBAGE)]


def _leaves(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


@pytest.fixture
def recording(request: pytest.FixtureRequest) -> Path:
    """A real recording where there is one."""
    try:
        folder = request.getfixturevalue("real_icbhi") / "ICBHI_final_database"
    except pytest.skip.Exception:
        return Path(__file__).parents[2] / "space" / "sounds" / "simulated_crackles.flac"
    return next(folder.glob("101_1b1_Pr_*.wav"))


def upload(page: Any, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_label("Clear").first.wait_for()


def analyze(page: Any) -> str:
    page.get_by_role("button", name="Analyze").click()
    page.locator("#verdict strong").wait_for()
    return page.locator("#verdict").inner_text()


def test_a_recording_is_uploaded_listened_to_moved_and_downloaded(page, recording, tmp_path):
    upload(page, recording)
    analyze(page)
    page.get_by_role("img", name=re.compile("Waveform, mel spectrogram and probabilities")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

    slider = page.get_by_label("range slider for Operating point")
    slider.fill("0.01")  # everything is marked
    page.get_by_text("At 0.01, on 50 validation patients").wait_for()
    said = page.locator("#verdict strong").inner_text()
    assert "marked in" in said
    assert page.locator("#figure .q-marks .q-span").count() > 0

    player = page.locator("#player audio")
    assert player.evaluate("a => new Promise(done => a.play().then(() => done(a.duration)))") > 0
    assert player.get_attribute("aria-label").startswith("1: ")
    page.get_by_role("button", name="Show where the model looked").click()
    page.get_by_role("img", name=re.compile("Attention over the spectrogram")).wait_for()

    rows = list(csv.DictReader(download(page, "Places as CSV", tmp_path).read_text().splitlines()))
    assert len(rows) == page.locator("#figure .q-marks .q-span").count()
    assert float(rows[0]["start_s"]) == 0.0
    assert json.loads(download(page, "Everything as JSON", tmp_path).read_text())["threshold"] == 0.01

    assert not page.get_by_label("number input for Operating point").is_visible(), "what is typed may be no number"
    slider.fill("0.99")
    page.get_by_text("At 0.99").wait_for()
    assert page.locator("#verdict strong").inner_text() != said
    assert page.locator("#figure .q-marks .q-span").count() == 0
    assert not page.locator("#player audio").is_visible()

    page.get_by_role("button", name="Simulated crackles").click()
    page.get_by_text("The result appears here.").wait_for()  # what stood there was of the recording before
    assert not page.locator("#figure").is_visible()


def download(page: Any, name: str, folder: Path) -> Path:
    with page.expect_download() as started:
        page.get_by_role("link", name=name).click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def test_the_microphone_is_recorded_and_analyzed(page, tmp_path):
    page.context.grant_permissions(["microphone"])
    page.get_by_label("Record audio").first.click()
    page.locator("button.record-button, button.record").first.click()
    page.locator("time.duration", has_text="0:03").wait_for()  # a busy machine starts late
    with page.expect_event("requestfinished", lambda request: "/upload" in request.url):
        page.locator("button.stop-button, button.stop-button-paused").first.click()
    page.get_by_label("Clear").first.wait_for()
    assert re.search("marked|can’t tell", analyze(page))
    content = json.loads(download(page, "Everything as JSON", tmp_path).read_text())
    assert 2.5 < content["duration"] < 6.0


def test_nothing_and_garbage_are_answered_in_words_and_the_page_lives_on(page, recording, tmp_path):
    assert "There is no recording yet" in analyze(page)
    (tmp_path / "garbage.flac").write_bytes(b"not a sound " * 100)
    with page.expect_event("requestfinished", lambda request: "/upload" in request.url):
        page.locator("input[type=file]").first.set_input_files(tmp_path / "garbage.flac")
    page.get_by_role("button", name="Analyze").click()
    page.get_by_text("garbage.flac cannot be read as audio").wait_for()
    assert page.get_by_role("status").filter(has_text="garbage.flac").count() == 1
    page.reload()
    upload(page, recording)
    assert "in" in analyze(page)


def test_two_recordings_are_compared(page, recording):
    page.get_by_role("tab", name="Compare").click()
    panel = page.locator("#compare")
    panel.get_by_role("button", name="Compare").wait_for()
    for file in reversed(panel.locator("input[type=file]").all()):  # one that has its file is gone
        file.set_input_files(recording)
    panel.get_by_label("Clear").nth(1).wait_for()
    panel.get_by_role("button", name="Compare").click()
    page.get_by_role("row", name=re.compile("any abnormal sound")).wait_for()
    cells = page.get_by_role("row", name=re.compile("any abnormal sound")).get_by_role("cell").all_inner_texts()
    assert cells[1] == cells[2]
    assert page.locator("#first figure").count() == page.locator("#second figure").count() == 1


def test_keyboard_and_names(page):
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("note").filter(has_text="Not a medical device").is_visible()
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("(document.activeElement.ariaLabel || document.activeElement.innerText || '').trim()")
        )
    assert {"Recording", "Simulated crackles", "Analyze"} <= reached
    page.get_by_role("button", name="Simulated crackles").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Clear").first.wait_for()
    page.get_by_role("button", name="Analyze").focus()
    page.keyboard.press("Enter")
    page.locator("#verdict strong").wait_for()
    named = "e => (e.ariaLabel || e.innerText || e.title || e.labels?.[0]?.innerText || '').trim() !== ''"
    for element in page.locator("button:visible, input:visible, select:visible, audio:visible, a:visible").all():
        assert element.evaluate(named), element.evaluate("e => e.outerHTML.slice(0, 200)")
