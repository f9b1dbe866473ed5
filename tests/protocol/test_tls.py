"""Whoever cannot prove to be the coordinator gets no frame and no token."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from ai4all.commands.worker import link_options
from ai4all.config import load_settings
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.errors import MaxReconnectsExceeded
from ai4all.protocol.connection import Connection, LinkOptions
from ai4all.protocol.events import SessionEvent, SessionStarted
from ai4all.protocol.session import Session

MakeSession = Callable[..., Session]
TOKEN = "t0ken-for-the-right-one"
ATTEMPTS = 10
HOST = "127.0.0.1"
DAY = timedelta(days=1)


@dataclass
class Listener:
    """A coordinator behind TLS. ``told`` is what anybody has told it."""

    url: str = ""
    told: list[str] = field(default_factory=list)

    async def on_request(self, connection: ServerConnection, request: Request) -> None:
        self.told.append(str(request.headers))

    async def on_link(self, connection: ServerConnection) -> None:
        self.told.append(str(await connection.recv()))
        await connection.send(
            '{"type":"Registered","session_id":"s","heartbeat_interval_ms":60000}'
        )
        await connection.wait_closed()


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[Listener]:
    listener = Listener()
    async with serve(
        listener.on_link, HOST, 0, ssl=context, process_request=listener.on_request
    ) as server:
        port = server.sockets[0].getsockname()[1]
        listener.url = f"wss://{HOST}:{port}"
        yield listener


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def trusting(*authorities: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for authority in authorities:
        authority.configure_trust(context)
    return context


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server that vouches for itself: right name, right time, and nobody behind it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = folder / "self.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def imposter(kind: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext | None, str]:
    """A server's context, the worker's, and what the worker must say of it."""
    authority = trustme.CA()
    now = datetime.now(UTC)
    match kind:
        case "wrong host":
            other = authority.issue_cert("coordinator.example")
            return server_context(other), trusting(authority), "IP address mismatch"
        case "expired":
            old = authority.issue_cert(HOST, not_before=now - 9 * DAY, not_after=now - DAY)
            return server_context(old), trusting(authority), "expired"
        case "not yet valid":
            early = authority.issue_cert(HOST, not_before=now + DAY, not_after=now + 9 * DAY)
            return server_context(early), trusting(authority), "not yet valid"
        case "self-signed":
            return self_signed(folder), trusting(authority), "signed certificate"
        case "wrong authority":
            right = server_context(authority.issue_cert(HOST))
            return right, trusting(trustme.CA()), "unable to get local issuer"
        case "authority of nobody":
            return server_context(authority.issue_cert(HOST)), None, "unable to get local issuer"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "wrong host",
        "expired",
        "not yet valid",
        "self-signed",
        "wrong authority",
        "authority of nobody",
    ],
)
async def test_an_imposter_is_told_nothing(
    kind: str, tmp_path: Path, make_session: MakeSession
) -> None:
    server, client, complaint = imposter(kind, tmp_path)
    events: list[SessionEvent] = []
    async with listening(server) as listener:
        connection = Connection(
            make_session(),
            LinkOptions(url=listener.url, token=TOKEN, ssl_context=client, refusal_delay=0.0),
            Attempts(Backoff(1, jitter=0.0, max_attempts=ATTEMPTS)),
            events.append,
        )
        with pytest.raises(MaxReconnectsExceeded) as caught:
            await connection.run()
        assert listener.told == []
    assert caught.value.attempts >= ATTEMPTS
    assert "its certificate was refused" in caught.value.last
    assert complaint in caught.value.last
    assert not any(isinstance(event, SessionStarted) for event in events)


async def test_the_right_one_is_known_by_the_authority_that_is_set(
    tmp_path: Path, make_session: MakeSession
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    started = asyncio.Event()
    async with listening(server_context(authority.issue_cert(HOST))) as listener:
        settings = load_settings(
            None,
            {"coordinator.url": listener.url},
            environ={
                "AI4ALL_DATA_DIR": str(tmp_path / "data"),
                "AI4ALL_COORDINATOR_TOKEN": TOKEN,
                "AI4ALL_COORDINATOR_CA_FILE": str(tmp_path / "ca.pem"),
            },
        )
        connection = Connection(
            make_session(),
            link_options(settings),
            Attempts(Backoff(1, max_attempts=1)),
            lambda event: started.set() if isinstance(event, SessionStarted) else None,
        )
        running = asyncio.create_task(connection.run())
        await started.wait()
        await connection.close()
        await running
    headers, register = listener.told
    assert f"Bearer {TOKEN}" in headers
    assert '"Register"' in register
    assert TOKEN not in register


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_carries_no_token(status: int, make_session: MakeSession) -> None:
    authority = trustme.CA()
    context = server_context(authority.issue_cert(HOST))

    def redirect(connection: ServerConnection, request: Request) -> Response:
        headers = Headers({"Location": other.url, "Content-Length": "0"})
        return Response(status, http.HTTPStatus(status).phrase, headers, b"")

    async with (
        listening(context) as other,
        serve(other.on_link, HOST, 0, ssl=context, process_request=redirect) as first,
    ):
        connection = Connection(
            make_session(),
            LinkOptions(
                url=f"wss://{HOST}:{first.sockets[0].getsockname()[1]}",
                token=TOKEN,
                ssl_context=trusting(authority),
                refusal_delay=0.0,
            ),
            Attempts(Backoff(1, max_attempts=2)),
            lambda event: None,
        )
        with pytest.raises(MaxReconnectsExceeded, match=str(status)):
            await connection.run()
        assert other.told == []
