"""The command line of the page: who may log in, started as a user starts it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest

from cersa_diffusion.pipelines.draw import DRAWING_DTYPES
from gradio_app.app import parse_arguments

from .test_server import fetch

SCRIPT = Path(__file__).resolve().parents[2] / "gradio_app" / "app.py"


def started(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=os.environ | environment, text=True, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("name", DRAWING_DTYPES)
def test_every_dtype_for_drawing_can_be_chosen(name):
    assert parse_arguments(["--dtype", name]).dtype == name
    assert parse_arguments([]).dtype == "auto"


@pytest.mark.parametrize("line", ["me", ":word", "me:", ""])
def test_a_file_of_other_lines_is_refused(tmp_path, line):
    file = tmp_path / "users"
    file.write_text(line)
    process = started("--auth-file", str(file))
    assert str(file) in process.communicate(timeout=120)[1] and process.returncode == 2


def test_passwords_come_from_a_file_and_the_environment(tmp_path, models_dir):
    file = tmp_path / "users"
    file.write_text("one:first word\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = ("--models-dir", str(models_dir), "--runs-dir", str(tmp_path / "runs"), "--clip", "none", "--port", str(port))
    process = started(*folders, "--auth-file", str(file), CERSA_APP_AUTH="two:second")
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, process.stderr.read()
            try:
                assert fetch(address, "config")[0] == 401
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        for body, status in ((b"username=one&password=first+word", 200), (b"username=two&password=second", 200),
                             (b"username=one&password=second", 400)):  # fmt: skip
            assert fetch(address, "login", body)[0] == status
    finally:
        process.terminate()
        process.communicate(timeout=120)
