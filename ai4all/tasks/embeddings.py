"""``EMBEDDINGS``: texts to rows of floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ai4all.backend.base import EmbedRequest
from ai4all.errors import EngineCrashed
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import EmbeddingsInput, EmbeddingsOutput, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["embed"]


async def embed(job: Job, task_input: EmbeddingsInput) -> Computed:
    """Embed all texts in batches of the engine's choosing.

    The rows stay one float32 array until the output is made.

    Raises:
        ContextOverflow: A text does not fit; it is never cut.
    """
    embeddings = await job.backend.embed(
        EmbedRequest(
            texts=tuple(task_input.texts), normalize=task_input.normalize, deadline=job.deadline
        )
    )
    usage = Usage(
        prompt_tokens=embeddings.prompt_tokens,
        completion_tokens=0,
        total_tokens=embeddings.prompt_tokens,
    )
    job.processed = job.expected = embeddings.prompt_tokens
    output = EmbeddingsOutput(
        embeddings=_wire_rows(embeddings.vectors),
        dimensions=embeddings.vectors.shape[1],
        usage=usage,
    )
    return Computed(output, usage, embeddings.timings, embeddings.fingerprint)


def _wire_rows(vectors: npt.NDArray[np.float32]) -> list[list[float]]:
    """Rows of the shortest decimals that are still the same float32: half the length on the wire.

    Raises:
        EngineCrashed: A value is not finite.
    """
    import numpy as np

    if not np.isfinite(vectors).all():
        raise EngineCrashed("the engine gave an embedding that is not finite")
    rows: list[list[float]] = vectors.astype(np.str_).astype(np.float64).tolist()
    return rows
