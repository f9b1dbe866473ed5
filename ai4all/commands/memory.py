"""What the models here would take, told without loading one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ai4all.backend.base import Capabilities
from ai4all.backend.devices import CPU
from ai4all.config import Settings
from ai4all.errors import InvalidModelFile
from ai4all.models.draft import draft_misfit
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.offload import Offload, plan_offload
from ai4all.types.model import DeviceInfo, ModelFile

__all__ = ["MemoryAsked"]


class MemoryAsked:
    """Estimates for the settings of this machine.

    Args:
        settings: How models run.
        capabilities: What the engine sees. Without an engine, weights count as used where they
            lie, and no GPU takes a share.
        here: The models that are here, the draft model perhaps among them.
    """

    def __init__(
        self,
        settings: Settings,
        capabilities: Capabilities | None,
        here: Collection[ModelFile],
    ) -> None:
        self._options = settings.engine_options()
        self._draft = _draft_file(settings.engine.draft_model, here)
        cpu = DeviceInfo(CPU, "cpu", "", 0, 0)
        self._capabilities = capabilities or Capabilities("cpu", (cpu,), "", None)

    def plan_for(self, model: ModelFile) -> Offload | None:
        """Where a model would go, and what it would take; None when its file is not sound.

        With the draft model of the settings, where that is here and drafts for it.

        Raises:
            DeviceUnavailable: The device that the settings name is not to be had.
            OutOfMemory: It holds not one layer.
        """
        try:
            header = read_header(model.path)
        except InvalidModelFile:
            return None
        draft = self._draft_for(model)
        return plan_offload(header, self._options, self._capabilities, draft=draft)

    def _draft_for(self, model: ModelFile) -> GGUFHeader | None:
        if self._draft is None or self._draft == model.path:
            return None
        try:
            target, draft = (read_header(path, arrays=True) for path in (model.path, self._draft))
        except InvalidModelFile:
            return None
        return draft if draft_misfit(target, draft) is None else None


def _draft_file(name: str, here: Collection[ModelFile]) -> Path | None:
    if not name:
        return None
    by_id = next((model.path for model in here if model.model_id == name), None)
    return by_id or (path if (path := Path(name).expanduser()).is_file() else None)
