"""Perplexity of a model over a fixed text: what re-encoding its weights has cost.

The text is cut into windows of whole words. Each is scored as the continuation of the words
before it, and every token but those of the first words is scored once::

    perplexity = exp(-(sum of log p(token | context and earlier tokens of its window)) / tokens)

Files of one model share its tokenizer, so their windows and tokens are the same, and the
difference between their figures is that of their weights. Figures of models with different
tokenizers do not compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ai4all.backend.base import InferenceBackend, ScoreRequest
from ai4all.benchmark.suite import benchmark_prompts
from ai4all.errors import ContextOverflow

__all__ = ["Perplexity", "perplexity", "perplexity_text"]

_CONTEXT_WORDS = 64
_WINDOW_WORDS = 96
_SMALLEST_WINDOW = 4
_MOST_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The figure, and the number of tokens it is the mean of."""

    value: float
    tokens: int


def perplexity_text() -> str:
    """The text: about 750 words of our own, which no model was trained on."""
    return benchmark_prompts()[-1][1]


async def perplexity(backend: InferenceBackend, text: str | None = None) -> Perplexity:
    """Measure the model that ``backend`` holds.

    Args:
        backend: With the model loaded.
        text: In place of ours.

    Raises:
        UnsupportedTask: The backend does not score.
        ContextOverflow: Not even a few words fit into the context.
        ComputeError: It could not be computed.
    """
    words = (perplexity_text() if text is None else text).split()
    window = _WINDOW_WORDS
    while True:
        try:
            return await _over_windows(backend, words, window)
        except ContextOverflow:
            if window <= _SMALLEST_WINDOW:
                raise
            window //= 2


async def _over_windows(backend: InferenceBackend, words: list[str], window: int) -> Perplexity:
    context = min(_CONTEXT_WORDS, window)
    total, n_tokens = 0.0, 0
    for start in range(context, len(words), window):
        scores = await backend.score_labels(
            ScoreRequest(
                prompt=" ".join(words[start - context : start]),
                # The space belongs to the first word, so that it is cut as in running text.
                continuations=(" " + " ".join(words[start : start + window]),),
            )
        )
        if scores.token_counts[0] > _MOST_TOKENS:
            raise ContextOverflow(f"a window has {scores.token_counts[0]} tokens")
        total += scores.log_likelihoods[0]
        n_tokens += scores.token_counts[0]
    if n_tokens == 0:
        raise ValueError(f"the text has no more than {context} words")
    return Perplexity(math.exp(-total / n_tokens), n_tokens)
