"""What the server refuses before Gradio sees it."""

from urllib.parse import unquote

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """ASGI middleware: no fetching of other addresses for visitors, no requests beyond a size.

    Args:
        app: what comes behind.
        most_bytes: of the body of a request.
    """

    def __init__(self, app: ASGIApp, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most_bytes:
                # A body that did not tell its length: as if the visitor had left.
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        path = unquote(unquote(scope["path"])).lower()
        # Gradio would fetch an address that stands in the place of a file, or of a proxied app.
        if "/proxy=" in path or "/file=http:" in path or "/file=https:" in path:
            return 403, "this server fetches nothing from elsewhere"
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most_bytes:
            return 413, f"at most {self.most_bytes / 2**20:.0f} MiB in one request"
        return None
