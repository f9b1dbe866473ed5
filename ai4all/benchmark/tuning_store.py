"""What the search for the fastest way to run a model found, on disk, and how it is applied."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Literal

import ujson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.backend.cores import usable_cores
from ai4all.backend.devices import CPU, choose_devices
from ai4all.errors import DataDirectoryError, DeviceUnavailable
from ai4all.models.files import write_atomically

__all__ = ["PEACE", "Trial", "Tuning", "TuningKey", "TuningStore", "is_open", "with_tuning"]

_log = logging.getLogger(__name__)

_MOST_KEPT = 64
_MAX_BYTES = 1 << 20

PEACE = 0.25
"""Share of the machine that others may use while ways to run a model are compared."""

_Rate = Annotated[float, Field(gt=0.0)] | None


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)


class TuningKey(_Kept):
    """What a tuning holds for. The same machine with fewer cores to use is another one."""

    model_sha256: str
    engine_build: str
    device: str
    usable_cores: float | None

    @classmethod
    def of(cls, model_sha256: str, capabilities: Capabilities, options: EngineOptions) -> TuningKey:
        """The key of a model as the backend will run it, before it is loaded."""
        return cls(
            model_sha256=model_sha256,
            engine_build=capabilities.engine_build,
            device=_first_device(capabilities, options),
            usable_cores=usable_cores(),
        )

    def is_same_machine(self, other: TuningKey) -> bool:
        """Whether all but the model is the same."""
        return self.model_copy(update={"model_sha256": other.model_sha256}) == other


def _first_device(capabilities: Capabilities, options: EngineOptions) -> str:
    if options.gpu_layers == 0:
        return CPU
    try:
        return choose_devices(capabilities.devices, options.device).names[0]
    except DeviceUnavailable:
        # The load will say so; or it falls back.
        return CPU


class Trial(_Kept):
    """One way that was tried, and its median speeds in tokens per second.

    A speed is None where it was not measured.
    """

    threads: int = Field(ge=0)
    threads_batch: int = Field(ge=0)
    ubatch: int = Field(ge=1)
    flash_attention: Literal["auto", "on", "off"]
    prompt_tokens_per_second: _Rate = None
    decode_tokens_per_second: _Rate = None


class Tuning(_Kept):
    """The best way that was found.

    Attributes:
        key: What it holds for.
        timestamp: RFC 3339, UTC.
        seconds: What the search took.
        is_complete: Whether there was time for all that it had to try.
        other_load: Share of the machine that others used before it began, 0..1.
        trials: All that was tried, the first as it is without tuning.
    """

    key: TuningKey
    timestamp: str
    threads: int = Field(ge=0)
    threads_batch: int = Field(ge=0)
    ubatch: int = Field(ge=1)
    flash_attention: Literal["auto", "on", "off"]
    seconds: float = Field(ge=0.0)
    is_complete: bool
    other_load: float = Field(ge=0.0, le=1.0)
    trials: list[Trial]

    @property
    def is_sound(self) -> bool:
        """Whether the machine had the time and the peace for it; else it is worth repeating."""
        return self.is_complete and self.other_load < PEACE


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    tunings: list[Tuning] = Field(default_factory=list)


class TuningStore:
    """Keeps tunings in ``DATA_DIR/benchmarks/tuning.json``, the newest last.

    A file that cannot be read counts as empty: what it held can be measured again.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "benchmarks" / "tuning.json"

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def save(self, tuning: Tuning) -> None:
        """Keep ``tuning`` in place of the one with its key.

        Raises:
            DataDirectoryError: It could not be written.
        """
        others = [each for each in self.all() if each.key != tuning.key]
        file = _File(tunings=[*others, tuning][-_MOST_KEPT:])
        content = ujson.dumps(file.model_dump(), indent=2, escape_forward_slashes=False)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, f"{content}\n".encode())
        except OSError as error:
            problem = f"the tuning could not be kept: {error.strerror or error}"
            raise DataDirectoryError(self._path, problem) from error

    def all(self) -> list[Tuning]:
        """Every tuning kept, the newest last."""
        try:
            with self._path.open("rb") as file:
                return _File.model_validate(ujson.loads(file.read(_MAX_BYTES))).tunings
        except FileNotFoundError:
            return []
        except (OSError, ValueError, ValidationError) as error:
            _log.warning("%s cannot be read and counts as empty: %s", self._path, type(error))
            return []

    def get(self, key: TuningKey) -> Tuning | None:
        """The tuning of ``key``."""
        return next((each for each in self.all() if each.key == key), None)

    def options_for(
        self, options: EngineOptions, model_sha256: str, capabilities: Capabilities
    ) -> EngineOptions:
        """Fill in what ``options`` leave open.

        A model that was not measured itself gets the threads of the one that was measured last on
        the same machine, which says more than a count of cores; the rest depends on the model.
        """
        key = TuningKey.of(model_sha256, capabilities, options)
        tunings = self.all()
        own = next((each for each in tunings if each.key == key), None)
        if own is not None:
            return with_tuning(options, own)
        near = next((each for each in reversed(tunings) if key.is_same_machine(each.key)), None)
        if near is None:
            return options
        return dataclasses.replace(
            options,
            threads=options.threads or near.threads,
            threads_batch=_threads_batch(options, near),
        )


def is_open(options: EngineOptions) -> bool:
    """Whether ``options`` leave anything to a tuning."""
    has_threads = options.threads and options.threads_batch
    return not (has_threads and options.n_ubatch and options.flash_attention != "auto")


def with_tuning(options: EngineOptions, tuning: Tuning) -> EngineOptions:
    """``options``, with what they leave open as ``tuning`` found it best.

    Open is: no threads, no ubatch, flash attention "auto". What the owner set stays.
    """
    flash = options.flash_attention
    # A quantized cache needs flash attention, whatever a search with another cache found.
    if flash == "auto" and not options.kv_type.startswith("q"):
        flash = tuning.flash_attention
    return dataclasses.replace(
        options,
        threads=options.threads or tuning.threads,
        threads_batch=_threads_batch(options, tuning),
        n_ubatch=options.n_ubatch or tuning.ubatch,
        flash_attention=flash,
    )


def _threads_batch(options: EngineOptions, tuning: Tuning) -> int:
    # Threads that the owner set hold for prompts, too, as long as he says nothing else.
    return options.threads_batch or options.threads or tuning.threads_batch
