"""The demo removes nothing but earlier demos."""

import runpy
import sys

import pytest

from ..conftest import REPOSITORY, assert_named

SCRIPT = REPOSITORY / "scripts" / "demo.py"


@pytest.fixture
def demo(monkeypatch):
    """Runs the script with these arguments."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_a_folder_that_is_not_of_the_demo_is_refused_untouched(demo, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "holidays").mkdir(parents=True)
    (folder / "holidays" / "beach.png").write_bytes(b"a picture")
    with pytest.raises(SystemExit) as stopped:
        demo("--output", folder)
    assert "--output" in str(stopped.value) and str(folder) in str(stopped.value)
    assert [path.name for path in folder.iterdir()] == ["holidays"]
    assert (folder / "holidays" / "beach.png").read_bytes() == b"a picture"


def test_a_file_is_refused(demo, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        demo("--output", tmp_path / "notes")
    assert "--output" in str(stopped.value) and (tmp_path / "notes").read_text() == "mine"


def test_nothing_to_draw_again_is_one_line(demo, tmp_path):
    folder = tmp_path / "demo"
    (folder / "cersa").mkdir(parents=True)
    (folder / "cersa" / "result.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        demo("--output", folder, "--redraw")
    assert_named(stopped.value.code, "--redraw", *(str(folder / method / "result.json") for method in ("lora", "full")))
    assert "\n" not in stopped.value.code and str(folder / "cersa") not in stopped.value.code


def test_an_earlier_demo_is_replaced(tmp_path):
    folder = tmp_path / "outputs" / "demo"
    clear_output = runpy.run_path(str(SCRIPT))["clear_output"]
    clear_output(folder)
    made = {path.name for path in folder.iterdir()}
    (folder / "cersa").mkdir()
    (folder / "cersa" / "result.json").write_text("{}")
    (folder / "table.md").write_text("old")
    # A link in it is removed, and not what it leads to.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes").write_text("mine")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    clear_output(folder)
    assert {path.name for path in folder.iterdir()} == made
    assert (tmp_path / "elsewhere" / "notes").read_text() == "mine"
