"""What a machine needs before it can work: an identity, a model, a benchmark."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rich.console import Console

from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.tuning_store import TuningStore
from ai4all.commands.drafting import Drafting
from ai4all.commands.environment import Environment
from ai4all.commands.measure import measure
from ai4all.config import Settings
from ai4all.errors import ModelNotFound
from ai4all.first_run import ensure_first_run, open_store, prepare_data_dir
from ai4all.models.fitted import FittedModels
from ai4all.models.progress import show_download
from ai4all.models.sources import BENCHMARK_MODEL_ID
from ai4all.models.store import ModelStore
from ai4all.types.model import ModelFile

__all__ = ["Station", "prepare_station"]


@dataclass(frozen=True, slots=True)
class Station:
    """A machine that is ready.

    Attributes:
        worker_id: Its persistent identity.
        store: Its models.
        models: The same as they shall be computed: fitted ones where the owner asked for it.
        tunings: The fastest ways to run them, as far as they were measured.
        drafting: Gives them their draft model.
        model: The one that the settings name, as it shall be computed.
        first_benchmark: What the first run measured, if it was done just now.
    """

    worker_id: str
    store: ModelStore
    models: FittedModels
    tunings: TuningStore
    drafting: Drafting
    model: ModelFile
    first_benchmark: BenchmarkResult | None

    def options_for(
        self, model: ModelFile, options: EngineOptions, capabilities: Capabilities
    ) -> EngineOptions:
        """``options`` for ``model``; what they leave open as it was measured to be fastest."""
        options = self.tunings.options_for(options, model.sha256, capabilities)
        return self.drafting.options_for(options, model)


async def prepare_station(
    environment: Environment, settings: Settings, console: Console
) -> Station:
    """Do what is left of the first run, and find the model that the settings name.

    Raises:
        ConfigError: The draft model that they name cannot be used.
        DataDirectoryError: The data directory cannot be used.
        ModelError: A model cannot be had.
        ComputeError: The benchmark of the first run failed.
    """
    await asyncio.to_thread(prepare_data_dir, settings.data_dir)
    store = open_store(settings)
    chosen = None
    drafting = await Drafting.find(settings, console)
    if settings.worker.model != BENCHMARK_MODEL_ID:
        # Before anything is downloaded: a name typed wrong should not cost the wait.
        with show_download(console, settings.worker.model) as progress:
            chosen = await store.resolve(settings.worker.model, progress)

    async def run_benchmark(model: ModelFile) -> BenchmarkResult:
        console.print("first run: measuring this machine")
        return await measure(
            lambda: environment.open_backend_for_blocks(settings),
            model,
            settings.engine_options(),
            settings.data_dir,
            console,
        )

    report = await ensure_first_run(settings, store, run_benchmark, console)
    model = chosen or report.model
    if model is None:
        raise ModelNotFound(settings.worker.model)
    models = FittedModels(store, use_all=settings.models.use_fitted)
    model = await asyncio.to_thread(models.get, model.model_id)
    await asyncio.to_thread(drafting.require, model)
    tunings = TuningStore(settings.data_dir)
    return Station(report.worker_id, store, models, tunings, drafting, model, report.benchmark)
