from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
from task_runs import run_task

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import BadRequest
from ai4all.tasks import parse_input
from ai4all.tasks.validation import answer_hash
from ai4all.types.task import EmbeddingsOutput, TaskType, Usage, ValidationOutput

GREETING = {"type": "TextCompletion", "prompt": "Say hello", "temperature": 1.5, "max_tokens": 9}
NOTHING = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


def backend() -> FakeBackend:
    return FakeBackend(ScriptedGeneration(tokens=("Grüße", " dir")))


async def validate(fake: FakeBackend, task: dict[str, Any], expected: str) -> ValidationOutput:
    found = await run_task(fake, TaskType.VALIDATION, task=task, expected_hash=expected)
    assert isinstance(found.output, ValidationOutput)
    return found.output


async def test_the_right_hash_is_valid_and_a_changed_one_is_not() -> None:
    right = hashlib.sha256("Grüße dir".encode()).hexdigest()
    output = await validate(backend(), GREETING, right)
    assert output.valid
    assert output.answer_hash == right
    assert (await validate(backend(), GREETING, right.upper())).valid
    for wrong in (right[:-1] + ("0" if right[-1] != "0" else "1"), right[:-1], "", "nonsense"):
        output = await validate(backend(), GREETING, wrong)
        assert not output.valid
        assert output.answer_hash == right


async def test_another_answer_has_another_hash() -> None:
    one = await validate(backend(), GREETING, "")
    other = await validate(FakeBackend(ScriptedGeneration(tokens=("Grüße", " Dir"))), GREETING, "")
    assert one.answer_hash != other.answer_hash


async def test_the_answer_itself_comes_back() -> None:
    output = await validate(backend(), GREETING, "")
    assert output.result is not None
    assert output.result["task_type"] == "TEXT_COMPLETION"
    assert output.result["text"] == "Grüße dir"
    assert output.result["usage"]["completion_tokens"] == 2


async def test_nothing_is_left_to_chance() -> None:
    fake = backend()
    await validate(fake, GREETING, "")
    await validate(fake, {**GREETING, "repetition_penalty": 1.3, "seed": 5}, "")
    plain, penalised = fake.calls.requests
    assert (plain.temperature, plain.deterministic, plain.max_tokens) == (0.0, True, 9)
    assert plain.repetition_penalty == 1.0
    assert penalised.repetition_penalty == 1.3


async def test_embeddings_are_hashed_by_their_rounded_rows() -> None:
    task = {"type": "Embeddings", "texts": ["one text", "and another"]}
    output = await validate(FakeBackend(), task, "")
    assert output.result is not None
    values = [value for row in output.result["embeddings"] for value in row]
    packed = b"".join(struct.pack("<f", round(value, 4)) for value in values)
    assert output.answer_hash == hashlib.sha256(packed).hexdigest()
    assert (await validate(FakeBackend(), task, output.answer_hash)).valid
    turned = {"type": "Embeddings", "texts": ["and another", "one text"]}
    assert not (await validate(FakeBackend(), turned, output.answer_hash)).valid


def test_the_hash_bears_noise_below_its_digits_and_knows_one_zero() -> None:
    def hash_of(*row: float) -> str:
        return answer_hash(EmbeddingsOutput(embeddings=[list(row)], dimensions=3, usage=NOTHING))

    expected = hashlib.sha256(struct.pack("<fff", 0.1234, 0.0, -1.0)).hexdigest()
    assert hash_of(0.12342, -0.00001, -0.99999) == expected
    assert hash_of(0.12338, 0.00004, -1.00001) == expected
    assert hash_of(0.1235, 0.0, -1.0) != expected


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ({"type": "Summarization", "text": "x"}, "input.task: "),
        ({"type": "TextCompletion"}, "input.task.TextCompletion.prompt: "),
        ({"type": "Embeddings", "texts": []}, "input.task.Embeddings.texts: "),
        (
            {"type": "TextCompletion", "prompt": "x", "grammar": "x", "json_schema": {}},
            "input.task.grammar: ",
        ),
    ],
)
def test_a_task_that_cannot_be_repeated_is_refused(task: dict[str, Any], path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_input(TaskType.VALIDATION, {"task": task, "expected_hash": "00"})
    assert str(caught.value).startswith(path)
