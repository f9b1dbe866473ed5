"""A web server for one file, with the faults that web servers have."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(frozen=True)
class Cut:
    """An answer that breaks off after so many bytes of its body."""

    length: int


@dataclass
class FileServer:
    """What the next answers are like, and what was asked."""

    content: bytes
    url: str = ""
    etag: str | None = '"v1"'
    honour_range: bool = True
    say_length: bool = True
    script: list[Cut | int] = field(default_factory=list)
    """The next answers: broken off, or with a status only; afterwards the file is given."""
    redirect_to: str | None = None
    wrong_range: bool = False
    encoding: str | None = None
    requests: list[dict[str, str]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.headers))
        if self.redirect_to is not None and request.path == "/model.gguf":
            raise web.HTTPFound(self.redirect_to)
        answer = self.script.pop(0) if self.script else None
        if isinstance(answer, int):
            return web.Response(status=answer)
        start, response = 0, web.StreamResponse()
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        unchanged = request.headers.get("If-Range") in (None, self.etag)
        if asked and self.honour_range and unchanged:
            start = int(asked[1])
            if start >= len(self.content):
                return web.Response(status=416)
            response.set_status(206)
            said = start + 1 if self.wrong_range else start
            last = len(self.content) - 1
            response.headers["Content-Range"] = f"bytes {said}-{last}/{len(self.content)}"
        if self.etag:
            response.headers["ETag"] = self.etag
        if self.encoding:
            response.headers["Content-Encoding"] = self.encoding
        body = self.content[start:]
        if self.say_length:
            response.content_length = len(body)
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        if answer is not None:
            await response.write(body[: answer.length])
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(body)
        await response.write_eof()
        return response


@asynccontextmanager
async def serve_file(content: bytes) -> AsyncIterator[FileServer]:
    """Serve ``content`` on loopback."""
    server = FileServer(content)
    app = web.Application()
    app.router.add_get("/{name}", server.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http://127.0.0.1:{port}/model.gguf"
    try:
        yield server
    finally:
        await runner.cleanup()
