"""Opening a WebSocket to the coordinator: where it is, what is shown and what must be shown."""

from __future__ import annotations

import functools
import ipaddress
import logging
import ssl
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from websockets.asyncio.client import connect

from ai4all import __version__
from ai4all.errors import ConfigError
from ai4all.protocol.guarded_socket import GuardedConnection

__all__ = ["URL_KEY", "Dial", "LinkOptions", "Socket", "check_url", "dial_websocket"]

URL_KEY: Final = "coordinator.url"

# The library writes whole handshakes, token included, at this level and below.
_wire_log = logging.getLogger("ai4all.protocol.websocket")
_wire_log.addFilter(lambda record: record.levelno > logging.DEBUG)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How to reach the coordinator. Times are in seconds.

    Attributes:
        url: ``wss://`` or ``ws://``.
        token: Sent as ``Authorization: Bearer`` in the handshake, and nowhere else. A function is
            asked before each connection, so that a token can be changed meanwhile; what it raises
            as a ``ConfigError`` costs that attempt.
        allow_insecure: Permit ``ws://`` to another machine.
        ssl_context: For a private authority; None verifies against the system's authorities.
        pins: The public keys that the coordinator may have (see ``pins``); empty: any that its
            certificate is verified with.
        open_timeout: Bound on connecting and the handshake.
        ping_interval: Time between keepalive pings.
        ping_timeout: How long a pong may take.
        close_timeout: How long a polite close may take.
        max_size: Longest message accepted, in bytes; a longer one ends the connection (1009).
        refusal_delay: Least delay after a refusal that time alone will not cure.
    """

    url: str
    token: str | Callable[[], str | None] | None = field(default=None, repr=False)
    allow_insecure: bool = False
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    pins: frozenset[bytes] = frozenset()
    open_timeout: float = 10.0
    ping_interval: float = 20.0
    ping_timeout: float = 15.0
    close_timeout: float = 5.0
    max_size: int = 1024 * 1024
    refusal_delay: float = 60.0


class Socket(Protocol):
    """What a connection needs of a socket: as much of ``websockets``' as is used here."""

    @property
    def close_code(self) -> int | None:
        """Why it was closed; None while it is open."""

    @property
    def close_reason(self) -> str | None:
        """The words to that; None while it is open."""

    async def recv(self) -> str | bytes:
        """The next message.

        Raises:
            ConnectionClosed: There will be none.
        """

    def send_now(self, messages: Sequence[str]) -> bool:
        """Write messages in one piece where nothing has to be waited for.

        Not while ``send_all`` is under way.

        Returns:
            Whether that was done; if not, nothing was.
        """

    async def send_all(self, messages: Sequence[str]) -> None:
        """Write messages one after the other; waits while the buffer is full.

        Raises:
            ConnectionClosed: It cannot be written any more.
        """

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close politely, within the time that the options give. May be called again."""

    def abort(self) -> None:
        """Drop it at once, without a word."""


Dial = Callable[[LinkOptions], Coroutine[Any, Any, Socket]]
"""Opens a connection, and raises as ``dial_websocket`` does when that fails."""


def check_url(url: str, *, allow_insecure: bool = False, origin: str = "") -> None:
    """Refuse a coordinator's address that cannot or should not be used.

    Args:
        url: The address.
        allow_insecure: Permit ``ws://`` to another machine.
        origin: Where it was set, for the error.

    Raises:
        ConfigError: Not a ``ws`` or ``wss`` address, one with a name or password in it, or one
            that would send everything in the clear across a network.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, scheme = parts.hostname, parts.scheme.lower()
        _ = parts.port  # Raises when it is not a port.
        (host or "").encode("idna")  # As whoever looks it up will do.
    except UnicodeError:
        raise ConfigError(URL_KEY, "not a valid address: no such host name", origin) from None
    except ValueError as exc:
        raise ConfigError(URL_KEY, f"not a valid address: {exc}", origin) from None
    if scheme not in ("ws", "wss") or not host:
        raise ConfigError(URL_KEY, "must look like wss://host:port/path", origin)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            URL_KEY, "must not hold a name or password; set the token instead", origin
        )
    if parts.fragment:
        raise ConfigError(URL_KEY, "must not hold a fragment", origin)
    if scheme == "ws" and not allow_insecure and not _is_loopback(host):
        raise ConfigError(
            URL_KEY,
            "ws:// to another machine is readable by everyone between; use wss://, "
            "or allow it with coordinator.allow_insecure",
            origin,
        )


async def dial_websocket(options: LinkOptions) -> Socket:
    """Open a WebSocket to the coordinator.

    Raises:
        OSError: No connection.
        TimeoutError: None within ``open_timeout``.
        InvalidHandshake: Refused.
        InvalidURI: The address is none.
        ConfigError: The token cannot be had; nobody was asked anything.
    """
    parts = urllib.parse.urlsplit(options.url)
    arguments: dict[str, Any] = {
        "create_connection": functools.partial(
            GuardedConnection, max_message=options.max_size, pins=options.pins
        )
    }
    if parts.scheme.lower() == "wss" and options.ssl_context is not None:
        arguments["ssl"] = options.ssl_context
    if _is_loopback(parts.hostname or ""):
        # A proxy would look for the coordinator on its own machine.
        arguments["proxy"] = None
    token = options.token() if callable(options.token) else options.token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    socket = await _ConnectHere(
        options.url,
        additional_headers=headers,
        user_agent_header=f"ai4all-native/{__version__}",
        compression=None,
        max_size=options.max_size,
        open_timeout=options.open_timeout,
        ping_interval=options.ping_interval,
        ping_timeout=options.ping_timeout,
        close_timeout=options.close_timeout,
        logger=_wire_log,
        **arguments,
    )
    assert isinstance(socket, GuardedConnection)
    return socket


class _ConnectHere(connect):
    """Connects to the address that was configured and no other.

    A redirect would decide for the owner who gets his machine's work.
    """

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
