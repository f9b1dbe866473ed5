from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ujson

from ai4all.backend.base import EngineOptions
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import BadRequest, UnsupportedTask
from ai4all.tasks import OFFERED, Job, compute, parse_input
from ai4all.types.model import ModelFile
from ai4all.types.task import FinishReason, TaskType, TextCompletionOutput

MODEL = ModelFile("tiny", Path("absent.gguf"), "ab" * 32, 1)


async def run(backend: FakeBackend, **task_input: Any) -> tuple[Job, TextCompletionOutput]:
    await backend.load(MODEL, EngineOptions())
    texts: list[str] = []
    parsed = parse_input(TaskType.TEXT_COMPLETION, {"prompt": "Say hello", **task_input})
    job = Job(
        TaskType.TEXT_COMPLETION, parsed, backend, None, lambda text, count: texts.append(text)
    )
    output = (await compute(job)).output
    assert isinstance(output, TextCompletionOutput)
    assert "".join(texts) == output.text
    return job, output


async def test_every_parameter_reaches_the_engine() -> None:
    backend = FakeBackend()
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    await run(
        backend,
        system_prompt="Be brief",
        max_tokens=7,
        temperature=0.5,
        top_p=0.8,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.3,
        stop_sequences=["\n", "END"],
        seed=2**64 - 1,
        ignore_eos=True,
        deterministic=True,
        json_schema=schema,
    )
    (request,) = backend.calls.requests
    assert (request.prompt, request.system_prompt) == ("Say hello", "Be brief")
    assert (request.max_tokens, request.temperature, request.top_p) == (7, 0.5, 0.8)
    assert (request.top_k, request.min_p, request.repetition_penalty) == (40, 0.05, 1.3)
    assert (request.stop, request.seed) == (("\n", "END"), 2**64 - 1)
    assert request.ignore_eos
    assert request.deterministic
    assert request.grammar is None
    assert ujson.loads(request.json_schema or "") == schema


async def test_the_defaults_are_the_networks() -> None:
    backend = FakeBackend()
    await run(backend)
    (request,) = backend.calls.requests
    assert (request.max_tokens, request.temperature, request.top_p) == (256, 0.7, 0.9)
    assert (request.top_k, request.repetition_penalty, request.stop) == (0, 1.1, ())
    assert request.seed is None
    assert request.system_prompt is None


@pytest.mark.parametrize(
    ("task_input", "penalty"),
    [
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, 1.1),
        ({"temperature": 0.1}, 1.1),
    ],
)
async def test_greedy_decoding_is_plain(task_input: dict[str, Any], penalty: float) -> None:
    backend = FakeBackend()
    await run(backend, **task_input)
    assert backend.calls.requests[0].repetition_penalty == penalty


async def test_a_stop_sequence_ends_it() -> None:
    _, output = await run(
        FakeBackend(ScriptedGeneration(tokens=("one", " tw", "o three"))), stop_sequences=["two"]
    )
    assert (output.text, output.finish_reason) == ("one ", FinishReason.STOP)


async def test_progress_ends_at_what_was_possible() -> None:
    job, output = await run(FakeBackend(), max_tokens=4)
    assert output.usage.completion_tokens == 4
    assert job.progress == 1.0
    job, _ = await run(FakeBackend(ScriptedGeneration(tokens=("x",))), max_tokens=4)
    # Two words of prompt and one of four tokens.
    assert job.progress == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    ("task_input", "path"),
    [
        ({}, "input.prompt: "),
        ({"prompt": None}, "input.prompt: "),
        ({"prompt": "secret", "top_p": 1.5}, "input.top_p: "),
        ({"prompt": "secret", "seed": -1}, "input.seed: "),
        ({"prompt": "secret", "seed": True}, "input.seed: "),
        ({"prompt": "secret", "max_tokens": "7"}, "input.max_tokens: "),
        ({"prompt": "secret", "stop_sequences": [""]}, "input.stop_sequences.0: "),
        ({"prompt": "secret", "grammar": "x", "json_schema": {}}, "input.grammar: "),
        ({"prompt": "secret", "grammar": ""}, "input.grammar: "),
    ],
)
def test_bad_input_names_the_field(task_input: dict[str, Any], path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_input(TaskType.TEXT_COMPLETION, task_input)
    assert str(caught.value).startswith(path)
    assert "secret" not in str(caught.value)


async def test_logprobs_are_an_extra_field_on_request() -> None:
    backend = FakeBackend(ScriptedGeneration(tokens=("one", " two"), logprobs=(-0.25, -math.inf)))
    _, output = await run(backend)
    assert "logprobs" not in output.model_dump(mode="json")
    _, output = await run(backend, logprobs=1)
    first, second = output.model_dump(mode="json")["logprobs"]
    token = {"token": first["token"], "text": "one", "logprob": -0.25}
    assert first == {**token, "top": [token]}
    # JSON has no infinity.
    assert second["logprob"] < -1000.0
    again = TextCompletionOutput.model_validate(output.model_dump(mode="json"))
    assert again == output
    _, output = await run(backend, logprobs=0)
    assert [entry["top"] for entry in output.model_dump(mode="json")["logprobs"]] == [[], []]


def test_all_inference_tasks_are_offered() -> None:
    assert set(OFFERED) == set(TaskType) - {TaskType.TRAINING_BATCH, TaskType.WEB_CRAWL}


@pytest.mark.parametrize("task_type", sorted(set(TaskType) - set(OFFERED)))
def test_the_rest_is_declined_by_name(task_type: TaskType) -> None:
    with pytest.raises(UnsupportedTask, match=task_type.value):
        parse_input(task_type, {})
