"""The engine: scripted, with faults that follow from chance, and the models it can load."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from ai4all.backend.base import EngineOptions, GenerateRequest, LoadedModel
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.clock import Clock
from ai4all.errors import EngineCrashed, LoadFailed, ModelNotFound, OutOfMemory
from ai4all.types.model import ModelFile

_NAMES = {"tiny": "a", "other": "b"}


class Store:
    """A model store that is a dictionary.

    Attributes:
        is_empty: Somebody has deleted the files.
    """

    def __init__(self) -> None:
        self.is_empty = False
        self._files = {
            name: ModelFile(name, Path(f"{name}.gguf"), digit * 64, 100)
            for name, digit in _NAMES.items()
        }

    def get(self, model_id: str) -> ModelFile:
        if self.is_empty or model_id not in self._files:
            raise ModelNotFound(model_id)
        return self._files[model_id]

    def list(self) -> list[ModelFile]:
        return [] if self.is_empty else list(self._files.values())


class SeededEngine(FakeBackend):
    """A ``FakeBackend`` that works, is slow, fails or hangs as chance has it.

    Args:
        rng: Chance.
        clock: The machine's clocks.
        trouble: Chance of a fault in a generation, 0 to 1, as it is now.
        pace: Factor on all times.
    """

    def __init__(
        self, rng: random.Random, clock: Clock, trouble: Callable[[], float], pace: float
    ) -> None:
        self._trouble = trouble
        self._pace = pace
        self._rng = rng
        super().__init__(self._script_of, load_ms=rng.uniform(50.0, 3000.0), clock=clock)

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        fails = self._rng.random() < self._trouble()
        self._load_error = LoadFailed("the file could not be read") if fails else None
        return await super().load(model, options, progress)

    def _script_of(self, request: GenerateRequest, number: int) -> ScriptedGeneration:
        rng = self._rng
        usual = ScriptedGeneration(
            prompt_ms=rng.uniform(1.0, 300.0) * self._pace,
            token_ms=rng.uniform(1.0, 200.0) * self._pace,
        )
        if rng.random() >= self._trouble():
            return usual
        at = rng.randrange(request.max_tokens + 1)
        match rng.randrange(4):
            case 0:
                return ScriptedGeneration(token_ms=5.0, error=EngineCrashed("abort"), error_at=at)
            case 1:
                return ScriptedGeneration(error=OutOfMemory("no room"), error_at=0)
            case 2:
                return ScriptedGeneration(token_ms=5.0, hang_at=at)
            case _:
                return ScriptedGeneration(token_ms=rng.uniform(1000.0, 30_000.0))
