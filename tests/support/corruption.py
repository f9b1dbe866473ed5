"""Model files that are not what they should be: on the disk, on their way, and half-way.

Each trial begins with a sound store. What is counted is whether wrong bytes were ever handed out,
or ever lay under a final name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from file_server import Cut, FileServer, serve_file
from gguf_mutants import small_model

from ai4all.errors import Ai4allError
from ai4all.models import http_download
from ai4all.models import store as store_module
from ai4all.models.store import ModelStore

__all__ = ["Findings", "spoil_arriving", "spoil_interrupted", "spoil_kept"]

GOOD = small_model()
OTHER = small_model(**{"general.name": ("str", "another one")})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Findings:
    """What became of the trials of one kind.

    Attributes:
        trials: How many of each sort.
        refused: How many of them were refused.
        resumed: Downloads that went on where an earlier one had stopped.
        mended: Downloads whose beginning had been spoiled, and that ended well all the same.
        faults: Trials in which wrong bytes came through, in words.
    """

    trials: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    mended: int = 0
    faults: list[str] = field(default_factory=list)


# Bytes.


def spoiled(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Content with something wrong, and a word for it. Never the content itself."""
    data = bytearray(content)
    at = chance.randrange(len(data))
    match chance.randrange(8):
        case 0 | 1:
            data[at] ^= 1 << chance.randrange(8)
            return "a bit", bytes(data)
        case 2:
            data[at] = (data[at] + chance.randrange(1, 256)) % 256
            return "a byte", bytes(data)
        case 3:
            return "cut short", bytes(data[:at])
        case 4:
            return "too long", bytes(data) + chance.randbytes(chance.choice((1, 32, 4096)))
        case 5:
            page = slice(at // 4096 * 4096, at // 4096 * 4096 + 4096)
            data[page] = bytes(len(data[page]))
            return ("a page of zeros", bytes(data)) if data != content else spoiled(content, chance)
        case 6:
            other = chance.randrange(len(data))
            data[at], data[other] = data[other], data[at]
            return (
                ("two bytes swapped", bytes(data)) if data != content else spoiled(content, chance)
            )
        case _:
            return "another model", OTHER


# What lies on the disk.


def spoil_kept(folder: Path, count: int, seed: int, advance: Callable[[], None]) -> Findings:
    """Spoil a model that is in the store, in place, and ask for it."""
    return asyncio.run(_spoil_kept(folder, count, seed, advance))


async def _spoil_kept(folder: Path, count: int, seed: int, advance: Callable[[], None]) -> Findings:
    chance, found = random.Random(seed), Findings()
    source = folder / "good.gguf"
    source.write_bytes(GOOD)
    (folder / "other.gguf").write_bytes(OTHER)
    data_dir = folder / "data"
    with _every_hash_is_kept():
        store = ModelStore(data_dir, disk_reserve_bytes=0)
        model = await store.add("m", f"file:{source}")
        other = await store.add("o", f"file:{folder / 'other.gguf'}")
        for number in range(count):
            # Known to be sound, so that only a look at the file can tell.
            assert store.get("m") == model
            before = model.path.stat()
            name = _spoil_file(model.path, other.path, chance)
            if chance.random() < 0.5 and model.path.exists():
                # As a tool does that wants to leave no trace.
                os.utime(model.path, ns=(before.st_atime_ns, before.st_mtime_ns))
            found.trials[name] += 1
            store = ModelStore(data_dir) if chance.random() < 0.3 else store
            try:
                given = store.get("m")
            except Ai4allError:
                found.refused[name] += 1
            else:
                found.faults.append(f"trial {number}: {name} was handed out: {given}")
            if model.path.is_symlink() or model.path.exists():
                model.path.unlink()
            model.path.write_bytes(GOOD)
            other.path.write_bytes(OTHER)
            advance()
    return found


def _spoil_file(path: Path, other: Path, chance: random.Random) -> str:
    match chance.randrange(6):
        case 0:
            path.unlink()
            path.symlink_to(other)
            return "a link to another model"
        case 1:
            path.unlink()
            os.link(other, path)
            return "another model's file"
        case _:
            name, content = spoiled(GOOD, chance)
            if chance.random() < 0.5:
                path.write_bytes(content)
                return name
            # Under the same inode, byte by byte.
            with path.open("r+b") as file:
                file.write(content)
                file.truncate()
            return f"{name}, in place"


@contextmanager
def _every_hash_is_kept() -> Iterator[None]:
    """The store hashes again what was touched a moment ago; here the moment is none."""
    fresh, store_module._TOO_FRESH_NS = store_module._TOO_FRESH_NS, -1
    delays, http_download.RETRY_DELAYS = http_download.RETRY_DELAYS, (0.0,)
    try:
        yield
    finally:
        store_module._TOO_FRESH_NS, http_download.RETRY_DELAYS = fresh, delays


# What comes from elsewhere.


def spoil_arriving(folder: Path, count: int, seed: int, advance: Callable[[], None]) -> Findings:
    """Have a server, or a folder, give another file than the one that is asked for by its hash."""
    return asyncio.run(_spoil_arriving(folder, count, seed, advance))


async def _spoil_arriving(
    folder: Path, count: int, seed: int, advance: Callable[[], None]
) -> Findings:
    chance, found = random.Random(seed), Findings()
    data_dir = folder / "data"
    with _every_hash_is_kept():
        async with serve_file(GOOD) as server:
            store = ModelStore(data_dir, disk_reserve_bytes=0)
            for number in range(count):
                name, content = spoiled(GOOD, chance)
                source = server.url
                _misbehave(server, content, chance)
                if chance.random() < 0.2:
                    (folder / "arriving.gguf").write_bytes(content)
                    source = f"file:{folder / 'arriving.gguf'}"
                size = len(GOOD) if chance.random() < 0.5 else None
                found.trials[name] += 1
                try:
                    await store.add("m", source, sha256=digest(GOOD), size_bytes=size)
                except Ai4allError:
                    found.refused[name] += 1
                else:
                    found.faults.append(f"trial {number}: {name} from {source} was kept")
                found.faults += _under_final_names(data_dir, number)
                advance()
    return found


def _misbehave(server: FileServer, content: bytes, chance: random.Random) -> None:
    server.content = content
    server.script = [
        Cut(chance.randrange(len(content) + 1)) for _ in range(chance.choice((0, 0, 1)))
    ]
    server.honour_range = chance.random() < 0.7
    server.say_length = chance.random() < 0.8
    server.wrong_range = chance.random() < 0.1
    server.etag = chance.choice(('"v1"', '"v2"', None, 'W/"v1"'))


def _under_final_names(data_dir: Path, number: int) -> list[str]:
    """Files under a model's name whose content is not what the name says."""
    return [
        f"trial {number}: {path.name} lies there"
        for path in (data_dir / "models").glob("*.gguf")
        if digest(path.read_bytes()) != path.stem
    ]


# What was interrupted.


def spoil_interrupted(folder: Path, count: int, seed: int, advance: Callable[[], None]) -> Findings:
    """Interrupt downloads, spoil some of what is there of them, and go on."""
    return asyncio.run(_spoil_interrupted(folder, count, seed, advance))


async def _spoil_interrupted(
    folder: Path, count: int, seed: int, advance: Callable[[], None]
) -> Findings:
    chance, found = random.Random(seed), Findings()
    data_dir = folder / "data"
    with _every_hash_is_kept():
        async with serve_file(GOOD) as server:
            for number in range(count):
                store = ModelStore(data_dir, disk_reserve_bytes=0)
                name = await _interrupt(store, server, chance)
                found.trials[name] += 1
                found.faults += _under_final_names(data_dir, number)
                partials = [
                    path for path in (data_dir / "models").glob("*.partial") if path.stat().st_size
                ]
                is_spoiled = bool(partials) and chance.random() < 0.3
                if is_spoiled:
                    _spoil_partial(partials[0], chance)
                server.requests.clear()
                server.script = []
                model = await store.add("m", server.url, sha256=digest(GOOD))
                if model.path.read_bytes() != GOOD:
                    found.faults.append(f"trial {number}: {name} ended with other bytes")
                found.resumed += any("Range" in request for request in server.requests)
                found.mended += is_spoiled
                left = [p.name for p in (data_dir / "models").iterdir() if ".partial" in p.name]
                if left:
                    found.faults.append(f"trial {number}: {left} is left over")
                store.remove("m")
                advance()
    return found


async def _interrupt(store: ModelStore, server: FileServer, chance: random.Random) -> str:
    """Begin a download that does not come to its end."""
    at = chance.randrange(len(GOOD))
    if chance.random() < 0.5:
        server.script = [Cut(at), 404]
        try:
            await store.add("m", server.url, sha256=digest(GOOD))
        except Ai4allError:
            return "the link broke"
        raise AssertionError("a download without its end ended well")
    server.script = [Cut(at), 503, 503, 503, 503]
    asked = len(server.requests)
    task = asyncio.create_task(store.add("m", server.url, sha256=digest(GOOD)))
    while len(server.requests) < asked + 1 + chance.randrange(2):
        await asyncio.sleep(0)
    for _ in range(chance.randrange(20)):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return "it was cancelled"


def _spoil_partial(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    if chance.random() < 0.5:
        content[at] ^= 0xFF
    else:
        content += chance.randbytes(chance.randrange(1, 2 * len(GOOD)))
    path.write_bytes(content)
