"""What the page shows when something goes wrong, and which file it hands out, in a real browser on the smallest base."""

import re

import pytest
from safetensors import safe_open

from .conftest import PATIENCE, opened, playwright_api

expect = playwright_api().expect
RUN = "trained: cat-cersa"

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, server):
    with opened(browser, server[0]) as tab:
        yield tab


def choose(page, field: str, option: str) -> None:
    page.get_by_label(field, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def downloaded(page, folder) -> tuple[str, set[str]]:
    """Name and keys of the LoRA that the page offers."""
    with page.expect_download() as download:
        page.locator("#lora-file").click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    with safe_open(file, "pt") as opened_file:
        return file.name, set(opened_file.keys())


def test_the_lora_that_is_downloaded_is_the_one_that_is_chosen(page, server, tmp_path):
    _, app = server
    page.get_by_role("tab", name="Train").click()
    choose(page, "Result", RUN)
    make, download = page.locator("#export-lora"), page.locator("#lora-file")
    rank = page.get_by_label("number input for Rank of the LoRA")
    rank.fill("4")
    rank.press("Tab")
    expect(make).to_be_enabled()
    expect(download).to_be_disabled()
    make.click()
    expect(download).to_be_enabled(timeout=PATIENCE)
    name, keys = downloaded(page, tmp_path)
    assert name == "trained cat-cersa-lora-r4-diffusers.safetensors" and all(".lora_" in key for key in keys)

    kohya = "kohya (ComfyUI, A1111, Forge)"
    choose(page, "Keys of the LoRA", kohya)
    expect(download).to_be_disabled()
    with app.store.loading:  # what loads a base waits: the LoRA is being made
        make.click()
        expect(page.locator("#lora-note")).to_contain_text("making")
        expect(download).to_be_disabled()
    expect(download).to_be_enabled(timeout=PATIENCE)
    name, keys = downloaded(page, tmp_path)
    assert name == "trained cat-cersa-lora-r4-kohya.safetensors" and all(key.startswith("lora_") for key in keys)

    rank.fill("5")
    rank.press("Tab")
    expect(download).to_be_disabled()
    with app.store.loading:
        make.click()
        expect(page.locator("#lora-note")).to_contain_text("making")
        rank.fill("6")
        rank.press("Tab")
    expect(page.locator("#lora-note")).to_have_text("", timeout=PATIENCE)
    expect(download).to_be_disabled()


def test_messages_cover_nothing(page, tmp_path, subject_path):
    plates = page.locator(".wrap:not(.hide) > span.error:visible")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not an adapter")
    page.locator("#adapter-upload input[type=file]").set_input_files(damaged)
    expect(page.locator("#adapter-note")).to_contain_text("damaged.safetensors")
    page.get_by_label("Prompts").fill("")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#compare-status")).to_contain_text("prompts")
    expect(plates).to_have_count(0)

    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#start-note")).to_contain_text("0 pictures", timeout=PATIENCE)
    pictures = sorted((subject_path / "instance").glob("*.png"))
    page.locator("#pictures-upload input[type=file]").set_input_files(pictures)
    shown = page.locator("#pictures-upload").get_by_text(re.compile(pictures[0].name[:8])).first
    expect(shown).to_be_visible()
    # Nothing lies over it: a click reaches it.
    shown.click(trial=True)
    expect(plates).to_have_count(0)

    page.get_by_role("tab", name="Inspect").click()
    page.locator("#info-upload input[type=file]").set_input_files(damaged)
    expect(page.locator("#info-note")).to_contain_text("damaged.safetensors")
    expect(plates).to_have_count(0)


def test_a_drawing_that_is_stopped_while_it_waits_says_so(page, server):
    _, app = server
    page.get_by_label("Seeds").fill("0")
    with app.store.lease(app.library.base("small")):
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator("#compare-status")).to_contain_text(re.compile("waiting|0 of"))
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#compare-status")).to_have_text("stopped")
