from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from task_runs import MODEL, run_task

from ai4all.backend.base import Embeddings, EmbedRequest, EngineOptions
from ai4all.backend.fake import FakeBackend
from ai4all.errors import BadRequest, ContextOverflow, EngineCrashed
from ai4all.tasks import Job, compute, parse_input
from ai4all.types.task import EmbeddingsOutput, TaskType

TEXTS = ["the dog chased the cat", "a dog chased a cat away", "interest rates rise"]


class Odd(FakeBackend):
    """Gives one value in place of all."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    async def embed(self, request: EmbedRequest) -> Embeddings:
        found = await super().embed(request)
        vectors = np.full_like(found.vectors, self.value)
        return Embeddings(vectors, found.prompt_tokens, found.timings, found.fingerprint)


async def embed(backend: FakeBackend, **task_input: Any) -> EmbeddingsOutput:
    output = (await run_task(backend, TaskType.EMBEDDINGS, **task_input)).output
    assert isinstance(output, EmbeddingsOutput)
    return output


async def test_each_text_has_its_row_in_order() -> None:
    together = await embed(FakeBackend(), texts=TEXTS)
    assert len(together.embeddings) == len(TEXTS)
    assert {len(row) for row in together.embeddings} == {together.dimensions}
    for text, row in zip(TEXTS, together.embeddings, strict=True):
        assert (await embed(FakeBackend(), texts=[text])).embeddings == [row]


async def test_paraphrases_are_closer_than_strangers() -> None:
    one, two, stranger = np.array((await embed(FakeBackend(), texts=TEXTS)).embeddings)
    assert one @ two > one @ stranger


@pytest.mark.parametrize("normalize", [True, False])
async def test_rows_have_length_one_only_when_wanted(normalize: bool) -> None:
    backend = FakeBackend()
    output = await embed(backend, texts=TEXTS, normalize=normalize)
    lengths = [math.hypot(*row) for row in output.embeddings]
    assert all(math.isclose(length, 1.0, abs_tol=1e-6) for length in lengths) is normalize
    assert backend.calls.embeddings[0].normalize is normalize


async def test_usage_counts_every_text() -> None:
    output = await embed(FakeBackend(), texts=TEXTS)
    words = sum(len(text.split()) for text in TEXTS)
    assert output.usage.model_dump() == {
        "prompt_tokens": words,
        "completion_tokens": 0,
        "total_tokens": words,
    }


async def test_the_wire_has_the_very_float32_in_few_digits() -> None:
    value = np.float32(0.1)
    output = await embed(Odd(float(value)), texts=["x"])
    assert output.embeddings[0][0] == 0.1
    assert np.float32(output.embeddings[0][0]) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_what_is_no_number_is_the_engines_fault(value: float) -> None:
    with pytest.raises(EngineCrashed, match="finite"):
        await embed(Odd(value), texts=["x"])


async def test_a_text_that_does_not_fit_is_not_cut() -> None:
    with pytest.raises(ContextOverflow):
        await embed(FakeBackend(n_ctx=8), texts=["short", "word " * 9])


async def test_what_no_message_can_hold_is_refused_before_it_is_written_out() -> None:
    backend = FakeBackend()
    await backend.load(MODEL, EngineOptions())
    parsed = parse_input(TaskType.EMBEDDINGS, {"texts": TEXTS})
    job = Job(TaskType.EMBEDDINGS, parsed, backend, None, lambda text, count: None)
    fits = await compute(job)
    assert isinstance(fits.output, EmbeddingsOutput)
    job.max_result_bytes = 2 * 3 * fits.output.dimensions
    assert (await compute(job)).output == fits.output
    job.max_result_bytes -= 1
    with pytest.raises(BadRequest, match="texts: 3 embeddings"):
        await compute(job)
