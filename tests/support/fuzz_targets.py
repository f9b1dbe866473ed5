"""What is fuzzed: one function of bytes for each, and what it begins with.

A target takes any bytes. It returns quietly, or raises: every exception is a finding, and so is a
promise that does not hold (``AssertionError``). Errors that are promised are not exceptions here.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import struct
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ujson
from frame_mutants import Target as SessionTarget
from frame_mutants import golden_frames
from tiny_gguf import Tensor, encode_gguf, tiny_metadata, tiny_tensors

from ai4all.delivery.results_file import INSERT_RESULT, Row, open_file
from ai4all.errors import InvalidModelFile, RemoteProtocolError, SpoolError
from ai4all.models.gguf import read_header
from ai4all.protocol.codec import decode_client_message, decode_server_message

__all__ = ["TARGETS", "Findings", "FuzzTarget"]


@dataclass(frozen=True, slots=True)
class FuzzTarget:
    """One thing to feed.

    Attributes:
        make: Makes the function that takes the bytes, with a folder of its own to write in.
        seeds: What to begin with.
        words: Bytes that mean something to it.
        modules: What is watched for coverage.
        max_len: Longest input, in bytes.
    """

    make: Callable[[Path], Callable[[bytes], None]]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...]
    modules: tuple[str, ...]
    max_len: int


class Findings:
    """Keeps one input of each sort of failure, and goes on."""

    def __init__(self, target: str, feed: Callable[[bytes], None], keep: Path) -> None:
        self._target = target
        self._feed = feed
        self._keep = keep
        self._known: set[str] = set()
        self.executions = 0

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        try:
            self._feed(data)
        except Exception as error:  # noqa: BLE001 - each is a finding.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            if place in self._known:
                return
            self._known.add(place)
            path = self._keep / f"{self._target}-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            note = {"what": f"{place}: {error!s:.300}", "input": str(path)}
            with (self._keep / f"{self._target}.jsonl").open("a") as notes:
                notes.write(ujson.dumps(note) + "\n")


# Frames.


def _codec(folder: Path) -> Callable[[bytes], None]:
    sessions = [SessionTarget()]

    def feed(data: bytes) -> None:
        # A WebSocket library hands on text that is UTF-8, and bytes as they are.
        text = data.decode("utf-8", "replace")
        for frame in (data, text):
            for decode in (decode_server_message, decode_client_message):
                with contextlib.suppress(RemoteProtocolError):
                    decode(frame)
        try:
            sessions[0].feed(text)
        except BaseException:
            # What a session is after a fault is nobody's promise.
            sessions[0] = SessionTarget()
            raise

    return feed


def _frames() -> list[bytes]:
    folder = Path(__file__).parents[2] / "fixtures" / "wire"
    golden = [ujson.dumps(frame, escape_forward_slashes=False) for frame in golden_frames()]
    client = [path.read_text() for path in sorted(folder.glob("client-*.json"))]
    return [text.encode() for text in (*golden, *client)]


# Models.


def _gguf(folder: Path) -> Callable[[bytes], None]:
    path = folder / "model.gguf"

    def feed(data: bytes) -> None:
        # The input is the header; weights are not read, so there need be none.
        with path.open("wb") as file:
            file.write(data)
            file.truncate(len(data) + _WEIGHTS_BYTES)
        for arrays in (False, True):
            try:
                header = read_header(path, arrays=arrays)
            except InvalidModelFile:
                continue
            ends = header.data_offset
            for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
                assert tensor.offset >= ends, "tensors overlap"
                ends = tensor.offset + tensor.size_bytes
                assert ends <= header.size_bytes, "a tensor ends past the end"
            assert header.n_params > 0
            assert header.quantization
            assert header.vocabulary_size > 0
            assert min(header.block_count, header.context_length, header.embedding_length) > 0

    return feed


_WEIGHTS_BYTES: Final = 1 << 18
_SHAPE: Final = {"n_layers": 1, "n_embd": 32, "n_heads": 2, "n_kv_heads": 1, "n_ff": 64}


def _headers() -> list[bytes]:
    """Headers of models with a vocabulary that is as small as one may be."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1]
    metadata: dict[str, Any] = dict(tiny_metadata(n_ctx=64, **_SHAPE))
    metadata["tokenizer.ggml.tokens"] = ("array:str", names)
    metadata["tokenizer.ggml.scores"] = ("array:f32", [0.0] * len(names))
    metadata["tokenizer.ggml.token_type"] = ("array:i32", kinds)
    metadata["llama.vocab_size"] = ("u32", len(names))
    tensors = [_of_vocabulary(tensor, len(names)) for tensor in tiny_tensors(**_SHAPE)]
    plain = {k: v for k, v in metadata.items() if k != "tokenizer.chat_template"}
    short = {k: v for k, v in plain.items() if not k.startswith("tokenizer.")}
    variants = [metadata, plain, short, {**plain, "general.alignment": ("u32", 64)}]
    made = [encode_gguf(variant, tensors) for variant in variants]
    made += [encode_gguf(plain, tensors, version=2)]
    weights = sum(len(tensor.data) for tensor in tensors)
    return [content[: max(64, len(content) - weights)] for content in made]


def _of_vocabulary(tensor: Tensor, n_tokens: int) -> Tensor:
    if tensor.name not in ("token_embd.weight", "output.weight"):
        return tensor
    width = tensor.dims[0]
    row = len(tensor.data) // tensor.dims[1]
    return Tensor(tensor.name, (width, n_tokens), tensor.type, tensor.data[: row * n_tokens])


# The spool.

_PAYLOADS: Final = {f"b-{n}": f"result {n} ".encode() * (1 + 15 * n) for n in range(10)}


def _spool(folder: Path) -> Callable[[bytes], None]:
    known = set(_PAYLOADS.values())

    def feed(data: bytes) -> None:
        path = folder / "results.sqlite3"
        for old in folder.iterdir():
            old.unlink()
        # The length of the log, the log, the database.
        length = struct.unpack("<I", data[:4].ljust(4, b"\0"))[0]
        log, database = data[4 : 4 + length], data[4 + length :]
        path.write_bytes(database)
        if log:
            path.with_name(path.name + "-wal").write_bytes(log)
        try:
            connection, contents, _ = open_file(path)
        except SpoolError as error:
            # These files are somebody else's, and are left alone.
            if "newer version" in str(error) or "something else" in str(error):
                return
            raise
        with contextlib.closing(connection):
            assert {row.payload for row in contents.rows} <= known, "bytes that nobody committed"
            connection.execute(INSERT_RESULT, Row("another", b"another", 1.0).values())
        connection, after, recovery = open_file(path)
        connection.close()
        assert recovery is None, "damaged by being opened"
        was = {row.block_id: row.payload for row in contents.rows}
        now = {row.block_id: row.payload for row in after.rows}
        assert now == was | {"another": b"another"}, "what was read or committed is gone"

    return feed


def _spools() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.sqlite3"
        connection, _, _ = open_file(path)
        rows = [Row(block_id, payload, 1.0) for block_id, payload in _PAYLOADS.items()]
        for row in rows[:8]:
            connection.execute(INSERT_RESULT, row.values())
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        checkpointed = path.read_bytes()
        for row in rows[8:]:
            connection.execute(INSERT_RESULT, row.values())
        log = path.with_name(path.name + "-wal").read_bytes()
        connection.close()
        whole = path.read_bytes()
        old = Path(folder) / "old.sqlite3"
        with contextlib.closing(sqlite3.connect(old)) as first:
            first.executescript(_FIRST_SCHEMA)
            digest = hashlib.sha256(rows[0].payload).digest()
            insert = "INSERT INTO results VALUES (1, ?, ?, ?, 1.0)"
            first.execute(insert, (rows[0].block_id, rows[0].payload, digest))
            first.commit()
        return [
            struct.pack("<I", 0) + whole,
            struct.pack("<I", len(log)) + log + checkpointed,
            struct.pack("<I", 0) + old.read_bytes(),
            struct.pack("<I", 0),
        ]


_FIRST_SCHEMA: Final = """
CREATE TABLE results (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, block_id TEXT NOT NULL UNIQUE,
    payload BLOB NOT NULL, sha256 BLOB NOT NULL, committed_at REAL NOT NULL);
CREATE TABLE running (block_id TEXT PRIMARY KEY, begun_at REAL NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


TARGETS: Final[dict[str, FuzzTarget]] = {
    "codec": FuzzTarget(
        _codec,
        _frames,
        (
            *(b'"type"', b'"block_id"', b'"input"', b'"Assignment"', b'"Registered"', b'"NoWork"'),
            *(b'"ResultAck"', b'"Cancel"', b'"Drain"', b'"version"', b"\\ud800", b"1e999", b"NaN"),
        ),
        ("ai4all.protocol", "ai4all.types", "ai4all.tasks"),
        8192,
    ),
    "gguf": FuzzTarget(
        _gguf,
        _headers,
        (
            *(b"GGUF", b"general.architecture", b"general.alignment", b"tokenizer.ggml.tokens"),
            *(b"llama.block_count", b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80"),
        ),
        ("ai4all.models",),
        16_384,
    ),
    "spool": FuzzTarget(
        _spool,
        _spools,
        (b"SQLite format 3\0", b"results", b"running", b"INTEGER", b"BLOB", b"\x0d", b"\x05"),
        ("ai4all.delivery",),
        65_536,
    ),
}
"""By name."""
