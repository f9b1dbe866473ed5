from __future__ import annotations

from typing import Any

import pytest
from task_runs import run_task

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import BadRequest, ContextOverflow
from ai4all.tasks import parse_input
from ai4all.types.task import SummarizationOutput, TaskType

TEXT = "one two three four five six seven eight nine ten"


async def summarize(backend: FakeBackend, **task_input: Any) -> SummarizationOutput:
    fields = {"text": TEXT} | task_input
    output = (await run_task(backend, TaskType.SUMMARIZATION, **fields)).output
    assert isinstance(output, SummarizationOutput)
    return output


def saying(*tokens: str) -> FakeBackend:
    return FakeBackend(ScriptedGeneration(tokens=tokens))


async def test_the_ratio_is_of_words() -> None:
    output = await summarize(saying("Numbers", " up", " to", " ten."))
    assert output.summary == "Numbers up to ten."
    assert output.compression_ratio == 0.4
    assert output.usage.completion_tokens == 4


@pytest.mark.parametrize("style", ["paragraph", "bullets", "tldr"])
async def test_style_and_length_are_asked_for(style: str) -> None:
    backend = saying("x")
    await summarize(backend, style=style, target_length=37)
    (request,) = backend.calls.requests
    assert request.system_prompt is not None
    assert "37 words" in request.system_prompt
    assert request.prompt == TEXT
    assert request.temperature == 0.7


async def test_each_style_is_asked_for_in_its_own_words() -> None:
    backend = saying("x")
    for style in ("paragraph", "bullets", "tldr"):
        await summarize(backend, style=style)
    assert len({request.system_prompt for request in backend.calls.requests}) == 3
    assert len({request.grammar for request in backend.calls.requests}) == 3


async def test_the_length_bounds_the_tokens_unless_the_input_does() -> None:
    backend = saying("x")
    for length in (1, 50, 400):
        await summarize(backend, target_length=length)
    await summarize(backend, target_length=400, max_tokens=256)
    short, middle, long, named = (request.max_tokens for request in backend.calls.requests)
    assert 1 < short < middle < long
    assert middle >= 50
    assert long >= 400
    assert named == 256


async def test_a_bullet_ends_where_the_grammars_line_ends() -> None:
    odd = "one\u2028two\x0bthree\x85four."
    output = await summarize(saying("- " + odd, "\n- five."), style="bullets")
    assert output.summary == f"- {odd}\n- five."


async def test_bullets_are_one_each_and_the_last_is_whole() -> None:
    backend = saying("- One thing.\n", "- Another.\n", "- One thing.\n", "-")
    output = await summarize(backend, style="bullets")
    assert output.summary == "- One thing.\n- Another."

    many = [part for n in range(300) for part in (f"- Point {n}", " is", " here.\n")]
    output = await summarize(saying(*many), style="bullets", target_length=1)
    lines = output.summary.splitlines()
    assert 1 <= len(lines) < 300
    assert lines == [f"- Point {n} is here." for n in range(len(lines))]


async def test_what_our_limit_broke_off_ends_with_a_sentence() -> None:
    tokens = ["First", " is", " one."] + [" word"] * 60
    output = await summarize(saying(*tokens), target_length=5)
    assert output.summary == "First is one."
    named = await summarize(saying(*tokens), target_length=5, max_tokens=6)
    assert named.summary == "First is one. word word word"


async def test_a_paragraph_is_one_and_a_tldr_is_short() -> None:
    tokens = ("One.\n\n", "Two of", " it.\n", "Three are too many.")
    assert (await summarize(saying(*tokens))).summary == "One. Two of it. Three are too many."
    tldr = await summarize(saying(*tokens), style="tldr", target_length=4)
    assert tldr.summary == "One. Two of it."


async def test_a_form_of_the_requesters_own_is_left_alone() -> None:
    backend = saying('{"a":\n', ' "One. One."}')
    output = await summarize(backend, style="bullets", json_schema={"type": "object"})
    assert output.summary == '{"a":\n "One. One."}'
    await summarize(backend, style="tldr", grammar='root ::= "x"')
    schema, grammar = backend.calls.requests
    assert (schema.json_schema, schema.grammar) == ('{"type":"object"}', None)
    assert (grammar.json_schema, grammar.grammar) == (None, 'root ::= "x"')


async def test_a_text_that_does_not_fit_is_not_cut() -> None:
    with pytest.raises(ContextOverflow):
        await summarize(FakeBackend(n_ctx=64), text="word " * 80)


@pytest.mark.parametrize(
    ("task_input", "path"),
    [
        ({"text": " "}, "input.text: "),
        ({"text": "x", "style": "haiku"}, "input.style: "),
        ({"text": "x", "target_length": 0}, "input.target_length: "),
        ({"text": "x", "grammar": "x", "json_schema": {}}, "input.grammar: "),
    ],
)
def test_bad_input_names_the_field(task_input: dict[str, Any], path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_input(TaskType.SUMMARIZATION, task_input)
    assert str(caught.value).startswith(path)
