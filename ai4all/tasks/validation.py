"""``VALIDATION``: a task done again in the same way every time, and the hash of its answer."""

from __future__ import annotations

import hashlib

from ai4all.tasks.embeddings import embed
from ai4all.tasks.generation import complete_text
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import (
    EmbeddingsInput,
    EmbeddingsOutput,
    TaskOutput,
    TextCompletionInput,
    TextCompletionOutput,
    ValidationInput,
    ValidationOutput,
)

__all__ = ["answer_hash", "validate"]


async def validate(job: Job, task_input: ValidationInput) -> Computed:
    """Do the inner task without chance, and compare the hash of its answer.

    A generation is greedy and in deterministic mode, whatever its input says of temperature.

    Raises:
        As the inner task.
    """
    inner = task_input.task
    if isinstance(inner, TextCompletionInput):
        greedy = inner.model_copy(update={"temperature": 0.0, "deterministic": True})
        done = await complete_text(job, greedy)
    else:
        assert isinstance(inner, EmbeddingsInput)
        done = await embed(job, inner)
    found = answer_hash(done.output)
    output = ValidationOutput(
        valid=found == task_input.expected_hash.lower(),
        answer_hash=found,
        result=done.output.model_dump(mode="json"),
    )
    return Computed(output, done.usage, done.timings, done.fingerprint)


def answer_hash(output: TaskOutput) -> str:
    """SHA-256 of an answer, as 64 lower-case hexadecimal digits.

    Of a ``TextCompletion``: over the text in UTF-8. Of ``Embeddings``: over all rows in order, each
    value rounded to four decimals (half to even, in double precision; no negative zero) and written
    as a little-endian float32.
    """
    match output:
        case TextCompletionOutput():
            content = output.text.encode("utf-8")
        case EmbeddingsOutput():
            import numpy as np

            # Adding zero makes negative zero positive.
            rounded = np.rint(np.asarray(output.embeddings, np.float64) * 1e4) / 1e4 + 0.0
            content = rounded.astype("<f4").tobytes()
        case _:
            raise TypeError(f"{type(output).__name__} has no hash")
    return hashlib.sha256(content).hexdigest()
