"""GPU figures for heartbeats: asked for in threads of their own, so that no driver delays a beat.

A probe that hangs leaves its thread behind and its figures run out; one that fails again and again
is not asked any more. Either costs its figures and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ai4all.backend.base import GpuFigures
from ai4all.backend.gpu_probes import AmdProbe, NvidiaProbe, Probe, bus_address
from ai4all.types.model import DeviceInfo

__all__ = ["GpuMonitor", "GpusInUse"]

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 5.0
_PATIENCE_S: Final = 15.0
_MOST_FAILURES: Final = 3


@dataclass(frozen=True, slots=True)
class GpusInUse:
    """The figures of some GPUs: each, and together."""

    each: tuple[GpuFigures, ...] = ()

    @property
    def percent(self) -> float | None:
        """Mean share of time that they are busy."""
        known = [figures.percent for figures in self.each if figures.percent is not None]
        return round(sum(known) / len(known), 1) if known else None

    @property
    def memory_used_mb(self) -> int | None:
        """Memory in use on all together, in MiB."""
        known = [f.memory_used_mb for f in self.each if f.memory_used_mb is not None]
        return sum(known) if known else None


class GpuMonitor:
    """Keeps the latest figures. No thread is started before they are asked for.

    Args:
        probes: What to ask; by default, all that there are.
        interval: Seconds between two questions.
        patience: Seconds after which an answer is out of date, and one that is late is given up.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        probes: Sequence[Callable[[], Probe]] = (NvidiaProbe, AmdProbe),
        *,
        interval: float = _INTERVAL_S,
        patience: float = _PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watches = [_Watch(probe(), interval, patience, clock) for probe in probes]

    def figures(self, devices: Iterable[DeviceInfo]) -> GpusInUse:
        """The latest figures of ``devices``. Never blocks; the first time, there are none yet."""
        wanted = [device for device in devices if device.is_gpu]
        if not wanted:
            return GpusInUse()
        known: dict[str, GpuFigures] = {}
        for watch in self._watches:
            known |= watch.latest()
        found = (_of(device, known) for device in wanted)
        return GpusInUse(tuple(figures for figures in found if figures is not None))

    def close(self) -> None:
        """Ask no more. A thread that hangs in a driver is left to the end of the process."""
        for watch in self._watches:
            watch.close()


class _Watch:
    """One probe and its thread."""

    def __init__(
        self, probe: Probe, interval: float, patience: float, clock: Callable[[], float]
    ) -> None:
        self._probe = probe
        self._interval = interval
        self._patience = patience
        self._clock = clock
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # Replaced as a whole by the thread, read by the loop: no lock is needed.
        self._answer: tuple[float, dict[str, GpuFigures]] | None = None
        self._is_late = False

    def latest(self) -> dict[str, GpuFigures]:
        now = self._clock()
        if self._thread is None and not self._closed.is_set():
            self._answer = (now, {})
            self._thread = threading.Thread(
                target=self._run, name=f"gpu-figures-{self._probe.name}", daemon=True
            )
            self._thread.start()
        if self._answer is None:
            return {}
        answered_at, figures = self._answer
        if now - answered_at <= self._interval + self._patience:
            self._is_late = False
            return figures
        if not self._is_late and self._thread is not None and self._thread.is_alive():
            self._is_late = True
            _log.warning(
                "the %s driver does not answer; its figures are left out", self._probe.name
            )
        return {}

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        failures = 0
        while not self._closed.is_set():
            try:
                self._answer = (self._clock(), self._probe.read())
                failures = 0
            except ImportError:
                _log.debug("no %s figures: its library is not installed", self._probe.name)
                return
            except Exception as error:  # noqa: BLE001 - a driver's fault costs its figures alone.
                failures += 1
                if failures >= _MOST_FAILURES:
                    text = " ".join(str(error).split())
                    _log.info("no %s figures: %s: %s", self._probe.name, type(error).__name__, text)
                    return
            self._closed.wait(self._interval)


def _of(device: DeviceInfo, known: dict[str, GpuFigures]) -> GpuFigures | None:
    figures = known.get(bus_address(device.address)) if device.address else None
    if figures is None and not device.address and len(known) == 1:
        # The driver does not say which card this is, but there is only one.
        (figures,) = known.values()
    return None if figures is None else dataclasses.replace(figures, name=device.name)
