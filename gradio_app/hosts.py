"""Which names of the server are accepted, and which other pages may send requests to it.

Another page can point its own name to this machine (DNS rebinding). The browser then treats this page as a part of the other
page, and only the Host header shows the difference.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


class Hosts:
    """The names of this server.

    Args:
        listened: the address on which it listens.
        allowed: further names, such as the name of a reverse proxy.
    """

    def __init__(self, listened: str, allowed: Iterable[str] = ()):
        self._proxies = frozenset(_unbracketed(name) for name in allowed)
        self._names = {*LOCAL, _unbracketed(listened), *self._proxies} - set(EVERYWHERE)
        # The server listens on all addresses of the machine. An address cannot be rebound, unlike a name.
        self._any_address = _unbracketed(listened) in EVERYWHERE

    def refusal(self, headers: dict[bytes, bytes]) -> str | None:
        """The reason to refuse a request, or None to accept it.

        Args:
            headers: headers of the request, with names in lower case.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name, _ = _split(f"http://{host}")
        if name not in self._names and not (self._any_address and _is_address(name)):
            return f"this server does not accept the name {host[:100]!r}: start it with --allow-host NAME if this is its name"
        origin = headers.get(b"origin")
        if origin is not None and not self._same_page(origin.decode("latin-1").lower(), host):
            return f"requests from pages of {origin.decode('latin-1')[:100]!r} are refused"
        return None

    def _same_page(self, origin: str, host: str) -> bool:
        scheme = origin.partition("://")[0]
        name, port = _split(origin)
        # Some proxies replace the Host header by the address that they call, but none replaces the Origin header.
        return name in self._proxies or (name is not None and (name, port) == _split(f"{scheme}://{host}"))


def _split(address: str) -> tuple[str | None, int | None]:
    """Name and port of an address, or (None, None) if the text is not an address."""
    try:
        url = urlsplit(address)
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        return (url.hostname, port) if url.username is None else (None, None)
    except ValueError:
        return None, None


def _unbracketed(name: str) -> str:
    return name.strip("[]").lower()


def _is_address(name: str | None) -> bool:
    try:
        ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return True
