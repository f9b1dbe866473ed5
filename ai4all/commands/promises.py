"""What a worker promises, from the benchmarks that are kept."""

from __future__ import annotations

from ai4all.backend.base import Capabilities, EngineOptions, LoadedModel
from ai4all.backend.devices import choose_devices, device_label
from ai4all.benchmark.scores import BenchmarkKey
from ai4all.benchmark.speed_watch import SpeedBaseline
from ai4all.benchmark.store import BenchmarkStore
from ai4all.worker_health import WorkerHealth

__all__ = ["Promises"]


class Promises:
    """The score, the device and the speed that a worker is held to.

    Args:
        store: The benchmarks.
        model_sha256: The model that the worker starts with.
        engine_build: The build that it computes with.
    """

    def __init__(self, store: BenchmarkStore, model_sha256: str, engine_build: str) -> None:
        self._store = store
        self._model_sha256 = model_sha256
        self._engine_build = engine_build
        self._scores: dict[str, float | None] = {}

    def score_on(self, device: str) -> float | None:
        """The composite to register with when ``device`` computes. Read once for each device."""
        if device not in self._scores:
            self._scores[device] = self._store.registration_score(
                self._model_sha256, self._engine_build, device
            )
        return self._scores[device]

    def baseline_of(self, loaded: LoadedModel) -> SpeedBaseline | None:
        """The speed of the last benchmark of this model, build, device and threads."""
        key = BenchmarkKey(
            model_sha256=loaded.file.sha256,
            engine_build=self._engine_build,
            device=loaded.device,
            threads=loaded.threads,
        )
        kept = self._store.latest(key)
        return SpeedBaseline.of(kept.prompts) if kept is not None else None

    def health(self, capabilities: Capabilities, engine: EngineOptions) -> WorkerHealth:
        """What is promised now.

        Raises:
            DeviceUnavailable: The device that the owner named is not to be had.
        """
        choice = choose_devices(
            capabilities.devices,
            engine.device,
            build=capabilities.build_info,
            allow_cpu_fallback=engine.allow_cpu_fallback,
        )
        label = device_label([gpu.name for gpu in choice.gpus], whole=True)
        has_run = self._store.has_run_on(self._model_sha256, self._engine_build, label)
        # A score that was measured with every layer on the device promises just that, unless its
        # owner has named another number of layers since.
        whole = has_run and choice.gpus and engine.gpu_layers < 0
        return WorkerHealth(capabilities, engine, whole={self._model_sha256} if whole else ())
