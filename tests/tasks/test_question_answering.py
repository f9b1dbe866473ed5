from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from task_runs import MODEL, run_task

from ai4all.backend.base import EngineOptions, LoadedModel, TokenLogprob
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import BadRequest, ContextOverflow, EngineCrashed
from ai4all.tasks import parse_input
from ai4all.tasks.question_answering import _within
from ai4all.types.task import QuestionAnsweringOutput, TaskType

CONTEXT = "The bridge was built in 1912 by Clara Voss."
QUESTION = "Who built the bridge?"


class WithoutTemplate(FakeBackend):
    @property
    def loaded(self) -> LoadedModel | None:
        loaded = super().loaded
        return None if loaded is None else replace(loaded, has_chat_template=False)


async def ask(backend: FakeBackend, **task_input: Any) -> QuestionAnsweringOutput:
    fields = {"question": QUESTION, "context": CONTEXT} | task_input
    output = (await run_task(backend, TaskType.QUESTION_ANSWERING, **fields)).output
    assert isinstance(output, QuestionAnsweringOutput)
    return output


def answering(*tokens: str, probabilities: tuple[float, ...] = (0.5,)) -> FakeBackend:
    logprobs = tuple(math.log(probability) for probability in probabilities)
    return FakeBackend(ScriptedGeneration(tokens=tokens, logprobs=logprobs))


async def test_the_answer_comes_with_its_place_in_the_context() -> None:
    output = await ask(answering(" Clara", " Voss", "\n"))
    assert output.answer == "Clara Voss"
    assert [CONTEXT[start:end] for start, end in output.evidence_spans] == ["Clara Voss"]
    assert output.usage.completion_tokens == 3


async def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    output = await ask(answering("Clara", " Voss", probabilities=(0.9, 0.4)))
    assert output.confidence == pytest.approx(math.sqrt(0.9 * 0.4))
    surer = await ask(answering("Clara", " Voss", probabilities=(0.9, 0.8)))
    assert surer.confidence > output.confidence


async def test_tokens_behind_a_stop_sequence_do_not_count() -> None:
    backend = answering("Clara", " Voss", "END", probabilities=(0.5, 0.5, 0.001))
    output = await ask(backend, stop_sequences=["END"])
    assert output.answer == "Clara Voss"
    assert output.confidence == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "pieces", "counted"),
    [
        # Four bytes over four tokens, and over two; a stop sequence behind them.
        ("🦄 🐉", ["\ufffd"] * 4 + [" ", "\ufffd", "\ufffd"], 7),
        ("a🦄b", ["a", "\ufffd", "\ufffd", "b", "END"], 4),
        ("a 🦄", ["a", " \ufffd", "\ufffd", "END"], 3),
        # Text that no UTF-8 was in.
        ("a\ufffdb", ["a", "\ufffd", "b", "END"], 3),
        ("ab", ["a", "", "b", "END"], 3),
        ("ab", ["ab", "ab"], 1),
        # A token that the end of the text divides, and one that the text has without its space.
        ("Clara Voss", ["Clara", " VossEND", "ER"], 2),
        ("Clara Voss", [" Clara", " Voss", "END"], 2),
    ],
)
def test_tokens_that_hold_pieces_of_a_character_count(
    text: str, pieces: list[str], counted: int
) -> None:
    tokens = [TokenLogprob(n, piece, -1.0, ()) for n, piece in enumerate(pieces)]
    assert [token.token for token in _within(text, tokens)] == list(range(counted))


async def test_no_answer_is_no_confidence() -> None:
    output = await ask(answering())
    assert (output.answer, output.confidence, output.evidence_spans) == ("", 0.0, [])


async def test_an_engine_without_probabilities_is_not_taken_for_a_sure_one() -> None:
    class Silent(FakeBackend):
        def generate(self, request):  # type: ignore[no-untyped-def]
            return super().generate(replace(request, logprobs=None))

    with pytest.raises(EngineCrashed, match="log prob"):
        await ask(Silent(ScriptedGeneration(tokens=("Clara",))))


async def test_the_parameters_are_the_networks_and_go_through() -> None:
    backend = answering("x")
    await ask(backend)
    await ask(backend, temperature=0.0, max_tokens=7, json_schema={"type": "string"}, logprobs=2)
    default, named = backend.calls.requests
    assert (default.temperature, default.max_tokens, default.logprobs) == (0.7, 256, 0)
    assert (named.temperature, named.max_tokens, named.logprobs) == (0.0, 7, 2)
    assert named.repetition_penalty == 1.0
    assert named.json_schema == '{"type":"string"}'
    assert default.system_prompt is not None
    assert CONTEXT in default.prompt
    assert QUESTION in default.prompt


async def test_logprobs_only_on_request() -> None:
    assert (await ask(answering("x"))).logprobs is None
    output = await ask(answering("Clara", " Voss"), logprobs=1)
    assert output.logprobs is not None
    assert [entry.text for entry in output.logprobs] == ["Clara", " Voss"]
    assert [len(entry.top) for entry in output.logprobs] == [1, 1]


async def test_a_model_without_a_chat_template_is_given_text_to_continue() -> None:
    backend = WithoutTemplate(ScriptedGeneration(tokens=(" Clara", "\n", "Question:")))
    await backend.load(MODEL, EngineOptions())
    output = await ask(backend, stop_sequences=["###"])
    (request,) = backend.calls.requests
    assert request.system_prompt is None
    assert request.prompt.endswith("Answer:")
    assert "###" in request.stop
    assert output.answer == "Clara"


async def test_a_context_that_does_not_fit_is_not_cut() -> None:
    with pytest.raises(ContextOverflow):
        await ask(FakeBackend(n_ctx=64), context="word " * 80)


@pytest.mark.parametrize("field", ["question", "context"])
def test_what_says_nothing_is_refused(field: str) -> None:
    fields = {"question": QUESTION, "context": CONTEXT, field: " \n"}
    with pytest.raises(BadRequest, match=f"^input.{field}: "):
        parse_input(TaskType.QUESTION_ANSWERING, fields)
