"""Refuses requests before Gradio sees them."""

import json
import re
from collections.abc import Iterator
from urllib.parse import unquote

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from cersa_diffusion.errors import ConfigError
from gradio_app.drawing_places import DrawingPlaces
from gradio_app.hosts import Hosts
from gradio_app.private_folder import PrivateFolder
from gradio_app.settings import Limits

# The routes that the page and `gradio_client` use. Gradio has further routes, for proxies, other hubs, its editor and statistics.
ROUTES = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login|logout)?/?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|app_id|user|login_check|startup-events|theme\.css|cancel|reset|upload|upload_progress)/?"
    r"|/gradio_api/queue/(join|data|status)/?"
    r"|/gradio_api/(heartbeat|call|run|api)/.+"
    r"|/gradio_api/file=.+",
    re.DOTALL,
)
FILE_ROUTE, UPLOAD_ROUTE, LOGIN_ROUTE = "/gradio_api/file=", "/gradio_api/upload", "/login"


class Refusal(Exception):
    """The refusal of a request.

    Args:
        status: HTTP status.
        text: message for the visitor.
    """

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status, self.text = status, text


class Guard:
    """ASGI middleware that accepts only requests which the page needs, which come from the page, and which are within its limits.

    Args:
        app: the application that gets the accepted requests.
        hosts: the names of this server.
        folder: the folder of the uploads.
        places: the limit of waiting drawings.
        limits: limits of one request.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, folder: PrivateFolder, places: DrawingPlaces, limits: Limits):
        self.app, self.hosts, self.folder, self.places, self.limits = app, hosts, folder, places, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose(reason="there are no websockets here")(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            if scope["method"] == "POST":
                await self._post(scope, receive, send)
            else:
                await self.app(scope, _limited(receive, self.limits.json_bytes), send)
        except Refusal as refusal:
            # The page of Gradio shows the detail of a refused event, but the whole text of a refused upload.
            upload = _is_route(scope, UPLOAD_ROUTE)
            answer = PlainTextResponse(refusal.text) if upload else JSONResponse({"detail": refusal.text})
            answer.status_code = refusal.status
            await answer(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        reason = self.hosts.refusal(dict(scope["headers"]))
        if reason is not None:
            raise Refusal(403, reason)
        path = scope["path"]
        if not ROUTES.fullmatch(path):
            raise Refusal(404, "this page does not exist")
        target = unquote(unquote(path.removeprefix(FILE_ROUTE)))
        if path.startswith(FILE_ROUTE) and not self.folder.gives_out(target):
            raise Refusal(403, "this server sends only its own downloads, and fetches nothing from other servers")

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = _is_route(scope, UPLOAD_ROUTE)
        most = self.limits.request_bytes if upload else self.limits.json_bytes
        length = dict(scope["headers"]).get(b"content-length", b"")
        if upload and not length.isdigit():
            raise Refusal(411, "an upload needs the header Content-Length")
        if length.isdigit() and int(length) > most:
            raise Refusal(413, f"a request may have at most {most / 2**20:.0f} MiB")
        if upload:
            await self._receive_upload(int(length), scope, _limited(receive, int(length)), send)
        elif _is_route(scope, LOGIN_ROUTE):
            await self.app(scope, _limited(receive, most), send)
        else:
            await self._queue_event(await _whole_body(receive, most), scope, receive, send)

    async def _receive_upload(self, size: int, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.folder.room_for(size):
                await self.app(scope, receive, send)
        except ConfigError as error:
            raise Refusal(507, str(error)) from error

    async def _queue_event(self, content: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "expected JSON") from error
        if not isinstance(body, dict):
            raise Refusal(400, "expected a JSON object")
        if not all(self.folder.holds_upload(path) for path in _file_paths(body)):
            raise Refusal(403, "a file of this request is not among the uploads, or was removed: upload it again")
        try:
            with self.places.entering(scope["path"], body):
                await self.app(scope, _replayed(content, receive), send)
        except ConfigError as error:
            raise Refusal(429, str(error)) from error


def _is_route(scope: Scope, route: str) -> bool:
    return scope["path"].rstrip("/") == route


def _file_paths(body: dict) -> Iterator[str]:
    """The paths of everything that Gradio treats as a file in a request; if a path were an address, it would fetch it."""
    values: list = [body]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            values += value.values()
        elif isinstance(value, list):
            values += value


async def _whole_body(receive: Receive, most_bytes: int) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if len(content) > most_bytes:
            raise Refusal(413, f"a request may have at most {most_bytes / 2**20:.0f} MiB")
        if not message.get("more_body", False):
            return content


def _replayed(content: bytes, receive: Receive) -> Receive:
    """Gives a body that was already read, and then the further messages, such as the disconnect of the visitor."""
    messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _limited(receive: Receive, most_bytes: int) -> Receive:
    """Ends a body that has more bytes than announced, as if the visitor had disconnected."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > most_bytes else message

    return limited
