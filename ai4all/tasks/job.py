"""A task at work, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from ai4all.backend.base import Completion, InferenceBackend, Timings
from ai4all.types.task import Fingerprint, TaskOutput, TaskType, Usage

__all__ = ["Computed", "Job"]


@dataclass(frozen=True, slots=True)
class Computed:
    """A task's output, what it cost, and what computed it."""

    output: TaskOutput
    usage: Usage
    timings: Timings
    fingerprint: Fingerprint


@dataclass(slots=True)
class Job:
    """One task at work.

    Attributes:
        task_type: What to do.
        input: Its checked input.
        backend: What computes; its model is loaded.
        deadline: ``time.monotonic()`` value after which the work is dropped, or None.
        on_text: Called with text that became certain and the count of tokens so far.
        on_completion: Called with each generation that ended well, or None.
        max_result_bytes: Longest message that can tell the result, or None for no bound.
        processed: Tokens done: of the prompt, and sampled.
        expected: Tokens that there can be at most, as far as is known.
    """

    task_type: TaskType
    input: BaseModel
    backend: InferenceBackend
    deadline: float | None
    on_text: Callable[[str, int], None]
    on_completion: Callable[[Completion], None] | None = None
    max_result_bytes: int | None = None
    processed: int = 0
    expected: int = 0

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1, by tokens; it never goes back."""
        return min(1.0, self.processed / self.expected) if self.expected else 0.0
