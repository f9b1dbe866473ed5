from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ai4all.backend.base import EngineOptions, LabelScores, ScoreRequest, Timings
from ai4all.backend.fake import FakeBackend
from ai4all.backend.native import NativeBackend
from ai4all.benchmark.fit import FitRow, candidate_types, choose, cost_of
from ai4all.benchmark.perplexity import perplexity, perplexity_text
from ai4all.errors import ContextOverflow
from ai4all.models.gguf import read_header
from ai4all.models.reencode import reencode
from ai4all.types.model import ModelFile
from ai4all.types.task import Fingerprint

ORIGINAL = FitRow("Q4_1", "aa", 100, 20.0, 900, 100.0, 300.0, 120.0)


def row(name: str, speed: float, ppl: float) -> FitRow:
    return replace(ORIGINAL, type_name=name, tokens_per_second=speed, perplexity=ppl)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([("Q4_0", 250.0, 20.9), ("Q8_0", 200.0, 20.0)], "Q4_0"),
        ([("Q4_0", 250.0, 21.1), ("Q8_0", 200.0, 20.0)], "Q8_0"),
        ([("Q4_0", 250.0, 30.0), ("Q8_0", 102.0, 19.0)], "Q4_1"),
        ([("Q4_0", 90.0, 19.0)], "Q4_1"),
        ([], "Q4_1"),
    ],
)
def test_the_fastest_within_the_bound_wins_by_more_than_noise(
    candidates: list[tuple[str, float, float]], chosen: str
) -> None:
    rows = [ORIGINAL, *(row(*candidate) for candidate in candidates)]
    assert choose(rows, 0.05).type_name == chosen


def test_candidates_are_not_what_the_model_is_already(tiny_model: Path) -> None:
    header = read_header(tiny_model)
    assert candidate_types(header) == ["Q4_0", "Q8_0"]
    wide = replace(header, metadata={**header.metadata, "llama.embedding_length": 512})
    assert candidate_types(wide) == ["Q4_0", "Q4_K_S", "Q8_0"]
    already = replace(header, metadata={**header.metadata, "general.file_type": 7})
    assert candidate_types(already) == ["Q4_0"]


def test_what_it_costs_is_said() -> None:
    assert "cannot win back" in cost_of("Q4_1", "Q8_0")
    assert "rounded again" in cost_of("Q8_0", "Q4_0")
    assert cost_of("F16", "Q8_0") == ""


# Perplexity.


class Uniform(FakeBackend):
    """Every token has the probability 1/50; a word is a token, and few fit."""

    def __init__(self, most: int = 10_000) -> None:
        super().__init__()
        self.scored: list[str] = []
        self._most = most

    async def score_labels(self, request: ScoreRequest) -> LabelScores:
        n_tokens = len(request.continuations[0].split())
        if n_tokens + len(request.prompt.split()) > self._most:
            raise ContextOverflow("too long")
        assert request.continuations[0].startswith(" ")
        self.scored.append(request.continuations[0])
        timings = Timings(0, 0, 0, 0, None, 0, None, None)
        fingerprint = Fingerprint.model_construct()
        score = -n_tokens * math.log(50.0)
        return LabelScores((score,), (n_tokens,), 1, timings, fingerprint)


@pytest.mark.parametrize("most", [10_000, 100, 20])
async def test_perplexity_is_that_of_every_token_once(most: int) -> None:
    backend = Uniform(most)
    result = await perplexity(backend)
    assert result.value == pytest.approx(50.0)
    words = perplexity_text().split()
    skipped = len(words) - result.tokens
    assert 0 < skipped <= 64
    assert backend.scored[-1].endswith(words[-1])


async def test_a_context_of_nothing_fails() -> None:
    with pytest.raises(ContextOverflow):
        await perplexity(Uniform(2))
    with pytest.raises(ValueError, match="words"):
        await perplexity(Uniform(), "two words")


async def test_perplexity_of_a_real_model_is_finite_and_repeats(tiny_model: Path) -> None:
    async with NativeBackend() as backend:
        file = ModelFile("tiny", tiny_model, "ab" * 32, 1)
        await backend.load(file, EngineOptions(n_ctx=512, threads=1))
        text = " ".join(perplexity_text().split()[:150])
        first, second = await perplexity(backend, text), await perplexity(backend, text)
    assert first == second
    # Random weights know nothing: worse than guessing, but not absurd.
    assert 10.0 < first.value < 1e6
    assert first.tokens > 100


@pytest.mark.model
async def test_a_wider_encoding_costs_the_reference_model_nothing(
    reference_model: Path, tmp_path: Path
) -> None:
    fitted = tmp_path / "q8.gguf"
    await reencode(reference_model, fitted, "Q8_0", threads=1)
    text = " ".join(perplexity_text().split()[:300])
    values = []
    async with NativeBackend() as backend:
        for path in (reference_model, fitted):
            file = ModelFile("m", path, "ab" * 32, 1)
            await backend.load(file, EngineOptions(n_ctx=1024, threads=1))
            values.append(await perplexity(backend, text))
    before, after = values
    # A text that it never saw: far better than guessing among 49,152 tokens.
    assert 10.0 < before.value < 200.0
    assert after.tokens == before.tokens > 250
    assert after.value == pytest.approx(before.value, rel=0.01)
    assert after.value != before.value
