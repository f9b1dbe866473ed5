"""What a task gives must reach the coordinator as it was."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import ujson
from task_runs import run_task

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.protocol.codec import decode_client_message, encode
from ai4all.protocol.messages import SubmitResult
from ai4all.protocol.schema import wire_schema
from ai4all.tasks import OFFERED
from ai4all.types.task import BlockMetrics, TaskResult, TaskType

TASKS: dict[str, tuple[TaskType, dict[str, Any]]] = {
    "completion": (TaskType.TEXT_COMPLETION, {"prompt": "x"}),
    "logprobs": (TaskType.TEXT_COMPLETION, {"prompt": "x", "logprobs": 2}),
    "embeddings": (TaskType.EMBEDDINGS, {"texts": ["a b", "c"]}),
    "classification": (TaskType.CLASSIFICATION, {"text": "a b", "labels": ["a", "c"]}),
    "question": (
        TaskType.QUESTION_ANSWERING,
        {"question": "Who?", "context": "It was Clara Voss. She was tall."},
    ),
    "summary": (TaskType.SUMMARIZATION, {"text": "a b c", "logprobs": 0}),
    "validation": (
        TaskType.VALIDATION,
        {"task": {"type": "Embeddings", "texts": ["a"]}, "expected_hash": "00"},
    ),
}


def test_every_task_is_here() -> None:
    assert {kind for kind, _ in TASKS.values()} == set(OFFERED)


@pytest.mark.parametrize("name", TASKS)
async def test_an_output_arrives_as_it_was_sent(name: str) -> None:
    kind, task_input = TASKS[name]
    backend = FakeBackend(ScriptedGeneration(tokens=("Clara", " Voss.")))
    done = await run_task(backend, kind, **task_input)
    sent = SubmitResult(
        worker_id="w-1",
        block_id="b-1",
        result=TaskResult(
            success=True,
            output=done.output,
            error=None,
            metrics=BlockMetrics(queue_time_ms=0.0, execution_time_ms=1.0, total_time_ms=1.0),
            fingerprint=done.fingerprint,
        ),
    )
    frame = encode(sent)
    arrived = decode_client_message(frame)
    assert isinstance(arrived, SubmitResult)
    assert arrived.result == sent.result
    jsonschema.validate(ujson.loads(frame), wire_schema())
    assert ("logprobs" in ujson.loads(frame)["result"]["output"]) is ("logprobs" in task_input)
