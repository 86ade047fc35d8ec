"""By which names the page may be called, and which other pages may send something to it.

A foreign page can make its own name lead to this machine (DNS rebinding). The browser then takes this page for a part of the
foreign one, and only the Host header tells the two apart.
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


class Hosts:
    """The names of this server.

    Args:
        listened: the address that it listens on.
        allowed: further names, such as that of a reverse proxy.
    """

    def __init__(self, listened: str, allowed: Iterable[str] = ()):
        self._proxies = frozenset(_unbracketed(name) for name in allowed)
        self._names = {*LOCAL, _unbracketed(listened), *self._proxies} - set(EVERYWHERE)
        # All addresses of the machine are listened on. An address in the place of a name cannot be rebound.
        self._any_address = _unbracketed(listened) in EVERYWHERE

    def refusal(self, headers: dict[bytes, bytes]) -> str | None:
        """Why a request is refused; None: it is not.

        Args:
            headers: of the request, names in lower case.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name, _ = _split(f"http://{host}")
        if name not in self._names and not (self._any_address and _is_address(name)):
            return f"this server does not answer as {host[:100]!r}: start it with --allow-host NAME if that is its name"
        origin = headers.get(b"origin")
        if origin is not None and not self._same_page(origin.decode("latin-1").lower(), host):
            return f"requests from pages of {origin.decode('latin-1')[:100]!r} are refused"
        return None

    def _same_page(self, origin: str, host: str) -> bool:
        scheme = origin.partition("://")[0]
        name, port = _split(origin)
        # Some proxies replace the Host header by the address that they call, none replaces the Origin.
        return name in self._proxies or (name is not None and (name, port) == _split(f"{scheme}://{host}"))


def _split(address: str) -> tuple[str | None, int | None]:
    """Name and port of an address; (None, None): it is not one."""
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return (parts.hostname, port) if parts.username is None else (None, None)
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
