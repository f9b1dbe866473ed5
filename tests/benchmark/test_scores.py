from __future__ import annotations

import pytest

from ai4all.benchmark.scores import PromptFigures, composite_score, score


def row(tokens: int, total_ms: float, ttft_ms: float) -> PromptFigures:
    return PromptFigures(
        name="x",
        prompt_tokens=4,
        completion_tokens=tokens,
        time_to_first_token_ms=ttft_ms,
        queue_ms=0.0,
        load_ms=0.0,
        prompt_ms=ttft_ms,
        first_sample_ms=0.0,
        total_ms=total_ms,
        prompt_tokens_per_second=None,
        decode_tokens_per_second=None,
    )


@pytest.mark.parametrize(
    ("tokens_per_second", "ttft_ms", "expected"),
    [
        (25.0, 200.0, 0.7 * 0.5 + 0.3 * 0.5),
        (500.0, 10.0, 1.0),
        (50.0, 100.0, 1.0),
        (0.0, 1000.0, 0.03),
        (10.0, 0.0, 0.44),
    ],
)
def test_composite(tokens_per_second: float, ttft_ms: float, expected: float) -> None:
    assert composite_score(tokens_per_second, ttft_ms) == pytest.approx(expected)


def test_scores_are_sums_over_sums_and_means() -> None:
    scores = score([row(100, 1000.0, 10.0), row(100, 3000.0, 50.0)], memory_mb=400)
    # 200 tokens in 4 s; the mean of the rows' own speeds would be 66.7.
    assert scores.tokens_per_second == 50.0
    assert scores.time_to_first_token_ms == 30.0
    assert scores.memory_efficiency == 0.5
    assert scores.composite == composite_score(50.0, 30.0)


def test_no_memory_figure_counts_as_one() -> None:
    assert score([row(7, 1.0, 1.0)], memory_mb=0).memory_efficiency == 7.0


def test_nothing_measured_is_no_score() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        score([], 1)
    with pytest.raises(ValueError, match="no time"):
        score([row(1, 0.0, 0.0)], 1)
