"""The engine with the reference model: what a tiny random model cannot show."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from ai4all.backend.base import (
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    PromptProgress,
    ScoreRequest,
)
from ai4all.backend.native import NativeBackend, quantize_file
from ai4all.types.model import ModelFile

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

TEXT = (Path(__file__).parents[2] / "fixtures" / "long_prompt.txt").read_text()


@pytest.fixture
async def backend(reference_model: Path) -> AsyncIterator[NativeBackend]:
    sha256 = await asyncio.to_thread(
        lambda: hashlib.sha256(reference_model.read_bytes()).hexdigest()
    )
    backend = NativeBackend()
    file = ModelFile("benchmark", reference_model, sha256, 0)
    await backend.load(file, EngineOptions(n_ctx=4096, n_slots=8))
    yield backend
    await backend.close()


def greedy(prompt: str, max_tokens: int, **more: object) -> GenerateRequest:
    fields: dict[str, object] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
    }
    return GenerateRequest(**(fields | more))  # type: ignore[arg-type]


async def test_eight_at_once_are_each_as_good_as_alone(backend: NativeBackend) -> None:
    cities = ["France", "Germany", "Italy", "Spain", "Japan", "Russia", "Egypt", "China"]
    ends = await asyncio.gather(
        *(
            backend.complete(greedy(f"The capital of {city} is", 12, ignore_eos=True))
            for city in cities
        )
    )
    assert all(end.usage.completion_tokens == 12 for end in ends)
    assert max(end.fingerprint.batched_with for end in ends) == 7
    for city, capital in (("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome")):
        assert capital in ends[cities.index(city)].text


@pytest.mark.parametrize(
    "prompt",
    [
        f"Repeat this text word for word.\n\n{TEXT[:600]}\n\nThe text, word for word:\n\n",
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
        "class Point3:\n",
        "Once upon a time, in a village by the sea,",
    ],
)
async def test_speculation_does_not_change_greedy_output(
    backend: NativeBackend, prompt: str
) -> None:
    plain = await backend.complete(
        greedy(prompt, 80, ignore_eos=True, speculate=False, reuse_prefix=False)
    )
    drafted = await backend.complete(
        greedy(prompt, 80, ignore_eos=True, speculate=True, reuse_prefix=False)
    )
    assert plain.draft_tokens == 0
    assert drafted.draft_accepted <= drafted.draft_tokens
    assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize("weights", ["Q4_K_M", "F16"])
async def test_other_weights_are_verified_no_further_than_exactly(
    reference_model: Path, tmp_path: Path, weights: str
) -> None:
    """Kernels for many tokens at once add up otherwise than those for one, in some formats."""
    path = tmp_path / "model.gguf"
    await asyncio.to_thread(quantize_file, reference_model, path, weights, 2)
    file = ModelFile("model", path, "0" * 64, 0)
    # Its own draft model, so that whole drafts are right, and as long as they may be.
    options = EngineOptions(n_ctx=256, threads=1, draft=file, draft_tokens=16)
    async with NativeBackend() as backend:
        await backend.load(file, options)
        plain, drafted = [
            await backend.complete(
                greedy(
                    "List three uses for a brick:\n1.",
                    24,
                    ignore_eos=True,
                    speculate=on,
                    reuse_prefix=False,
                    logprobs=0,
                )
            )
            for on in (False, True)
        ]
    # To the last bit: another word comes of other bits only now and then.
    assert len(plain.logprobs) == 24
    assert drafted.logprobs == plain.logprobs


async def test_a_long_prompt_can_be_cancelled_in_the_middle(backend: NativeBackend) -> None:
    stream = backend.generate(greedy(TEXT * 3, 10, reuse_prefix=False))
    async for event in stream:
        assert isinstance(event, PromptProgress)
        assert event.processed < event.total
        break
    await stream.aclose()
    after = await backend.complete(greedy("The capital of France is", 4))
    assert "Paris" in after.text
    # The cancelled prompt was not computed to its end before this one began.
    assert after.fingerprint.batched_with == 0


async def test_a_decode_that_is_broken_off_is_no_error(
    backend: NativeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ai4all.engine")
    said: list[logging.LogRecord] = []
    # It may fall between two decodes, and llama.cpp then has nothing to say.
    for _ in range(20):
        stream = backend.generate(greedy(TEXT * 3, 10, reuse_prefix=False))
        await anext(stream)
        await asyncio.sleep(0.02)
        await stream.aclose()
        await backend.complete(greedy("The", 1))
        if said := [record for record in caplog.records if "failed" in record.getMessage()]:
            break
    assert {record.levelno for record in said} == {logging.DEBUG}


async def test_a_shared_prefix_is_computed_once(backend: NativeBackend) -> None:
    cold = await backend.complete(greedy(TEXT + "\n\nSummary:", 4))
    warm = await backend.complete(greedy(TEXT + "\n\nTitle:", 4))
    assert cold.fingerprint.prefix_reused == 0
    assert warm.fingerprint.prefix_reused > 0.9 * warm.usage.prompt_tokens
    again = await backend.complete(greedy(TEXT + "\n\nTitle:", 4, deterministic=True))
    assert again.fingerprint.prefix_reused == 0
    assert again.fingerprint.deterministic


async def test_paraphrases_are_closer_than_strangers(backend: NativeBackend) -> None:
    texts = ("The cat sat on the mat.", "A cat is sitting on a rug.", "Share prices fell today.")
    rows = (await backend.embed(EmbedRequest(texts=texts))).vectors
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-4)
    near, far = float(rows[0] @ rows[1]), float(rows[0] @ rows[2])
    assert near > far + 0.05


async def test_the_likely_continuation_scores_highest(backend: NativeBackend) -> None:
    scores = await backend.score_labels(
        ScoreRequest(
            prompt="The capital of France is", continuations=(" Berlin", " Paris", " banana")
        )
    )
    assert int(np.argmax(scores.log_likelihoods)) == 1
    # The score of one token is that token's log probability in a generation.
    end = await backend.complete(greedy("The capital of France is", 1, logprobs=1))
    assert end.logprobs[0].text == " Paris"
    assert scores.log_likelihoods[1] == pytest.approx(end.logprobs[0].logprob, abs=0.05)
