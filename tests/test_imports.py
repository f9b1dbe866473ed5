"""Imports go one way through the house. Whoever adds a room gives it a place here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ai4all

PACKAGE = Path(ai4all.__file__).parent

# A room may import itself and any room on a lower storey.
STOREYS: tuple[tuple[str, ...], ...] = (
    ("types", "version", "clock"),
    ("errors",),
    ("protocol",),
    ("backend", "delivery"),
    ("models",),
    ("benchmark", "config"),
    ("worker", "coordinator", "first_run", "logs"),
    ("cli",),
)
# Files that stand outside the folder of their room, by name without suffix.
ROOM_OF_FILE = {
    "__init__": "version",
    "blocks": "worker",
    "self_description": "worker",
    "suspend": "worker",
    "tasks": "worker",
    "commands": "cli",
    "data_dir_lock": "first_run",
}
STOREY_OF = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}

# What decides and what is said must run without a loop, a socket and an engine.
PURE = ("types", "protocol")
# The one shell around the session, and the socket that it opens.
IMPURE_FILES = (
    "protocol/connection.py",
    "protocol/guarded_socket.py",
    "protocol/dialing.py",
    "protocol/steady_socket.py",
)
NEVER_IN_PURE = {"asyncio", "websockets", "threading", "socket", "ai4all._engine"}
DOOR_TO_NATIVE_CODE = "backend/native.py"


@dataclass(frozen=True)
class Import:
    """``file`` (relative to the package) imports ``module``."""

    file: str
    module: str

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            module = node.module or ""
            if module == "ai4all":
                for alias in node.names:
                    yield Import(file, f"ai4all.{alias.name}")
            else:
                yield Import(file, module)


def all_imports() -> list[Import]:
    return [
        found
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in imports_of(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))
    ]


def room_of(name: str) -> str:
    """``config_x`` is a part of the room ``config``."""
    if name in ROOM_OF_FILE:
        return ROOM_OF_FILE[name]
    whole, _, part = name.partition("_")
    return whole if part and whole in STOREY_OF else name


def room_of_file(file: str) -> str:
    return room_of(Path(file).parts[0].removesuffix(".py"))


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "ai4all":
        return None
    name = parts[1] if len(parts) > 1 else "__init__"
    if name.startswith("__"):
        return "version"
    # The extension belongs to the room of its one door.
    return "backend" if name == "_engine" else room_of(name)


def wrong_way(found: Import) -> bool:
    above, below = room_of_file(found.file), room_of_module(found.module)
    return below is not None and above != below and STOREY_OF[below] >= STOREY_OF[above]


def impure(found: Import) -> bool:
    if room_of_file(found.file) not in PURE or found.file in IMPURE_FILES:
        return False
    return any(
        found.module == name or found.module.startswith(name + ".") for name in NEVER_IN_PURE
    )


def test_every_room_has_its_storey() -> None:
    rooms = {room_of_file(str(path.relative_to(PACKAGE))) for path in PACKAGE.rglob("*.py")}
    assert rooms <= STOREY_OF.keys()


def test_imports_go_one_way() -> None:
    assert [str(found) for found in all_imports() if wrong_way(found)] == []


def test_types_and_protocol_know_no_loop_and_no_engine() -> None:
    assert [str(found) for found in all_imports() if impure(found)] == []


def test_native_code_has_one_door() -> None:
    doors = {found.file for found in all_imports() if found.module == "ai4all._engine"}
    assert doors <= {DOOR_TO_NATIVE_CODE}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("errors.py", "from ai4all.protocol.codec import encode"),
        ("protocol/codec.py", "import ai4all.worker"),
        ("delivery/spool.py", "def f():\n    from ai4all.models import store"),
        ("worker.py", "from ai4all.coordinator import EmbeddedCoordinator"),
        ("coordinator/server.py", "from ai4all import blocks"),
        ("backend/base.py", "from ai4all.commands import doctor"),
    ],
)
def test_an_import_the_wrong_way_would_be_found(file: str, source: str) -> None:
    assert any(map(wrong_way, imports_of(source, file)))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("types/task.py", "import asyncio"),
        ("protocol/session.py", "import asyncio.queues"),
        ("protocol/codec.py", "from websockets.exceptions import ConnectionClosed"),
        ("protocol/states.py", "from ai4all import _engine"),
    ],
)
def test_an_impure_import_would_be_found(file: str, source: str) -> None:
    assert any(map(impure, imports_of(source, file)))


def test_the_command_line_answers_without_loading_the_house() -> None:
    code = (
        "import sys, ai4all.cli\n"
        "heavy = {'pydantic', 'numpy', 'websockets', 'aiohttp', 'psutil', 'structlog',"
        " 'ai4all._engine', 'ai4all.worker', 'ai4all.coordinator'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
