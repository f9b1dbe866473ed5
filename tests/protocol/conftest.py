from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ujson

from ai4all.protocol.messages import WorkerCapabilities, envelope
from ai4all.protocol.session import Session, SessionOptions
from ai4all.types.task import TaskType

GOLDEN = Path(__file__).parents[2] / "fixtures" / "wire"


def counting_envelopes() -> Callable[[], str]:
    """Envelopes that differ from frame to frame and are the same in every run."""
    numbers: Iterator[int] = itertools.count(1)
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def next_envelope() -> str:
        number = next(numbers)
        return envelope(f"e-{number}", start + timedelta(seconds=number))

    return next_envelope


@pytest.fixture
def capabilities() -> WorkerCapabilities:
    return WorkerCapabilities(
        backend="cpu",
        supported_tasks=[TaskType.TEXT_COMPLETION],
        supports_training=False,
        memory_mb=8192,
        compute_score=0.5,
    )


@pytest.fixture
def make_session(capabilities: WorkerCapabilities) -> Callable[..., Session]:
    def make(**options: Any) -> Session:
        return Session(
            "w-1",
            capabilities,
            0.5,
            envelope=counting_envelopes(),
            options=SessionOptions(**options),
        )

    return make


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    def load(name: str) -> dict[str, Any]:
        frame: dict[str, Any] = ujson.loads((GOLDEN / f"{name}.json").read_text())
        return frame

    return load
