"""``CLASSIFICATION``: how much more likely a text makes each label.

The model reads the text once and every label is scored after it in the same batch. A label is
never compared by its plain likelihood, because short and common words would win whatever the text
says. What counts is the gain over a text without content (contextual calibration: Zhao et al.,
2021; the difference of log-likelihoods is the pointwise mutual information of Holtzman et al.,
2021). ``docs/tasks.md`` has the figures of the alternatives.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from weakref import WeakKeyDictionary

from ai4all.backend.base import InferenceBackend, LabelScores, ScoreRequest, Timings
from ai4all.errors import BadRequest
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import ClassificationInput, ClassificationOutput, Prediction, Usage

__all__ = [
    "CONTENT_FREE",
    "check_labels",
    "classify",
    "exclusive",
    "gains",
    "independent",
    "score_request",
]

CONTENT_FREE: Final = ("N/A", "")
"""Texts that say nothing; the likelihood of a label after them is its prior."""

_PRIORS_KEPT: Final = 64

# By backend, so that they go with it; by model and labels within.
_Priors = OrderedDict[bytes, tuple[float, ...]]
_priors: WeakKeyDictionary[InferenceBackend, _Priors] = WeakKeyDictionary()


def check_labels(task_input: ClassificationInput) -> None:
    """Refuse labels that cannot be told apart or that say nothing.

    Raises:
        BadRequest: With the place of the label.
    """
    seen: dict[str, int] = {}
    for index, label in enumerate(task_input.labels):
        name = " ".join(label.split())
        if not name:
            raise BadRequest(f"input.labels.{index}: a label needs more than white space")
        first = seen.setdefault(name, index)
        if first != index:
            raise BadRequest(f"input.labels.{index}: the same label as input.labels.{first}")


async def classify(job: Job, task_input: ClassificationInput) -> Computed:
    """Score every label and sort them, the highest first; of equals, the first named.

    Exclusive labels share a probability of 1. With ``multi_label`` each has its own, and one half
    means that the text makes the label neither likelier nor less likely.

    Raises:
        ContextOverflow: The text does not fit; it is never cut.
    """
    job.expected = 1 + len(CONTENT_FREE)
    scores = await job.backend.score_labels(
        score_request(task_input.text, task_input.labels, job.deadline)
    )
    job.processed = 1
    priors, spent = await _priors_of(job, task_input.labels)
    job.processed = job.expected

    over_prior = gains(scores.log_likelihoods, priors)
    shares = independent(over_prior) if task_input.multi_label else exclusive(over_prior)
    ranked = sorted(zip(task_input.labels, shares, strict=True), key=lambda pair: -pair[1])
    read = scores.prompt_tokens + sum(scores.token_counts)
    usage = Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read)
    output = ClassificationOutput(
        predictions=[Prediction(label=label, score=score) for label, score in ranked], usage=usage
    )
    return Computed(output, usage, _sum([scores.timings, *spent]), scores.fingerprint)


def score_request(text: str, labels: Sequence[str], deadline: float | None = None) -> ScoreRequest:
    """What the model reads: the text once, and each label in the place of its continuation.

    The labels are not listed before the text. A small model takes that for a hint at the last one.
    """
    return ScoreRequest(
        prompt=f"Text: {text}\nLabel:",
        continuations=tuple(" " + " ".join(label.split()) for label in labels),
        deadline=deadline,
    )


def gains(log_likelihoods: Sequence[float], priors: Sequence[float]) -> list[float]:
    """How much likelier the text makes each label, in nats.

    Both are sums over the label's tokens, so what a label loses by its length it loses twice, and
    the difference is not normalised again.
    """
    return [given - prior for given, prior in zip(log_likelihoods, priors, strict=True)]


def exclusive(over_prior: Sequence[float]) -> list[float]:
    """Softmax: the posterior of each label when all were equally likely before."""
    most = max(over_prior)
    weights = [math.exp(gain - most) for gain in over_prior]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def independent(over_prior: Sequence[float]) -> list[float]:
    """Logistic function of each gain by itself."""
    # tanh neither overflows nor loses the small ones' order.
    return [0.5 * (1.0 + math.tanh(0.5 * gain)) for gain in over_prior]


async def _priors_of(job: Job, labels: Sequence[str]) -> tuple[tuple[float, ...], list[Timings]]:
    """The labels' mean log-likelihoods after the texts that say nothing, and the time spent.

    They do not depend on the text, and are kept for the next one with the same labels.
    """
    loaded = job.backend.loaded
    kept = _priors.setdefault(job.backend, OrderedDict())
    # Only a digest is kept: labels may be long.
    digest = hashlib.sha256((loaded.file.sha256 if loaded is not None else "").encode())
    for label in labels:
        digest.update(hashlib.sha256(label.encode("utf-8", "replace")).digest())
    key = digest.digest()
    if key in kept:
        kept.move_to_end(key)
        return kept[key], []
    found: list[LabelScores] = []
    for text in CONTENT_FREE:
        found.append(await job.backend.score_labels(score_request(text, labels, job.deadline)))
        job.processed += 1
    columns = zip(*(scores.log_likelihoods for scores in found), strict=True)
    priors = tuple(math.fsum(column) / len(CONTENT_FREE) for column in columns)
    kept[key] = priors
    while len(kept) > _PRIORS_KEPT:
        kept.popitem(last=False)
    return priors, [scores.timings for scores in found]


def _sum(timings: Sequence[Timings]) -> Timings:
    return replace(
        timings[0],
        queue_ms=math.fsum(part.queue_ms for part in timings),
        load_ms=math.fsum(part.load_ms for part in timings),
        prompt_ms=math.fsum(part.prompt_ms for part in timings),
        total_ms=math.fsum(part.total_ms for part in timings),
    )
