"""What the running server refuses: foreign names and pages, other addresses, what is too much, and what it has no use for."""

import http.client
import json
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from gradio_client import Client

from cersa_diffusion.errors import ConfigError
from gradio_app.hosts import Hosts
from gradio_app.page import build_page, serve
from gradio_app.private_folder import PrivateFolder
from gradio_app.settings import Limits
from gradio_app.state import App

from ..conftest import raises
from .conftest import settings_in
from .test_server import form

ROUTES = (
    "/",
    "/config",
    "/gradio_api/info",
    "/gradio_api/queue/status",
    "/theme.css",
    "/gradio_api/file=/x",
    "/gradio_api/startup-events",
)


def request(address: str, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, bytes, dict]:
    """(status, content, headers) of an answer; headers are sent as they are given, Host as well."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    lengths = {} if body is None or "Content-Length" in headers else {"Content-Length": str(len(body))}
    for name, value in (headers | lengths).items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    if answer.getheader("Content-Type", "").startswith("text/event-stream"):
        return answer.status, b"", dict(answer.getheaders())
    return answer.status, answer.read(), dict(answer.getheaders())


def post(address: str, path: str, body, **headers) -> tuple[int, bytes]:
    return request(address, "POST", path, json.dumps(body).encode(), Content_Type="application/json", **headers)[:2]


def join(address: str, body: dict, **headers) -> tuple[int, bytes]:
    return post(address, "/gradio_api/queue/join", {"data": [], "fn_index": 0, "session_hash": "visitor"} | body, **headers)


def event_of(address: str, element: str, kind: str = "click") -> dict:
    """What happens on the server when something is done to an element of the page."""
    config = json.loads(request(address, "GET", "/config")[1])
    [number] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == element]
    return next(event for event in config["dependencies"] if event["backend_fn"] and [number, kind] in event["targets"])


def upload(address: str, size: int, name: str) -> tuple[int, bytes]:
    """(status, content) of an upload of about so many bytes."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + name.encode() * (size // len(name)) + b"\r\n--b--\r\n"
    return request(address, "POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=b")[:2]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost@evil.example", "[::2]", ""]
)
def test_a_foreign_name_is_refused_everywhere(server, host):
    address, _ = server
    for path in ROUTES:
        assert request(address, "GET", path, Host=host)[0] == 403, path
    assert join(address, {}, Host=host)[0] == 403
    assert request(address, "POST", "/gradio_api/upload", b"x", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:1234", "[::1]:7860"])
def test_the_server_s_own_names_are_not(server, host):
    address, _ = server
    assert request(address, "GET", "/config", Host=host)[0] == 200


def test_pages_of_other_origins_are_refused(server):
    address, _ = server
    port = address.rpartition(":")[2]
    for origin in ("http://evil.example", "null", "http://localhost:1", f"http://localhost:{port}", "http://127.0.0.1"):
        for answer in (join(address, {}, Origin=origin), request(address, "POST", "/gradio_api/upload", b"x", Origin=origin)):
            assert answer[0] == 403, origin
        assert request(address, "GET", "/config", Origin=origin)[0] == 403
    assert request(address, "GET", "/config", Origin=address)[0] == 200


@pytest.mark.parametrize(
    ("listened", "allowed", "host", "origin", "answered"),
    [
        ("0.0.0.0", (), "192.168.1.7:7860", "http://192.168.1.7:7860", True),
        ("0.0.0.0", (), "machine.lan:7860", None, False),
        ("0.0.0.0", ("machine.lan",), "machine.lan:7860", "http://machine.lan:7860", True),
        ("192.168.1.7", (), "192.168.1.7:7860", None, True),
        ("192.168.1.7", (), "192.168.1.8:7860", None, False),
        # Behind a proxy that passes the Host on, and behind one that replaces it.
        ("127.0.0.1", ("pictures.example",), "pictures.example", "https://pictures.example", True),
        ("127.0.0.1", ("pictures.example",), "127.0.0.1:7860", "https://pictures.example", True),
        ("127.0.0.1", ("pictures.example",), "127.0.0.1:7860", "https://evil.example", False),
    ],
)
def test_names_are_those_of_the_command_line(listened, allowed, host, origin, answered):
    headers = {b"host": host.encode()} | ({b"origin": origin.encode()} if origin else {})
    assert (Hosts(listened, allowed).refusal(headers) is None) == answered


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file/http://127.0.0.1/x", "/gradio_api/file=http://127.0.0.1/x", "/gradio_api/proxy=http://127.0.0.1/x",
        "/gradio_api/file=hTTps://a.hf.space/x", "/gradio_api/runs", "/gradio_api/run-history/buckets", "/monitoring",
        "/monitoring/summary", "/gradio_api/openapi.json", "/gradio_api/vibe-code/", "/gradio_api/dev/reload",
        "/gradio_api/custom_component/x/client/component/y", "/gradio_api/deep_link", "/gradio_api/profiling/summary",
    ],
)  # fmt: skip
def test_what_the_page_has_no_use_for_is_not_there(server, path):
    address, _ = server
    assert request(address, "GET", path)[0] in (403, 404)
    assert post(address, path, {})[0] in (403, 404)


def test_websockets_are_refused(server):
    address, _ = server
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "x" * 22 + "==",
    }
    assert request(address, "GET", "/gradio_api/queue/join", **headers)[0] >= 400


def test_an_address_or_a_path_in_the_place_of_an_upload_is_refused(server, runs_dir):
    address, app = server
    outside = str(runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors")
    missing = str(app.folder.uploads / "missing.safetensors")
    dependencies = json.loads(request(address, "GET", "/config")[1])["dependencies"]
    uploads = [event["id"] for event in dependencies if any(target[1] == "upload" for target in event["targets"])]
    assert len(uploads) >= 2
    for path in ("http://127.0.0.1/x.safetensors", "HTTPS://example.org/x", outside, missing, "/etc/passwd", "a\0b"):
        for file in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}, [{"deep": {"path": path}}]):
            for number in uploads:
                assert join(address, {"data": [file], "fn_index": number})[0] == 403
            for route in ("call/compare", "call/v2/compare", "run/compare", "api/compare"):
                assert post(address, f"/gradio_api/{route}", {"data": [file]})[0] == 403
            assert post(address, "/gradio_api/call/v2/compare", {"param_1": file})[0] == 403


def test_an_uploaded_file_is_taken(server):
    address, app = server
    [path] = json.loads(upload(address, 1000, "mine.safetensors")[1])
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = event_of(address, "info-upload", "upload")
    assert app.folder.holds_upload(path)
    assert join(address, {"data": [file], "fn_index": event["id"], "session_hash": "taker"})[0] == 200


def test_requests_beyond_the_limits_are_refused(server):
    address, app = server
    limits = app.settings.limits
    too_much = str(limits.request_bytes + 1)
    assert request(address, "POST", "/gradio_api/upload", None, Content_Length=too_much)[0] == 413
    assert request(address, "POST", "/gradio_api/upload", None, Transfer_Encoding="chunked")[0] == 411
    assert join(address, {"data": ["x" * limits.json_bytes]})[0] == 413
    assert request(address, "POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400


@pytest.fixture
def small_server(models_dir, runs_dir, tmp_path, monkeypatch):
    """(address, app) of a page with little room."""
    limits = Limits(private_bytes=200_000, free_bytes=0, drawings_per_visitor=3, drawings=4)
    app = App.of(replace(settings_in(tmp_path, models_dir, runs_dir), limits=limits))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(app.folder.uploads))
    page = build_page(app)
    _, address, _ = serve(page, app, host="127.0.0.1", port=None, auth=[], block=False)
    yield address.rstrip("/"), app
    page.close()


def test_uploads_have_a_quota_and_old_ones_make_room(small_server):
    address, app = small_server
    answers = [upload(address, 60_000, f"{number}.safetensors") for number in range(5)]
    assert [status for status, _ in answers] == [200, 200, 200, 507, 507]
    assert app.folder.used() < 200_000
    app.folder.limits = replace(app.folder.limits, kept_seconds=0.0)
    assert upload(address, 60_000, "later.safetensors")[0] == 200


def test_a_disk_that_is_almost_full_takes_no_uploads(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2**30))
    folder = PrivateFolder(tmp_path, Limits())
    with raises(ConfigError, "disk", "1024 MiB"), folder.room_for(1):
        pass


@pytest.fixture
def held_base(small_server):
    """Nobody can draw with the base: the first drawing waits for it, the others for the first."""
    _, app = small_server
    with app.store.lease(app.library.base("small")):
        yield


def test_drawings_have_a_bound_of_their_own(small_server, held_base):
    address, _ = small_server
    values = form(Client(address, verbose=False))
    assert post(address, "/gradio_api/run/compare", {"data": values})[0] == 404  # past the queue
    number = event_of(address, "draw")["id"]
    for visitor, expected in (("one", [200] * 3 + [429] * 3), ("two", [200] + [429] * 2)):
        sent = {"data": [None, *values], "fn_index": number, "session_hash": visitor}
        assert [join(address, sent)[0] for _ in expected] == expected
    assert join(address, {"data": [None, *values], "fn_index": str(number), "session_hash": "one"})[0] == 429
    assert post(address, "/gradio_api/call/compare", {"data": values})[0] == 429


def test_many_at_once_do_not_pass_the_bound(small_server, held_base):
    address, _ = small_server
    sent = {"data": [None, *form(Client(address, verbose=False))], "fn_index": event_of(address, "draw")["id"]}
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda _: join(address, sent)[0], range(12)))
    assert sorted(statuses) == [200] * 3 + [429] * 9


def test_a_full_queue_keeps_nobody_from_cancelling_or_opening_the_page(small_server):
    address, _ = small_server
    page = json.loads(request(address, "GET", "/config")[1])
    for element in ("cancel-training", "resume-training"):
        event = event_of(address, element)
        body = {"data": [None], "fn_index": event["id"], "session_hash": "one"}
        status, content = post(address, "/gradio_api/run/predict", body)
        assert not event["queue"] and status == 200 and b"no training named" in content
    [load] = [event for event in page["dependencies"] if any(target[1] == "load" for target in event["targets"])]
    body = {"data": [None], "fn_index": load["id"], "session_hash": "one"}
    status, content = post(address, "/gradio_api/run/predict", body)
    assert not load["queue"] and status == 200 and b"small" in content
