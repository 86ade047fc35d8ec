"""scripts/compare_methods.py as a user starts it: a whole comparison in real processes, killed on the way; and bad options."""

import os
import runpy
import signal
import subprocess
import sys
import time
import warnings

import pytest

from ..conftest import REPOSITORY, run_script
from ..study.conftest import materials, study_file  # noqa: F401 (fixtures)

SCRIPT = "scripts/compare_methods.py"
TABLES = ("table.md", "table.csv", "table.json")


@pytest.mark.slow
def test_killed_on_the_way_and_started_again_gives_the_table_of_an_undisturbed_run(study_file, tmp_path):  # noqa: F811
    arguments = [SCRIPT, study_file(), "--subjects", "my-cat", "--rows", "cersa-.9", "--seeds", "1", "--output"]
    whole = run_script(*arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "| cersa-.9 |" in whole.stdout and "2/2" in whole.stderr and "report.html" in whole.stdout

    output = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments), str(output)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not (output / "cells/my-cat/base/test.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command" in said
    assert not (output / "table.md").exists()
    again = run_script(*arguments, output)
    assert again.returncode == 0, again.stderr
    for name in TABLES:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_bad_study_is_one_line_and_nothing_is_written(study_file, monkeypatch, tmp_path):  # noqa: F811
    path = study_file("bad-script.toml", base="/no/such/base")
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(path), "--output", str(tmp_path / "out")])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / SCRIPT), run_name="__main__")
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == f"error: study {path}: /no/such/base: no such folder, and not the form of a hub id (owner/name)"
    assert not (tmp_path / "out").exists()
