"""``EMBEDDINGS``: texts to rows of floats."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from ai4all.backend.base import EmbedRequest
from ai4all.errors import BadRequest, EngineCrashed
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import EmbeddingsInput, EmbeddingsOutput, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["embed"]

# A digit and a comma: what no number of a row is shorter than.
_LEAST_BYTES: Final = 2


async def embed(job: Job, task_input: EmbeddingsInput) -> Computed:
    """Embed all texts in batches of the engine's choosing.

    The rows stay one float32 array until the output is made.

    Raises:
        BadRequest: The rows do not fit into one message, or are more than is computed at once.
        ContextOverflow: A text does not fit; it is never cut.
    """
    embeddings = await job.backend.embed(
        EmbedRequest(
            texts=tuple(task_input.texts), normalize=task_input.normalize, deadline=job.deadline
        )
    )
    values, most = embeddings.vectors.size, job.max_result_bytes
    if most is not None and values * _LEAST_BYTES > most:
        raise BadRequest(
            f"texts: {len(task_input.texts)} embeddings are {values} numbers, and a message has at"
            f" most {most} bytes; ask for fewer"
        )
    usage = Usage(
        prompt_tokens=embeddings.prompt_tokens,
        completion_tokens=0,
        total_tokens=embeddings.prompt_tokens,
    )
    job.processed = job.expected = embeddings.prompt_tokens
    output = EmbeddingsOutput(
        # A second for a million numbers: not on the loop.
        embeddings=await asyncio.to_thread(_wire_rows, embeddings.vectors),
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
    # Row by row: a call of numpy's does not let others run.
    return [row.astype(np.str_).astype(np.float64).tolist() for row in vectors]
