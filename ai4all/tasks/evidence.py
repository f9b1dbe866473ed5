"""Where in a context an answer comes from."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Final

from ai4all.tasks.sentences import sentence_spans, words

__all__ = ["find_evidence"]

# An answer that is a single common word may stand anywhere; more places than this say nothing.
_MAX_VERBATIM: Final = 8

_MAX_SENTENCES: Final = 3

# Share of the answer's weight that a sentence must add to be evidence for it.
_LEAST_SHARE: Final = 0.25

# Such an answer is a claim in the words of the question.
_VERDICTS: Final = frozenset({"yes", "no", "true", "false"})

_OUTER_MARKS: Final = " \t\r\n\"'`“”‘’«»*.,;:!?()[]"


def find_evidence(answer: str, question: str, context: str) -> list[tuple[int, int]]:
    """Find the answer in its context.

    Where it stands there word for word, that is the evidence: regardless of case, of the kind of
    white space, and of marks around it. Otherwise it is the sentences that share most with it,
    where rare words weigh more than common ones.

    Returns:
        ``[start, end)`` in characters of the context, in order and without overlap; none when
        nothing in the context speaks for the answer.
    """
    return _verbatim(answer, context) or _sentences(answer, question, context)


def _verbatim(answer: str, context: str) -> list[tuple[int, int]]:
    parts = answer.strip(_OUTER_MARKS).split()
    if not parts or not words(answer):
        return []
    pattern = r"\s+".join(map(re.escape, parts))
    # Whole words only, where the script has a space between them.
    for bounded in (rf"(?<!\w){pattern}(?!\w)", pattern if not answer.isascii() else None):
        if bounded is None:
            continue
        found = [match.span() for match in re.finditer(bounded, context, re.IGNORECASE)]
        if found:
            return found[:_MAX_VERBATIM]
    return []


def _sentences(answer: str, question: str, context: str) -> list[tuple[int, int]]:
    wanted = set(words(answer))
    asked = set(words(question))
    if wanted & _VERDICTS:
        wanted = (wanted - _VERDICTS) | asked
    spans = list(sentence_spans(context))
    bags = [set(words(context[start:end])) for start, end in spans]
    weight = _weights(wanted | asked, bags)
    total = _sum(wanted, weight)

    chosen: list[int] = []
    missing = wanted
    while spans and total > 0.0 and len(chosen) < _MAX_SENTENCES:
        # Of sentences that tell as much of the answer, the one that is about the question.
        best = max(
            range(len(spans)),
            key=lambda at: (_sum(missing & bags[at], weight), _sum(asked & bags[at], weight)),
        )
        if _sum(missing & bags[best], weight) < _LEAST_SHARE * total:
            break
        chosen.append(best)
        missing = missing - bags[best]
    return [spans[at] for at in sorted(chosen)]


def _weights(vocabulary: Set[str], bags: list[set[str]]) -> Mapping[str, float]:
    """Inverse document frequency, with sentences for documents; highest for what is not there."""
    counts = Counter(word for bag in bags for word in bag if word in vocabulary)
    return {word: math.log(1.0 + len(bags) / max(counts[word], 0.5)) for word in vocabulary}


def _sum(chosen: Set[str], weight: Mapping[str, float]) -> float:
    return math.fsum(weight[word] for word in chosen)
