from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import ANY

import pytest
from file_server import Cut, FileServer, serve_file

from ai4all.errors import DataDirectoryError, ModelChecksumMismatch, ModelSourceError
from ai4all.models import http_download
from ai4all.models.sources import Fetched, fetch

CONTENT = random.Random(1).randbytes(2_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileServer]:
    monkeypatch.setattr(http_download, "RETRY_DELAYS", (0.0,))
    async with serve_file(CONTENT) as serving:
        yield serving


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "p.partial"


async def get(
    server: FileServer, partial: Path, sha256: str | None = SHA256, size: int | None = None
) -> Fetched:
    return await fetch(
        server.url, partial, expected_sha256=sha256, expected_size=size, disk_reserve_bytes=0
    )


def ranges(server: FileServer) -> list[str | None]:
    return [request.get("Range") for request in server.requests]


async def test_a_whole_file(server: FileServer, partial: Path) -> None:
    fetched = await get(server, partial)
    assert fetched == Fetched(partial, SHA256, len(CONTENT))
    assert partial.read_bytes() == CONTENT
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    assert server.requests == [ANY]
    assert server.requests[0]["Accept-Encoding"] == "identity"


async def test_a_broken_connection_is_resumed_where_it_broke(
    server: FileServer, partial: Path
) -> None:
    server.script = [Cut(700_000), Cut(1), Cut(900_000)]
    await get(server, partial)
    assert partial.read_bytes() == CONTENT
    assert len(server.requests) == 4
    assert ranges(server)[0] is None
    assert all(r is not None and r != "bytes=0-" for r in ranges(server)[2:])
    assert server.requests[-1]["If-Range"] == '"v1"'


async def stop_early(server: FileServer, partial: Path) -> int:
    """Leave a partial file behind, as an interrupted run does; return its length."""
    server.script = [Cut(800_000), 404]
    with pytest.raises(ModelSourceError):
        await get(server, partial)
    server.requests.clear()
    have = partial.stat().st_size
    assert 0 < have <= 800_000
    return have


async def test_a_later_run_goes_on_where_an_earlier_one_stopped(
    server: FileServer, partial: Path
) -> None:
    have = await stop_early(server, partial)
    await get(server, partial)
    assert ranges(server) == [f"bytes={have}-"]
    assert partial.read_bytes() == CONTENT


async def test_a_cancelled_run_keeps_what_it_has(
    server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_download, "RETRY_DELAYS", (600.0,))
    server.script = [Cut(800_000), 503]
    task = asyncio.create_task(get(server, partial))
    while len(server.requests) < 2:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    have = partial.stat().st_size
    server.requests.clear()
    server.script = []
    await get(server, partial)
    assert ranges(server) == [f"bytes={have}-"]
    assert partial.read_bytes() == CONTENT


async def test_a_file_that_changed_meanwhile_is_fetched_anew(
    server: FileServer, partial: Path
) -> None:
    assert await stop_early(server, partial) > 0
    server.etag = '"v2"'
    server.content = bytes(reversed(CONTENT))
    expected = hashlib.sha256(server.content).hexdigest()
    await get(server, partial, expected)
    assert partial.read_bytes() == server.content


async def test_a_server_without_ranges_starts_over(server: FileServer, partial: Path) -> None:
    assert await stop_early(server, partial) > 0
    server.honour_range = False
    await get(server, partial)
    assert partial.read_bytes() == CONTENT


async def test_without_a_validator_nothing_is_glued_together(
    server: FileServer, partial: Path
) -> None:
    for etag in (None, 'W/"weak"'):
        server.etag = etag
        await stop_early(server, partial)
        await get(server, partial)
        assert ranges(server)[0] is None
        assert partial.read_bytes() == CONTENT
        partial.unlink()
        server.requests.clear()


async def test_a_partial_file_of_another_url_is_not_used(server: FileServer, partial: Path) -> None:
    await stop_early(server, partial)
    server.url = server.url.replace("model.gguf", "other.gguf")
    await get(server, partial)
    assert ranges(server) == [None]


async def test_a_spoiled_partial_file_costs_one_fresh_start(
    server: FileServer, partial: Path
) -> None:
    have = await stop_early(server, partial)
    partial.write_bytes(bytes(have))
    await get(server, partial)
    assert ranges(server) == [f"bytes={have}-", None]
    assert partial.read_bytes() == CONTENT


async def test_a_range_that_was_not_asked_for_is_not_used(
    server: FileServer, partial: Path
) -> None:
    await stop_early(server, partial)
    server.wrong_range = True
    await get(server, partial)
    assert partial.read_bytes() == CONTENT


async def test_a_partial_file_that_is_complete_needs_no_request(
    server: FileServer, partial: Path
) -> None:
    await stop_early(server, partial)
    partial.write_bytes(CONTENT)
    await get(server, partial)
    assert server.requests == []


async def test_the_wrong_content_is_refused_and_removed(server: FileServer, partial: Path) -> None:
    with pytest.raises(ModelChecksumMismatch):
        await get(server, partial, "1" * 64)
    assert list(partial.parent.iterdir()) == []
    assert len(server.requests) == 1


async def test_the_wrong_size_is_refused_before_the_body(server: FileServer, partial: Path) -> None:
    with pytest.raises(ModelSourceError, match="expected 5"):
        await get(server, partial, None, 5)
    assert not partial.exists()


async def test_a_body_without_a_length(server: FileServer, partial: Path) -> None:
    server.say_length = False
    await get(server, partial)
    assert partial.read_bytes() == CONTENT


async def test_a_body_without_a_length_is_bounded_by_what_is_expected(
    server: FileServer, partial: Path
) -> None:
    server.say_length = False
    with pytest.raises(ModelSourceError, match="more than the 1000000 bytes"):
        await get(server, partial, None, 1_000_000)
    assert partial.stat().st_size <= 1_000_000


async def test_a_body_without_a_length_is_bounded_by_the_disk(
    server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.say_length = False
    with pytest.raises((ModelSourceError, DataDirectoryError)):
        await fetch(server.url, partial, disk_reserve_bytes=1 << 60)


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "no such file"), (401, "login"), (403, "refuses"), (400, "400")]
)
async def test_a_refusal_is_final(
    server: FileServer, partial: Path, status: int, reason: str
) -> None:
    server.script = [status] * 5
    with pytest.raises(ModelSourceError, match=reason):
        await get(server, partial)
    assert len(server.requests) == 1


async def test_a_busy_server_is_asked_again_but_not_for_ever(
    server: FileServer, partial: Path
) -> None:
    server.script = [503, 429]
    await get(server, partial)
    assert len(server.requests) == 3
    partial.unlink()
    server.script = [503] * 100
    with pytest.raises(ModelSourceError, match="503"):
        await get(server, partial)
    assert len(server.requests) == 3 + http_download.MAX_UNPRODUCTIVE_ATTEMPTS


async def test_nobody_there(partial: Path, server: FileServer) -> None:
    server.url = "http://127.0.0.1:9/m.gguf"
    with pytest.raises(ModelSourceError, match="no connection"):
        await get(server, partial)


async def test_redirects_stay_on_allowed_addresses(server: FileServer, partial: Path) -> None:
    server.redirect_to = "/elsewhere.gguf"
    await get(server, partial)
    assert len(server.requests) == 2
    partial.unlink()
    for target in ("http://example.org/m", "file:///etc/passwd", "https://u:p@example.org/"):
        server.redirect_to = target
        with pytest.raises(ModelSourceError):
            await get(server, partial)
    server.redirect_to = "/model.gguf"
    with pytest.raises(ModelSourceError, match="redirects more than"):
        await get(server, partial)


async def test_a_content_encoding_is_refused(server: FileServer, partial: Path) -> None:
    server.encoding = "gzip"
    with pytest.raises(ModelSourceError, match="gzip"):
        await get(server, partial)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://ex..ample.invalid/x.gguf", None),
        ("https://host.invalid/x.gguf", "http://[::1"),
        ("https://host.invalid/x.gguf", "http://me:hunter2@127.0.0.1:99999"),
    ],
)
async def test_an_address_that_is_none_is_an_error_of_the_source(
    partial: Path, url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proxy is not None:
        monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ModelSourceError, match="cannot be used") as caught:
        await fetch(url, partial, expected_sha256=SHA256, expected_size=None, disk_reserve_bytes=0)
    assert "hunter2" not in str(caught.value)
