"""Settings that change under a running worker: what it takes up, and what waits for a restart."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ai4all.config import Settings, changed_keys, with_keys_of
from ai4all.errors import ConfigError, DataDirectoryError, DeviceUnavailable

__all__ = ["LiveSettings", "is_taken_up"]

_log = structlog.get_logger(__name__)

_SECTIONS = ("engine.", "log.")
# It is found, hashed and looked at before the worker starts.
_FIXED_OF_SECTIONS = frozenset({"engine.draft_model"})
_KEYS = frozenset(
    {
        "worker.max_concurrent_tasks",
        "worker.progress_interval_ms",
        "worker.stop_grace_seconds",
    }
)
# Of the link, all that a new connection can have otherwise. Another coordinator is not the same
# one under a new address: the results that wait are not for it.
_LINK = "coordinator."
_FIXED_OF_LINK = frozenset(
    {
        "coordinator.max_message_bytes",
        "coordinator.max_reconnect_attempts",
        "coordinator.reconnect_interval_ms",
        "coordinator.reconnect_jitter",
        "coordinator.token",
        "coordinator.url",
    }
)


def is_taken_up(key: str) -> bool:
    """Whether a running worker takes up another value of the setting."""
    if key.startswith(_LINK):
        return key not in _FIXED_OF_LINK
    return key in _KEYS or (key.startswith(_SECTIONS) and key not in _FIXED_OF_SECTIONS)


class LiveSettings:
    """The settings that a worker runs with.

    Args:
        settings: Those that it was started with.
        reread: Reads them again, with the flags that were given.
        apply: Has the worker run with others. Nothing has changed when it raises.
    """

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        apply: Callable[[Settings], None],
    ) -> None:
        self._settings = settings
        self._reread = reread
        self._apply = apply

    @property
    def settings(self) -> Settings:
        """Those that it runs with now."""
        return self._settings

    def reload(self) -> None:
        """Read the settings again and take up what can be; one line of the log says what.

        Where something is wrong with them, all stays as it was, and the line says that.
        """
        try:
            new = self._reread()
            changed = changed_keys(self._settings, new)
            taken_up = [key for key in changed if is_taken_up(key)]
            settings = with_keys_of(self._settings, new, taken_up)
            # Also when nothing has changed: what the token's file holds may have.
            self._apply(settings)
        except (ConfigError, DataDirectoryError, DeviceUnavailable) as error:
            _log.error("settings_not_reloaded", error=str(error))
            return
        self._settings = settings
        _log.info(
            "settings_reloaded",
            taken_up=taken_up,
            after_restart=[key for key in changed if key not in taken_up],
        )
