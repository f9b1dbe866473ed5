"""Every task on the real model, through a WebSocket: coordinator, worker, native engine."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import ujson
from station import Station

from ai4all.backend.base import EngineOptions
from ai4all.backend.registry import open_backend
from ai4all.coordinator import EmbeddedCoordinator, LeaseRules, TaskSpec
from ai4all.types.model import ModelFile
from ai4all.types.task import (
    ClassificationOutput,
    EmbeddingsOutput,
    ErrorCode,
    QuestionAnsweringOutput,
    SummarizationOutput,
    TaskResult,
    TaskType,
    TextCompletionOutput,
    ValidationOutput,
)

pytestmark = pytest.mark.model

CONTEXT = (
    "The old bridge over the river Lenna was built in 1912 by the engineer Clara Voss. It has "
    "three arches of granite and carries a single railway line. During the flood of 1954 the "
    "middle arch was damaged. It was repaired in the following summer."
)
ARTICLE = (
    "Bees are among the most important pollinators of crops and wild plants. In many countries "
    "their numbers have fallen over the last thirty years. Scientists name several causes: "
    "pesticides that weaken the insects, a mite that spreads diseases in the hives, and the loss "
    "of meadows with wild flowers. A warmer climate also moves the time at which plants bloom, so "
    "that bees come too late. Some cities now plant strips of wild flowers along their roads and "
    "forbid certain pesticides. Beekeepers report that colonies near such strips survive the "
    "winter more often. Farmers who leave the edges of their fields to wild plants harvest more "
    "fruit, because more blossoms are visited."
)
GREEDY = {"temperature": 0.0}

# One thread: where other programs have a core too, several threads wait for each other.
ENGINE = EngineOptions(n_ctx=1024, threads=1)


@pytest.fixture(scope="module")
def model(reference_model: Path) -> ModelFile:
    digest = hashlib.sha256(reference_model.read_bytes()).hexdigest()
    return ModelFile("benchmark", reference_model, digest, reference_model.stat().st_size)


async def results_of(
    model: ModelFile, *tasks: tuple[TaskType, dict[str, Any]], backend_name: str = "native"
) -> list[TaskResult]:
    """Have a worker of its own compute the tasks, and give what reached the coordinator."""
    specs = [
        TaskSpec(block_id=f"b-{at}", task_type=kind, input=task_input, deadline_ms=600_000)
        for at, (kind, task_input) in enumerate(tasks)
    ]
    backend = open_backend(backend_name)
    await backend.load(model, ENGINE)
    async with (
        EmbeddedCoordinator(specs, rules=LeaseRules(max_failures=1)) as coordinator,
        Station(coordinator.url, backend),  # type: ignore[arg-type]
    ):
        await coordinator.finished()
    results = [coordinator.outcomes[spec.block_id or ""].result for spec in specs]
    for result in results:
        assert result.fingerprint is None or result.fingerprint.model_sha256 == model.sha256
    return results


async def outputs_of(
    model: ModelFile, *tasks: tuple[TaskType, dict[str, Any]], backend_name: str = "native"
) -> list[Any]:
    results = await results_of(model, *tasks, backend_name=backend_name)
    assert [result.error for result in results] == [None] * len(tasks)
    return [result.output for result in results]


async def test_paraphrases_are_closer_than_strangers(model: ModelFile) -> None:
    pairs = [
        ("The cat sleeps on the warm sofa.", "A cat is sleeping on the sofa."),
        ("Interest rates rose sharply last year.", "Last year, interest rates went up sharply."),
        (
            "Add flour and butter, then bake the cake.",
            "Bake the cake after adding butter and flour.",
        ),
    ]
    texts = [text for pair in pairs for text in pair]
    all_at_once, one_by_one, as_it_came = await outputs_of(
        model,
        (TaskType.EMBEDDINGS, {"texts": texts}),
        (TaskType.EMBEDDINGS, {"texts": texts[:1]}),
        (TaskType.EMBEDDINGS, {"texts": texts, "normalize": False}),
    )
    assert isinstance(all_at_once, EmbeddingsOutput)
    rows = np.array(all_at_once.embeddings)
    assert rows.shape == (len(texts), all_at_once.dimensions)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=1e-5)
    likeness = rows @ rows.T
    for at in range(0, len(texts), 2):
        strangers = np.delete(likeness[at], [at, at + 1])
        assert likeness[at, at + 1] > strangers.max()

    # The neighbours in a batch do not change a row, and normalising only scales it.
    assert rows[0] @ np.array(one_by_one.embeddings[0]) > 0.999
    raw = np.array(as_it_came.embeddings)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert abs(lengths - 1.0).min() > 1e-3
    assert raw / lengths == pytest.approx(rows, abs=1e-2)


async def test_the_planted_label_wins(model: ModelFile) -> None:
    labels = ["sports", "politics", "technology", "cooking", "music"]
    planted = {
        "The striker scored twice in the last ten minutes and won the cup.": "sports",
        "Parliament voted on the new tax law after a long debate.": "politics",
        "Fry the onions in butter, add the flour and stir until it is brown.": "cooking",
        "The violinist played the concerto with the city's orchestra.": "music",
    }
    orders = (labels, labels[::-1])
    outputs = await outputs_of(
        model,
        *(
            (TaskType.CLASSIFICATION, {"text": text, "labels": order})
            for text in planted
            for order in orders
        ),
    )
    expected = [label for label in planted.values() for _ in orders]
    assert [output.predictions[0].label for output in outputs] == expected
    for output in outputs:
        assert isinstance(output, ClassificationOutput)
        scores = [prediction.score for prediction in output.predictions]
        assert scores == sorted(scores, reverse=True)
        assert math.fsum(scores) == pytest.approx(1.0, abs=1e-6)
        assert {prediction.label for prediction in output.predictions} == set(labels)


async def test_several_planted_labels_are_above_the_rest(model: ModelFile) -> None:
    labels = ["animals", "politics", "weather", "software"]
    text = "The horses stood in the rain and the cows hid from the storm."
    both, alone = await outputs_of(
        model,
        (TaskType.CLASSIFICATION, {"text": text, "labels": labels, "multi_label": True}),
        (TaskType.CLASSIFICATION, {"text": text, "labels": labels[:1], "multi_label": True}),
    )
    ranked = [prediction.label for prediction in both.predictions]
    assert set(ranked[:2]) == {"animals", "weather"}
    scores = {prediction.label: prediction.score for prediction in both.predictions}
    assert sum(scores.values()) > 1.0
    # A label's own score does not depend on what else is on offer.
    assert alone.predictions[0].score == pytest.approx(scores["animals"], abs=0.02)


async def test_the_answer_and_its_evidence_are_in_the_context(model: ModelFile) -> None:
    question = {
        "question": "When was the bridge built?",
        "context": CONTEXT,
        "logprobs": 0,
        **GREEDY,
    }
    answered, constrained = await outputs_of(
        model,
        (TaskType.QUESTION_ANSWERING, {**question, "max_tokens": 24}),
        (TaskType.QUESTION_ANSWERING, {**question, "grammar": 'root ::= "1912" | "1066"'}),
    )
    for output in (answered, constrained):
        assert isinstance(output, QuestionAnsweringOutput)
        assert "1912" in output.answer
        assert output.evidence_spans
        assert all(0 <= start < end <= len(CONTEXT) for start, end in output.evidence_spans)
        assert any("1912" in CONTEXT[start:end] for start, end in output.evidence_spans)
        mean = sum(token.logprob for token in output.logprobs) / len(output.logprobs)
        assert output.confidence == pytest.approx(math.exp(mean), rel=1e-3)
        assert 0.0 < output.confidence <= 1.0
    assert [CONTEXT[start:end] for start, end in constrained.evidence_spans] == ["1912"]


async def test_summaries_have_the_form_that_was_asked_for(model: ModelFile) -> None:
    asked = {"text": ARTICLE, "target_length": 20, "seed": 7}
    bullets, tldr, paragraph = await outputs_of(
        model,
        (TaskType.SUMMARIZATION, {**asked, "style": "bullets"}),
        (TaskType.SUMMARIZATION, {**asked, "style": "tldr"}),
        (TaskType.SUMMARIZATION, {**asked, **GREEDY}),
    )
    for output in (bullets, tldr, paragraph):
        assert isinstance(output, SummarizationOutput)
        words = len(output.summary.split())
        assert 0 < words < len(ARTICLE.split())
        assert output.compression_ratio == pytest.approx(words / len(ARTICLE.split()))
        assert output.usage.prompt_tokens > len(ARTICLE.split())
    lines = bullets.summary.splitlines()
    assert len(lines) >= 1
    assert all(line.startswith("- ") and line[2:].strip() for line in lines)
    assert len(set(lines)) == len(lines)
    assert "\n" not in tldr.summary
    assert "\n" not in paragraph.summary


async def test_a_changed_hash_is_invalid(model: ModelFile) -> None:
    completion = {"type": "TextCompletion", "prompt": "The capital of France is", "max_tokens": 12}
    embeddings = {"type": "Embeddings", "texts": ["The capital of France is Paris."]}
    tasks = [{"task": task, "expected_hash": "unknown"} for task in (completion, embeddings)]
    first = await outputs_of(model, *((TaskType.VALIDATION, task) for task in tasks))
    assert not any(output.valid for output in first)
    assert first[0].answer_hash == hashlib.sha256(first[0].result["text"].encode()).hexdigest()

    # Another worker, another engine, another load of the model.
    right = [{**task, "expected_hash": o.answer_hash} for task, o in zip(tasks, first, strict=True)]
    changed = {**completion, "prompt": "The capital of Spain is"}
    again = await outputs_of(
        model,
        *((TaskType.VALIDATION, task) for task in right),
        (TaskType.VALIDATION, {**right[0], "task": changed}),
    )
    assert [output.valid for output in again] == [True, True, False]
    for output in again:
        assert isinstance(output, ValidationOutput)
    assert again[0].result["text"] == first[0].result["text"]
    assert again[2].answer_hash != first[0].answer_hash


async def test_constraints_hold_and_logprobs_come_on_request(model: ModelFile) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "colour": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": False,
    }
    person = {"prompt": "Describe a person as JSON:\n", "json_schema": schema, "max_tokens": 200}
    chosen = {"prompt": "Is the sky blue?", "grammar": 'root ::= "yes" | "no"', "seed": 3}
    free = {"prompt": "The capital of France is", "max_tokens": 4, "logprobs": 3, **GREEDY}
    described, answered, likely = await outputs_of(
        model,
        (TaskType.TEXT_COMPLETION, {**person, "seed": 11}),
        (TaskType.TEXT_COMPLETION, chosen),
        (TaskType.TEXT_COMPLETION, free),
    )
    jsonschema.validate(ujson.loads(described.text), schema)
    assert answered.text in ("yes", "no")
    assert answered.logprobs is None
    assert isinstance(likely, TextCompletionOutput)
    assert likely.logprobs is not None
    assert len(likely.logprobs) == likely.usage.completion_tokens
    assert "".join(entry.text for entry in likely.logprobs) == likely.text
    for entry in likely.logprobs:
        # Greedy takes the likeliest.
        assert entry.top[0].token == entry.token
        shares = [math.exp(other.logprob) for other in entry.top]
        assert shares == sorted(shares, reverse=True)
        assert len(shares) == 3
        assert 0.0 < sum(shares) <= 1.0 + 1e-6


async def test_what_does_not_fit_is_the_requesters_fault_for_every_task(model: ModelFile) -> None:
    long = "word " * 3000
    results = await results_of(
        model,
        (TaskType.TEXT_COMPLETION, {"prompt": long}),
        (TaskType.EMBEDDINGS, {"texts": ["word " * 20_000]}),
        (TaskType.CLASSIFICATION, {"text": long, "labels": ["a", "b"]}),
        (TaskType.QUESTION_ANSWERING, {"question": "What?", "context": long}),
        (TaskType.SUMMARIZATION, {"text": long}),
        (
            TaskType.VALIDATION,
            {"task": {"type": "TextCompletion", "prompt": long}, "expected_hash": ""},
        ),
    )
    codes = [result.error.code if result.error is not None else None for result in results]
    assert codes == [ErrorCode.CONTEXT_OVERFLOW] * len(results)


async def test_an_engine_in_a_process_of_its_own_gives_the_same(model: ModelFile) -> None:
    tasks: list[tuple[TaskType, dict[str, Any]]] = [
        (TaskType.EMBEDDINGS, {"texts": ["The cat sleeps.", "Ä ✓"]}),
        (TaskType.CLASSIFICATION, {"text": "The cat sleeps.", "labels": ["animals", "law"]}),
        (
            TaskType.QUESTION_ANSWERING,
            {"question": "Who sleeps?", "context": "The cat sleeps.", "max_tokens": 8}
            | {"deterministic": True, "logprobs": 1, **GREEDY},
        ),
    ]
    here, there = [
        await outputs_of(model, *tasks, backend_name=name) for name in ("native", "isolated")
    ]
    assert np.array(here[0].embeddings) == pytest.approx(np.array(there[0].embeddings), abs=1e-4)
    for one, two in zip(here[1].predictions, there[1].predictions, strict=True):
        assert (one.label, one.score) == (two.label, pytest.approx(two.score, abs=1e-3))
    assert here[2].answer == there[2].answer
    assert here[2].confidence == pytest.approx(there[2].confidence, rel=1e-3)
    assert [t.token for t in here[2].logprobs] == [t.token for t in there[2].logprobs]
