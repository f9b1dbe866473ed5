from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_runs import run_task

from ai4all.backend.base import EngineOptions, ScoreRequest
from ai4all.backend.fake import FakeBackend
from ai4all.errors import BadRequest, ContextOverflow
from ai4all.tasks import parse_input
from ai4all.tasks.classification import CONTENT_FREE, exclusive, independent
from ai4all.types.model import ModelFile
from ai4all.types.task import ClassificationOutput, TaskType

ANIMALS = ["cat", "dog", "horse"]
GAINS = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20)


async def classify(backend: FakeBackend, **task_input: Any) -> ClassificationOutput:
    output = (await run_task(backend, TaskType.CLASSIFICATION, **task_input)).output
    assert isinstance(output, ClassificationOutput)
    return output


def scored_as(after_text: Sequence[float], prior: Sequence[float]) -> FakeBackend:
    """A backend that gives ``after_text`` for the text TEXT and ``prior`` for any other."""

    def score(request: ScoreRequest) -> Sequence[float]:
        return after_text if "TEXT" in request.prompt else prior

    return FakeBackend(score=score)


async def test_the_label_in_the_text_wins() -> None:
    for label in ANIMALS:
        output = await classify(FakeBackend(), text=f"I saw a {label} today", labels=ANIMALS)
        assert output.predictions[0].label == label
        scores = [prediction.score for prediction in output.predictions]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0, abs=1e-12)
        assert {prediction.label for prediction in output.predictions} == set(ANIMALS)


async def test_what_counts_is_the_gain_over_a_text_without_content() -> None:
    # The first label is likelier after any text; only the second became likelier by this one.
    backend = scored_as([-1.0, -6.0], [-1.0, -9.0])
    output = await classify(backend, text="TEXT", labels=["common", "rare"])
    assert [prediction.label for prediction in output.predictions] == ["rare", "common"]
    assert output.predictions[0].score == pytest.approx(math.exp(3) / (math.exp(3) + 1))


async def test_many_labels_are_independent() -> None:
    backend = scored_as([-1.0, -1.0, -9.0], [-3.0, -1.0, -5.0])
    output = await classify(backend, text="TEXT", labels=["a", "b", "c"], multi_label=True)
    scores = {prediction.label: prediction.score for prediction in output.predictions}
    logistic = {gain: 1.0 / (1.0 + math.exp(-gain)) for gain in (2.0, 0.0, -4.0)}
    assert scores == {
        "a": pytest.approx(logistic[2.0]),
        "b": 0.5,
        "c": pytest.approx(logistic[-4.0]),
    }
    fewer = await classify(
        scored_as([-1.0, -9.0], [-3.0, -5.0]), text="TEXT", labels=["a", "c"], multi_label=True
    )
    assert {p.label: p.score for p in fewer.predictions} == {k: scores[k] for k in ("a", "c")}


async def test_equal_labels_keep_their_order() -> None:
    output = await classify(scored_as([-2.0] * 3, [-2.0] * 3), text="TEXT", labels=["z", "a", "m"])
    assert [prediction.label for prediction in output.predictions] == ["z", "a", "m"]
    assert [prediction.score for prediction in output.predictions] == [pytest.approx(1 / 3)] * 3


async def test_the_text_is_read_once_for_all_labels_and_nothing_again_for_the_next() -> None:
    backend = FakeBackend()
    await classify(backend, text="a cat", labels=ANIMALS)
    texts = [request.prompt for request in backend.calls.scores]
    assert len(texts) == 1 + len(CONTENT_FREE)
    assert all(len(request.continuations) == len(ANIMALS) for request in backend.calls.scores)
    await classify(backend, text="a dog", labels=ANIMALS)
    assert len(backend.calls.scores) == len(texts) + 1
    await classify(backend, text="a dog", labels=["dog", "cat"])
    assert len(backend.calls.scores) == 2 * len(texts) + 1


async def test_another_model_has_priors_of_its_own() -> None:
    backend = FakeBackend()
    await classify(backend, text="a cat", labels=ANIMALS)
    before = len(backend.calls.scores)
    other = ModelFile("other", Path("other.gguf"), "cd" * 32, 1)
    await backend.load(other, EngineOptions())
    await classify(backend, text="a cat", labels=ANIMALS)
    assert len(backend.calls.scores) == 2 * before


async def test_usage_counts_the_text_and_the_labels_every_time() -> None:
    backend = FakeBackend()
    first = await classify(backend, text="a cat", labels=["cat", "wild dog"])
    again = await classify(backend, text="a cat", labels=["cat", "wild dog"])
    assert first.usage == again.usage
    # "Text: a cat Label:" and three words of labels.
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (7, 0)
    assert first.usage.total_tokens == 7


async def test_a_text_that_does_not_fit_is_not_cut() -> None:
    with pytest.raises(ContextOverflow):
        await classify(FakeBackend(n_ctx=64), text="word " * 100, labels=ANIMALS)


@pytest.mark.parametrize(
    ("labels", "path"),
    [
        ([], "input.labels: "),
        ([""], "input.labels.0: "),
        (["a", " \n"], "input.labels.1: "),
        (["a", "b", "a"], "input.labels.2: "),
        (["a b", " a  b"], "input.labels.1: "),
        (["a", 7], "input.labels.1: "),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels: list[Any], path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_input(TaskType.CLASSIFICATION, {"text": "x", "labels": labels})
    assert str(caught.value).startswith(path)


@given(GAINS)
def test_exclusive_scores_share_one(gains: list[float]) -> None:
    scores = exclusive(gains)
    assert math.fsum(scores) == pytest.approx(1.0, abs=1e-9)
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert scores[gains.index(max(gains))] == max(scores)


@given(GAINS, GAINS)
def test_independent_scores_do_not_know_of_each_other(one: list[float], two: list[float]) -> None:
    assert independent(one + two) == independent(one) + independent(two)
    assert all(0.0 <= score <= 1.0 for score in independent(one))
