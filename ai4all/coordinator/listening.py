"""Who may connect to a coordinator, and where it may listen."""

from __future__ import annotations

import errno
import hmac
import http
import ipaddress
import logging
from collections.abc import Callable

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from ai4all.errors import ConfigError

__all__ = ["asks_for", "check_host", "listen_problem", "socket_log"]

socket_log = logging.getLogger("ai4all.coordinator.websocket")
"""The library's log. A handshake that failed is the peer's matter, and comes with a traceback."""

socket_log.addFilter(lambda record: "handshake failed" not in str(record.msg))


def asks_for(
    token: str | None,
) -> Callable[[ServerConnection, Request], Response | None] | None:
    """What lets only those in who send ``Authorization: Bearer`` with ``token``."""
    if token is None:
        return None
    expected = token.encode()

    def authorize(connection: ServerConnection, request: Request) -> Response | None:
        values = request.headers.get_all("Authorization")
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        known = hmac.compare_digest(given.strip().encode(), expected)
        if scheme.lower() == "bearer" and known:
            return None
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a valid token is needed\n")

    return authorize


def check_host(host: str, *, allow_remote: bool) -> None:
    """Refuse an address that other machines can reach, unless that is wanted.

    Raises:
        ConfigError: It is such an address.
    """
    if allow_remote or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            "host", "other machines could reach this address; that needs to be allowed", host
        )


def listen_problem(exc: OSError) -> str:
    """Why an address cannot be listened on."""
    if exc.errno == errno.EADDRINUSE:
        return "another program listens there; choose another port, or 0 for a free one"
    if exc.errno == errno.EACCES:
        return "this user may not listen on that port"
    if exc.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    return exc.strerror or str(exc)
