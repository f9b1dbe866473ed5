from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from websockets.asyncio.server import ServerConnection, serve

from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.errors import MaxReconnectsExceeded
from ai4all.protocol.connection import Connection, LinkOptions
from ai4all.protocol.events import SessionEvent, SessionStarted
from ai4all.protocol.pins import PinMismatch, check_pin, format_pin, parse_pin, pin_of
from ai4all.protocol.session import Session

MakeSession = Callable[..., Session]
PIN = bytes(range(32))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("127.0.0.1")


def pin(certificate: trustme.LeafCert) -> bytes:
    pem = certificate.cert_chain_pems[0].bytes().decode()
    return pin_of(ssl.PEM_cert_to_DER_cert(pem))


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def serving_as(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.mark.parametrize(
    "text",
    [
        PIN.hex(),
        PIN.hex().upper(),
        base64.b64encode(PIN).decode(),
        "sha256//" + base64.b64encode(PIN).decode(),
        f" {PIN.hex()}\n",
    ],
)
def test_a_pin_is_read_as_people_write_it(text: str) -> None:
    assert parse_pin(text) == PIN
    assert parse_pin(format_pin(parse_pin(text))) == PIN


@pytest.mark.parametrize(
    "text", ["", "sha256//", "x" * 64, "abc", PIN.hex()[:-1], "sha256//" + PIN.hex(), "é" * 44]
)
def test_what_is_no_pin(text: str) -> None:
    with pytest.raises(ValueError, match="SHA-256 of a public key"):
        parse_pin(text)


def test_it_is_what_openssl_prints(certificate: trustme.LeafCert, tmp_path: Path) -> None:
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "leaf.pem")
    key = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "leaf.pem", "-pubkey", "-noout"],
        check=True,
        capture_output=True,
    ).stdout
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-outform", "der"], input=key, check=True, capture_output=True
    ).stdout
    assert pin(certificate) == hashlib.sha256(der).digest()


def test_a_connection_without_a_certificate_has_no_pin() -> None:
    with pytest.raises(PinMismatch):
        check_pin(None, {PIN})


@asynccontextmanager
async def listening(certificate: trustme.LeafCert, received: bytearray) -> AsyncIterator[int]:
    """Somebody with this certificate who writes down every byte that he is sent."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=serving_as(certificate))
    async with server:
        yield server.sockets[0].getsockname()[1]


async def attempt(session: Session, port: int, authority: trustme.CA, pins: set[bytes]) -> str:
    """Why one attempt at a connection failed."""
    connection = Connection(
        session,
        LinkOptions(
            url=f"wss://127.0.0.1:{port}",
            token="hunter2-secret",
            ssl_context=trusting(authority),
            pins=frozenset(pins),
            open_timeout=5.0,
        ),
        Attempts(Backoff(1, jitter=0.0, max_attempts=0)),
        lambda event: None,
    )
    lost = await connection._connect_and_serve()
    assert lost.floor == (60.0 if pins else 0.0)
    return lost.reason


async def test_somebody_with_another_key_hears_nothing(
    make_session: MakeSession, authority: trustme.CA, certificate: trustme.LeafCert
) -> None:
    received = bytearray()
    async with listening(certificate, received) as port:
        reason = await attempt(make_session(), port, authority, {PIN})
    assert received == b""
    assert "coordinator.pin_sha256" in reason
    # The text has what an owner needs to pin the new key, if he knows that it is right.
    assert format_pin(pin(certificate)) in reason

    # Without pins the same listener gets to see the request: the test would notice a byte.
    received = bytearray()
    async with listening(certificate, received) as port:
        await attempt(make_session(), port, authority, set())
    assert b"hunter2-secret" in received


async def test_a_pin_does_not_replace_the_authority(
    make_session: MakeSession, certificate: trustme.LeafCert
) -> None:
    received = bytearray()
    async with listening(certificate, received) as port:
        reason = await attempt(make_session(), port, trustme.CA(), {pin(certificate)})
    assert received == b""
    assert "certificate was refused" in reason


@pytest.mark.parametrize("others", [0, 1])
async def test_the_right_key_is_let_in(
    make_session: MakeSession, authority: trustme.CA, certificate: trustme.LeafCert, others: int
) -> None:
    async def handle(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send('{"type":"Registered","session_id":"s","heartbeat_interval_ms":60000}')
        await socket.wait_closed()

    started = asyncio.Event()

    def on_event(event: SessionEvent) -> None:
        if isinstance(event, SessionStarted):
            started.set()

    async with serve(handle, "127.0.0.1", 0, ssl=serving_as(certificate)) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        connection = Connection(
            make_session(),
            LinkOptions(
                url=f"wss://127.0.0.1:{port}",
                ssl_context=trusting(authority),
                pins=frozenset({pin(certificate), *[PIN] * others}),
            ),
            Attempts(Backoff(1, max_attempts=1)),
            on_event,
        )
        running = asyncio.create_task(connection.run())
        await asyncio.wait_for(started.wait(), 20)
        await connection.close()
        await running


async def test_attempts_that_run_out_name_the_pin(
    make_session: MakeSession, authority: trustme.CA, certificate: trustme.LeafCert
) -> None:
    async with listening(certificate, bytearray()) as port:
        connection = Connection(
            make_session(),
            LinkOptions(
                url=f"wss://127.0.0.1:{port}",
                ssl_context=trusting(authority),
                pins=frozenset({PIN}),
                refusal_delay=0.0,
            ),
            Attempts(Backoff(1, jitter=0.0, max_attempts=1)),
            lambda event: None,
        )
        with pytest.raises(MaxReconnectsExceeded, match="pin_sha256"):
            await asyncio.wait_for(connection.run(), 20)
