"""What every command stands on: compute, settings, models, and where output goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ai4all import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from ai4all.backend.base import InferenceBackend
    from ai4all.config import Settings

__all__ = [
    "Environment",
    "log_to_terminal",
    "print_json",
    "read_settings",
    "stderr_console",
    "stdout_console",
    "version_line",
]


def _open_native_backend() -> InferenceBackend:
    from ai4all.backend.registry import open_backend

    return open_backend("native")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a caller of the command line may put in place of the real thing.

    Attributes:
        open_backend: Gives a backend with nothing loaded; the command closes it.
    """

    open_backend: Callable[[], InferenceBackend] = _open_native_backend

    def open_backend_for_blocks(self, settings: Settings) -> InferenceBackend:
        """A backend that computes for others: in a process of its own, unless set otherwise.

        One that a caller has put in place is taken as it is.
        """
        if settings.isolation.in_process or self.open_backend is not _open_native_backend:
            return self.open_backend()
        from ai4all.backend.crash_records import CrashRecords
        from ai4all.backend.isolated import IsolatedBackend
        from ai4all.backend.quarantine import QUARANTINE_FILE, Quarantine
        from ai4all.backend.watchdog import WatchdogLimits

        isolation = settings.isolation
        return IsolatedBackend(
            crash_records=CrashRecords(settings.data_dir / "logs" / "crashes"),
            quarantine=Quarantine(settings.data_dir / QUARANTINE_FILE),
            limits=WatchdogLimits(
                load=isolation.load_limit_seconds,
                prefill=isolation.prefill_limit_seconds,
                decode=isolation.decode_limit_seconds,
                silence=isolation.silence_limit_seconds,
            ),
        )


def version_line() -> str:
    """Our version, and how the engine was built or why there is none."""
    from ai4all.backend import registry
    from ai4all.errors import EngineUnavailable

    try:
        build = registry.build_info()
    except EngineUnavailable as error:
        return f"ai4all-native {__version__} (no engine: {error})"
    return f"ai4all-native {__version__} (engine: {build['engine_build']})"


def read_settings(config_file: Path | None, data_dir: Path | None, **flags: object) -> Settings:
    """Read the settings.

    Args:
        config_file: What ``--config`` says.
        data_dir: What ``--data-dir`` says.
        flags: Further flags by the key they set, with ``__`` for the dot; None was not given.

    Raises:
        ConfigError: A key or value is wrong, or the file cannot be read.
    """
    from ai4all.config import load_settings

    overrides = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(config_file, {"data_dir": data_dir, **overrides})


def log_to_terminal(settings: Settings) -> None:
    """Send warnings and worse to standard error, and nothing to a file.

    For commands that answer and end: they must not create a data directory only to log into it.
    """
    from ai4all.logs import configure_logging

    without_file = settings.log.model_copy(update={"file": False})
    configure_logging(settings.model_copy(update={"log": without_file}), quiet=True)


def print_json(value: Any) -> None:
    """Print ``value`` on standard output: the whole of what ``--json`` prints."""
    import ujson

    # ASCII only: what reads this need not share the locale.
    sys.stdout.write(ujson.dumps(value, indent=2, escape_forward_slashes=False) + "\n")
    sys.stdout.flush()


def stdout_console() -> Console:
    """For tables and results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """For progress and for what happens on the way; never mixed into results."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)
