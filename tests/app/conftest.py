"""A page over the smallest base with three trained runs, as objects and as a running server."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from cersa_diffusion.training import DreamBoothConfig, train_dreambooth

from ..pipelines_small import SIZE, pipeline

# The page is an extra.
if find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from gradio_app.page import build_page, serve
    from gradio_app.settings import AppSettings
    from gradio_app.state import App

PROMPT = "a cat"
METHODS = ("cersa", "lora", "full")
PATIENCE = 600_000  # milliseconds; a slow machine is no failure
# Set to "required" where a browser has to be there: what would be skipped for want of one fails.
BROWSER_REQUIRED = os.environ.get("CERSA_TEST_BROWSER") == "required"
# Chromium refuses root with its sandbox on; the rest keeps it from looking for a GPU and for its maker's servers.
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipeline("sd1").save_pretrained(folder / "small")
    return folder


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory, models_dir, subject_path) -> Path:
    folder = tmp_path_factory.mktemp("trained", numbered=False)
    for method in METHODS:
        AcceleratorState._reset_state(reset_partial_state=True)
        train_dreambooth(
            DreamBoothConfig(
                pretrained_model_name_or_path=str(models_dir / "small"),
                instance_data_dir=str(subject_path / "instance"),
                instance_prompt=PROMPT,
                output_dir=str(folder / f"cat-{method}"),
                method=method,
                resolution=SIZE,
                max_train_steps=2,
                train_batch_size=1,
                learning_rate=1e-2,
            ),
            [],
        )
    return folder


def settings_in(folder: Path, models_dir: Path, runs_dir: Path):
    """New runs go into an empty folder; those that are trained already lie in the second one."""
    new = folder / "new-runs"
    new.mkdir()
    return AppSettings((models_dir,), (new, runs_dir), folder / "work", max_pipelines=2)


@pytest.fixture
def settings(models_dir, runs_dir, tmp_path):
    return settings_in(tmp_path, models_dir, runs_dir)


@pytest.fixture
def app(settings):
    return App.of(settings)


@pytest.fixture(scope="module")
def server(models_dir, runs_dir, tmp_path_factory):
    """(address, app) of a running page."""
    app = App.of(settings_in(tmp_path_factory.mktemp("server"), models_dir, runs_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(app.settings.work_dir / "gradio"))
        page = build_page(app)
        _, address, _ = serve(page, app, host="127.0.0.1", port=None, auth=[], block=False)
        yield address.rstrip("/"), app
        page.close()


def wait_for(condition, queue, seconds: float = 120.0) -> None:
    """Waits until a condition on a queue's jobs holds."""
    deadline = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition({job.name: (job, place) for job, place in queue.jobs()}):
            return
        deadline.wait(0.05)
    raise AssertionError(f"waited in vain: {[(job.name, job.state, job.message) for job, _ in queue.jobs()]}")


def playwright_api():
    """playwright's module; without it the tests of a module are skipped, where a browser is not required."""
    return import_module("playwright.sync_api") if BROWSER_REQUIRED else pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, or the one that playwright has installed."""
    with playwright_api().sync_playwright() as playwright:
        installed = Path(playwright.chromium.executable_path)
        program = str(installed) if installed.exists() else shutil.which("chromium") or shutil.which("chromium-browser")
        if program is None:
            missing = "needs chromium: apt-get install chromium, or playwright install chromium"
            (pytest.fail if BROWSER_REQUIRED else pytest.skip)(missing)
        started = playwright.chromium.launch(executable_path=program, args=BROWSER_ARGUMENTS)
        yield started
        started.close()


@contextmanager
def opened(browser, address: str) -> Iterator:
    """A tab of 1280 pixels with the page; no script of it may fail, and nothing that it asks for may be refused."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, complaints = context.new_page(), []
    tab.set_default_timeout(PATIENCE)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("response", lambda answer: complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    tab.goto(address)
    tab.get_by_role("button", name="Draw", exact=True).wait_for()
    yield tab
    context.close()
    assert not complaints
