"""One task on a scripted engine, from its input to its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ai4all.backend.base import EngineOptions
from ai4all.backend.fake import FakeBackend
from ai4all.tasks import Computed, Job, compute, parse_input
from ai4all.types.model import ModelFile
from ai4all.types.task import TaskType

MODEL = ModelFile("tiny", Path("absent.gguf"), "ab" * 32, 1)


async def run_task(backend: FakeBackend, task_type: TaskType, **task_input: Any) -> Computed:
    """Load the model if there is none, and do the task."""
    if backend.loaded is None:
        await backend.load(MODEL, EngineOptions())
    parsed = parse_input(task_type, task_input)
    return await compute(Job(task_type, parsed, backend, None, lambda text, count: None))
