"""The running server: what it refuses to give out, and ten visitors at once."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from gradio_client import Client

from gradio_app.comparing import SCHEDULERS, UNTOUCHED

RUN = "trained: cat-cersa"


def fetch(address: str, path: str, data: bytes | None = None, **headers) -> tuple[int, bytes]:
    request = urllib.request.Request(f"{address}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def form(client: Client, **changes) -> list:
    """What the Compare tab sends."""
    values = {
        "base": "small", "columns": [UNTOUCHED, RUN], "prompts": "a cat", "negative": "", "seeds": "0, 1", "steps": 1,
        "guidance": 4, "scheduler": next(iter(SCHEDULERS)), "token": "sks",
    } | changes  # fmt: skip
    return [*values.values(), *[1.0] * 6]


def test_no_file_of_the_host_is_served(server, tmp_path):
    address, app = server
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    run = app.library.runs()[RUN].weights_path
    base = Path(app.library.base("small").source) / "model_index.json"
    here = Path(__file__).resolve()
    for path in (secret, run, base, here, here.parents[2] / "pyproject.toml", Path("/etc/passwd"), Path("/proc/self/environ")):
        relative = "../" * 12 + str(path).lstrip("/")
        work = f"{app.settings.work_dir}/gradio/x/../../../{path.name}"
        for form_of_path in (str(path), relative, f"file://{path}", f".{path}", work, str(path).replace("/", "//")):
            for written in (form_of_path, quote(form_of_path, safe=""), quote(quote(form_of_path, safe=""))):
                for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
                    status, content = fetch(address, route + written)
                    assert status >= 400 or content not in (path.read_bytes(), b"secret"), (route, written)


def test_the_server_fetches_nothing_for_visitors(server):
    address, _ = server
    for target in (address, "http://169.254.169.254/", "https://example.org/", "HTTP://localhost"):
        for written in (target, quote(target, safe=""), quote(quote(target, safe=""), safe="")):
            for route in ("gradio_api/file=", "gradio_api/proxy="):
                status, _ = fetch(address, route + written)
                assert status >= 400


def test_ten_visitors_get_their_pictures_in_order(server):
    address, app = server
    held = []

    def visit(number: int) -> list[str]:
        client = Client(address, verbose=False)
        job = client.submit(*form(client, prompts=f"a cat {number}"), api_name="/compare")
        status = [output[0] for output in job]
        held.append(app.store.held())
        assert f"a cat {number}" in job.outputs()[-2][1]
        return [text if isinstance(text, str) else text.get("value") for text in status]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(visit, range(10)))
    expected = ["0 of 4 pictures", "1 of 4 pictures", "2 of 4 pictures", "3 of 4 pictures", "4 of 4 pictures", "4 pictures, done"]
    assert answers == [expected] * 10 and max(held) <= app.settings.max_pipelines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["../../etc"]}, "no run named"),
        ({"base": "/etc"}, "no base named"),
        ({"seeds": "x"}, "seeds"),
        ({"prompts": ""}, "prompts"),
        ({"steps": 1000}, "steps"),
    ],
)
def test_what_is_wrong_is_a_message(server, changes, message):
    address, _ = server
    client = Client(address, verbose=False)
    with pytest.raises(Exception) as raised:
        client.predict(*form(client, **changes), api_name="/compare")
    assert "Traceback" not in str(raised.value)


def test_a_sweep_and_its_download(server):
    address, _ = server
    client = Client(address, verbose=False)
    job = client.submit(RUN, *form(client), api_name="/sweep")
    *_, last = list(job)
    assert last[0] == "7 pictures, done"
    shared = json.loads(next(iter(job.outputs()))[3])
    assert shared["base"] == "small" and shared["seeds"] == [0, 1]


def test_the_password_is_asked_for(app, settings, monkeypatch):
    from gradio_app.page import build_page, serve

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(settings.work_dir / "gradio"))
    page = build_page(app)
    _, address, _ = serve(page, app, host="127.0.0.1", port=None, auth=[("me", "word")], block=False)
    try:
        for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            assert fetch(address.rstrip("/"), path)[0] in (401, 403)
    finally:
        page.close()
