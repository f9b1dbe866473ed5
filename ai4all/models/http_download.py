"""Downloads one file over HTTP, and goes on in the middle after an interruption.

Beside the partial file lies a small JSON file that says what the partial file is a part of. A
range is asked for only with a validator (``If-Range``), so a file that changed on the server is
never glued to the rest of its predecessor; RFC 9110, sections 13.1.5 and 14.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import ujson

from ai4all.errors import ModelSourceError
from ai4all.models.files import CHUNK_BYTES, Reporter, check_free_space, size_of
from ai4all.models.sources import check_url

__all__ = ["get_over_http"]

MAX_REDIRECTS = 10
MAX_UNPRODUCTIVE_ATTEMPTS = 4
RETRY_DELAYS = (0.5, 2.0, 5.0)
"""Seconds before each attempt after one that brought no new bytes."""

_CONNECT_TIMEOUT = 20.0
_READ_TIMEOUT = 60.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_STATUS_MEANS = {
    401: "the server wants a login",
    403: "the server refuses to give it",
    404: "there is no such file on the server",
    410: "the file is gone from the server",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """What the partial file is a part of."""

    url: str
    validator: str
    total: int


class _Transient(Exception):
    """A failure after which another attempt is worth it."""


async def get_over_http(
    url: str, partial: Path, reporter: Reporter, expected_size: int | None, reserve: int
) -> bool:
    """Have the whole file in ``partial``; say whether some bytes are from an earlier run.

    Raises:
        ModelSourceError: It cannot be had.
        DataDirectoryError: The disk is too full.
        OSError: The partial file cannot be written.
    """
    from_earlier_run = size_of(partial) > 0
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT
    )
    # trust_env: the user's proxy settings are his to make.
    async with aiohttp.ClientSession(
        timeout=timeout, trust_env=True, auto_decompress=False
    ) as session:
        unproductive = 0
        while True:
            before = size_of(partial)
            download = _Download(session, url, partial, reporter, expected_size, reserve)
            try:
                await download.run()
            except (_Transient, aiohttp.ClientError, TimeoutError) as error:
                unproductive = 0 if size_of(partial) > before else unproductive + 1
                if unproductive >= MAX_UNPRODUCTIVE_ATTEMPTS:
                    raise ModelSourceError(url, _reason(error)) from error
                if unproductive:
                    delay = RETRY_DELAYS[min(unproductive, len(RETRY_DELAYS)) - 1]
                    await asyncio.sleep(delay)
                from_earlier_run = from_earlier_run and not download.restarted
            except ValueError as error:
                # What the parser of addresses says may quote the password of a proxy.
                problem = "its address, or the proxy of this environment, cannot be used"
                raise ModelSourceError(url, problem) from error
            else:
                return from_earlier_run and not download.restarted


class _Download:
    """One attempt."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        partial: Path,
        reporter: Reporter,
        expected_size: int | None,
        reserve: int,
    ) -> None:
        self._session = session
        self._url = url
        self._partial = partial
        self._note = partial.with_name(partial.name + ".json")
        self._reporter = reporter
        self._expected_size = expected_size
        self._reserve = reserve
        self.restarted = False

    async def run(self) -> None:
        part = self._resumable()
        done = size_of(self._partial) if part else 0
        if part and done == part.total:
            return
        headers = {"Accept-Encoding": "identity"}
        if part:
            headers |= {"Range": f"bytes={done}-", "If-Range": part.validator}
        async with self._request(headers) as response:
            if response.status == 206 and part:
                self._check_range(response, done, part)
                total: int | None = part.total
            elif response.status == 200:
                done, total = 0, response.content_length
                self.restarted = True
                self._begin(response, total)
            else:
                self._refuse(response)
            self._check_size(total, done)
            await self._write(response, done, total)

    def _resumable(self) -> _Part | None:
        """What the partial file belongs to, if it is ours to go on with."""
        try:
            raw = ujson.loads(self._note.read_bytes())
            part = _Part(str(raw["url"]), str(raw["validator"]), int(raw["total"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None  # no note, or not one of ours: start over
        fits = part.url == self._url and part.validator and size_of(self._partial) > 0
        return part if fits and size_of(self._partial) <= part.total else None

    @contextlib.asynccontextmanager
    async def _request(self, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Follow redirects by hand: each stop has to be a URL that we may fetch."""
        url = self._url
        for _ in range(MAX_REDIRECTS):
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    yield response
                    return
                url = urljoin(url, response.headers.get("Location", ""))
                check_url(url)
        raise ModelSourceError(self._url, f"redirects more than {MAX_REDIRECTS} times")

    def _refuse(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status == 416:
            # The partial file is not a part of what the server has now.
            self._partial.unlink(missing_ok=True)
            raise _Transient("the server has another file than before")
        if status in _TRANSIENT_STATUS:
            raise _Transient(f"the server answers {status} {response.reason}")
        meaning = _STATUS_MEANS.get(status, "the server does not give it")
        raise ModelSourceError(self._url, f"{meaning} ({status} {response.reason})")

    def _check_range(self, response: aiohttp.ClientResponse, done: int, part: _Part) -> None:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != done or found[3] not in (str(part.total), "*"):
            self._partial.unlink(missing_ok=True)
            raise _Transient("the server sent another range than the one that was asked for")

    def _begin(self, response: aiohttp.ClientResponse, total: int | None) -> None:
        """Start over, and note what the partial file will be a part of."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise ModelSourceError(self._url, f"is sent with the content encoding {encoding}")
        self._note.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
        etag = response.headers.get("ETag", "")
        # A weak entity tag does not promise equal bytes.
        validator = etag if etag and not etag.startswith("W/") else ""
        validator = validator or response.headers.get("Last-Modified", "")
        if validator and total:
            note = ujson.dumps(asdict(_Part(self._url, validator, total)))
            self._note.write_text(note)

    def _check_size(self, total: int | None, done: int) -> None:
        expected = self._expected_size
        if total is not None and expected is not None and total != expected:
            self._partial.unlink(missing_ok=True)
            raise ModelSourceError(self._url, f"has {total} bytes, expected {expected}")
        needed = total or expected or 0
        check_free_space(self._partial.parent, needed - done, self._reserve)

    async def _write(self, response: aiohttp.ClientResponse, done: int, total: int | None) -> None:
        # Where the server does not say how much will come, the reserve is the bound.
        free = shutil.disk_usage(self._partial.parent).free - self._reserve
        most = total or self._expected_size or done + max(0, free)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._partial, flags, 0o600), "ab", buffering=0) as file:
            self._reporter.report("downloading", done, total)
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                if done + len(chunk) > most:
                    raise ModelSourceError(self._url, f"sends more than the {most} bytes expected")
                await asyncio.to_thread(_write_all, file.fileno(), chunk)
                done += len(chunk)
                self._reporter.report("downloading", done, total)
        if total is not None and done < total:
            raise _Transient("the connection was closed early")


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return f"the server's certificate is not trusted: {error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection to {error.host}: {error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "the server does not answer in time"
    return str(error) or type(error).__name__
