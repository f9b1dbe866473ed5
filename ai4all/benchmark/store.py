"""Benchmark results on disk: the latest, and a bounded history.

Both files are written whole, to a temporary name first, so that a crash leaves the old ones. A
file that cannot be read is set aside under another name and never stops the worker: a benchmark
can be run again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path

import ujson
from pydantic import ValidationError

from ai4all.benchmark.scores import BenchmarkKey, BenchmarkResult
from ai4all.errors import DataDirectoryError

__all__ = ["BenchmarkStore"]

_log = logging.getLogger(__name__)

HISTORY_LIMIT = 500
"""Results kept, the oldest dropped first: about 1.5 MB."""


class BenchmarkStore:
    """Keeps results under ``DATA_DIR/benchmarks``.

    Args:
        data_dir: The data directory. Nothing is created before the first ``save``.
        history_limit: Results to keep.
    """

    def __init__(self, data_dir: Path, history_limit: int = HISTORY_LIMIT) -> None:
        self._folder = data_dir / "benchmarks"
        self._history_limit = history_limit

    @property
    def latest_path(self) -> Path:
        """Where the latest result is."""
        return self._folder / "latest.json"

    @property
    def history_path(self) -> Path:
        """Where the history is: JSON Lines, the oldest first."""
        return self._folder / "history.jsonl"

    def save(self, result: BenchmarkResult) -> Path:
        """Keep ``result`` as the latest and in the history; return where the latest is.

        Raises:
            DataDirectoryError: It could not be written.
        """
        kept = [*self.history(), result][-self._history_limit :]
        lines = "".join(_dump(each) + "\n" for each in kept)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self.history_path, lines)
            _replace(self.latest_path, _dump(result, indent=2) + "\n")
        except OSError as error:
            problem = f"the benchmark could not be kept: {error.strerror or error}"
            raise DataDirectoryError(self._folder, problem) from error
        return self.latest_path

    def history(self) -> list[BenchmarkResult]:
        """Every result kept, the oldest first. Lines that cannot be read are set aside."""
        text = self._read(self.history_path)
        results, bad = [], 0
        for line in (text or "").splitlines():
            result = _parse(line)
            if result is None:
                bad += 1
            else:
                results.append(result)
        if bad:
            self._set_aside(self.history_path, f"{bad} of its lines cannot be read")
            with contextlib.suppress(OSError):
                _replace(self.history_path, "".join(_dump(each) + "\n" for each in results))
        return results

    def latest(self, key: BenchmarkKey | None = None) -> BenchmarkResult | None:
        """The newest result, or the newest that has ``key``; None without one."""
        if key is not None:
            return next((r for r in reversed(self.history()) if r.key == key), None)
        text = self._read(self.latest_path)
        if text is not None:
            result = _parse(text)
            if result is not None:
                return result
            self._set_aside(self.latest_path, "it cannot be read")
        history = self.history()
        return history[-1] if history else None

    def previous(self, key: BenchmarkKey) -> BenchmarkResult | None:
        """The last result but one that has ``key``: what the newest is compared with."""
        same = [result for result in self.history() if result.key == key]
        return same[-2] if len(same) > 1 else None

    def registration_score(
        self,
        model_sha256: str | None = None,
        engine_build: str | None = None,
        device: str | None = None,
    ) -> float | None:
        """The composite to register with, or None when nothing was measured.

        The best run of the model with this build on the device counts, because noise from the
        machine's other work only ever lowers a score. Without a run of it, the newest of all that
        ran on the device: what another one can do promises nothing.

        Args:
            model_sha256: The model that shall be computed.
            engine_build: With what.
            device: Where, as ``BenchmarkKey.device``; None is anywhere.
        """
        runs = [r for r in self.history() if device is None or r.key.device == device]
        scores = [
            result.scores.composite
            for result in runs
            if (result.key.model_sha256, result.key.engine_build) == (model_sha256, engine_build)
        ]
        if scores:
            return max(scores)
        newest = runs[-1] if runs else self.latest()
        if newest is None or (device is not None and newest.key.device != device):
            return None
        return newest.scores.composite

    def has_run_on(self, model_sha256: str, engine_build: str, device: str) -> bool:
        """Whether a run of the model with this build on the device is kept."""
        wanted = (model_sha256, engine_build, device)
        return any(
            (r.key.model_sha256, r.key.engine_build, r.key.device) == wanted for r in self.history()
        )

    def _read(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            self._set_aside(path, "it is not UTF-8 text")
            return None
        except OSError as error:
            raise DataDirectoryError(path, error.strerror or str(error)) from error

    def _set_aside(self, path: Path, problem: str) -> None:
        aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
        try:
            path.rename(aside)
        except OSError as error:
            _log.warning("%s: %s, and it cannot be set aside: %s", path, problem, error)
        else:
            _log.warning("%s: %s; it is now %s", path, problem, aside.name)


def _dump(result: BenchmarkResult, indent: int = 0) -> str:
    return ujson.dumps(result.model_dump(mode="json"), indent=indent, escape_forward_slashes=False)


def _parse(text: str) -> BenchmarkResult | None:
    try:
        return BenchmarkResult.model_validate(ujson.loads(text))
    except (ValueError, ValidationError):
        return None


def _replace(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all, and durably."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
