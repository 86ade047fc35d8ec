"""The page in a real browser, on the embedded base: compare, train, cancel, train again, compare, a damaged file."""

import os
import re
from pathlib import Path

import pytest

from gradio_app.page import build_page, serve
from gradio_app.settings import AppSettings
from gradio_app.state import App

from .conftest import PATIENCE, opened, playwright_api

expect = playwright_api().expect
# Pictures of the page are kept there when it is set.
SHOTS = os.environ.get("CERSA_APP_SHOTS")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(base_path, clip_path, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    os.environ["GRADIO_TEMP_DIR"] = str(work / "gradio")
    runs = tmp_path_factory.mktemp("runs")
    app = App.of(AppSettings((base_path,), (runs,), work, clip=str(clip_path)))
    page = build_page(app)
    _, address, _ = serve(page, app, host="127.0.0.1", port=None, auth=[], block=False)
    yield address
    app.jobs.close()
    page.close()
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as tab:
        yield tab


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"app-{name}.png", full_page=True)


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def train(page, pictures: list[Path], method: str, steps: int) -> str:
    """Starts a training; returns its name."""
    open_tab(page, "Train")
    before = set(page.locator("#jobs tbody td:first-child").all_inner_texts())
    page.locator("#pictures-upload input[type=file]").set_input_files(pictures)
    expect(page.locator("#pictures-upload")).to_contain_text(pictures[-1].name[:8], timeout=PATIENCE)
    page.get_by_label("Method").click()
    page.get_by_role("option", name=method, exact=True).click()
    page.get_by_label("Training steps").fill(str(steps))
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(len(before) + 1, timeout=PATIENCE)
    [name] = set(page.locator("#jobs tbody td:first-child").all_inner_texts()) - before
    return name


def expect_state(page, name: str, state: str) -> None:
    row = page.locator("#jobs tbody tr").filter(has_text=name)
    expect(row).to_contain_text(re.compile(state), timeout=PATIENCE)


def test_train_cancel_train_again_and_compare(page, browser, address, subject_path, tmp_path):
    pictures = sorted((subject_path / "instance").glob("*.png"))
    cancelled = train(page, pictures, "cersa", 60)
    lora = train(page, pictures, "lora", 2)
    expect_state(page, lora, "waiting, place 1")
    expect_state(page, cancelled, "running")
    other = browser.new_page()
    other.goto(address)
    open_tab(other, "Train")
    expect(other.locator("#job-progress")).to_contain_text(cancelled, timeout=PATIENCE)
    other.close()
    page.get_by_label("Training", exact=True).click()
    page.get_by_role("option", name=cancelled).click()
    page.get_by_role("button", name="Cancel").click()
    expect_state(page, cancelled, "stopped")
    expect_state(page, lora, "finished")
    finished = train(page, pictures, "cersa", 3)
    expect_state(page, finished, "finished")
    expect(page.locator("#previews img").first).to_be_visible(timeout=PATIENCE)
    shot(page, "train")
    open_tab(page, "Compare")
    for name in (finished, lora):
        page.get_by_label(name, exact=True).check()
    page.get_by_label("Seeds").fill("0")
    page.get_by_label("number input for Steps").fill("4")
    page.get_by_role("button", name="Draw", exact=True).press("Enter")
    expect(page.get_by_text("3 pictures, done")).to_be_visible(timeout=PATIENCE)
    images = page.locator("#compare-table img")
    expect(images).to_have_count(3)
    assert len({image.get_attribute("src") for image in images.all()}) == 3
    expect(page.locator("#compare-table")).to_contain_text("CLIPScore")
    assert "settings=" in page.url
    shot(page, "compare")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "compare-narrow")
    open_tab(page, "Train")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "train-narrow")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.get_by_label("Result").click()
    page.get_by_role("option", name=finished).click()
    with page.expect_download() as download:
        page.locator("#result-file").click()
    download.value.save_as(tmp_path / "taken-away.safetensors")
    open_tab(page, "Inspect")
    page.locator("#info-upload input[type=file]").set_input_files(tmp_path / "taken-away.safetensors")
    expect(page.locator("#info textarea")).to_have_value(re.compile("a 3d emoji of a sks robot"), timeout=PATIENCE)
    page.get_by_role("button", name="Look into the base").click()
    expect(page.locator("#inspect-plan textarea")).to_have_value(re.compile("CERSA"), timeout=PATIENCE)
    shot(page, "inspect")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "inspect-narrow")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(page.url.replace("%5B0%5D", "%5B7%5D"))
    expect(page.get_by_label("Seeds")).to_have_value("7", timeout=PATIENCE)
    expect(page.get_by_label(finished, exact=True)).to_be_checked()


def test_a_damaged_adapter_is_a_message_and_the_page_goes_on(page, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not an adapter")
    page.locator("#adapter-upload input[type=file]").set_input_files(damaged)
    note = page.locator("#adapter-note")
    expect(note).to_contain_text("damaged.safetensors", timeout=PATIENCE)
    assert "Traceback" not in note.inner_text() and "/tmp" not in note.inner_text()
    shot(page, "message")
    page.get_by_label("Seeds").fill("0")
    page.get_by_label("number input for Steps").fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text(re.compile("pictures?, done"))).to_be_visible(timeout=PATIENCE)


def test_everything_has_a_label_and_is_reached_by_keyboard(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select, button")]
            .filter((each) => each.offsetParent && each.type !== "hidden" && each.type !== "file")
            .filter((each) => !(each.labels?.length || each.ariaLabel || each.title || each.innerText?.trim()
                || each.getAttribute("aria-labelledby") || each.closest("label")))
            .map((each) => each.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.innerText?.trim() || document.activeElement.ariaLabel || ''"))
    assert {"Draw", "Stop"} <= reached
