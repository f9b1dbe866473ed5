"""What the models here would take, told without loading one."""

from __future__ import annotations

from ai4all.backend import registry
from ai4all.config import Settings
from ai4all.errors import EngineUnavailable, InvalidModelFile
from ai4all.models.gguf import read_header
from ai4all.models.memory import MemoryEstimate, estimate_memory
from ai4all.types.model import ModelFile

__all__ = ["MemoryAsked"]


class MemoryAsked:
    """Estimates for the settings of this machine.

    Without an engine, weights count as used where they lie, and no GPU takes a share.
    """

    def __init__(self, settings: Settings) -> None:
        self._options = settings.engine_options()
        self._cpu_features: tuple[str, ...] = ()
        self._has_gpu = False
        try:
            self._cpu_features = tuple(registry.build_info()["cpu_features"])
            targets = registry.targets()
        except EngineUnavailable:
            return
        self._has_gpu = any(target.available and target.name != "cpu" for target in targets)

    def of(self, model: ModelFile) -> MemoryEstimate | None:
        """The estimate of a model; None when its file is missing or not sound."""
        try:
            header = read_header(model.path)
        except InvalidModelFile:
            return None
        return estimate_memory(
            header, self._options, cpu_features=self._cpu_features, has_gpu=self._has_gpu
        )
