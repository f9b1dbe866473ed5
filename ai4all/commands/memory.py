"""What the models here would take, told without loading one."""

from __future__ import annotations

from ai4all.backend.base import Capabilities
from ai4all.backend.devices import CPU
from ai4all.config import Settings
from ai4all.errors import InvalidModelFile
from ai4all.models.gguf import read_header
from ai4all.models.offload import Offload, plan_offload
from ai4all.types.model import DeviceInfo, ModelFile

__all__ = ["MemoryAsked"]


class MemoryAsked:
    """Estimates for the settings of this machine.

    Args:
        settings: How models run.
        capabilities: What the engine sees. Without an engine, weights count as used where they
            lie, and no GPU takes a share.
    """

    def __init__(self, settings: Settings, capabilities: Capabilities | None) -> None:
        self._options = settings.engine_options()
        cpu = DeviceInfo(CPU, "cpu", "", 0, 0)
        self._capabilities = capabilities or Capabilities("cpu", (cpu,), "", None)

    def plan_for(self, model: ModelFile) -> Offload | None:
        """Where a model would go, and what it would take; None when its file is not sound.

        Raises:
            DeviceUnavailable: The device that the settings name is not to be had.
            OutOfMemory: It holds not one layer.
        """
        try:
            header = read_header(model.path)
        except InvalidModelFile:
            return None
        return plan_offload(header, self._options, self._capabilities)
