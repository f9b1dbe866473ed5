"""``SUMMARIZATION``: a shorter text in a given form."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ai4all.backend.base import Completion, GenerateRequest
from ai4all.errors import BadRequest
from ai4all.tasks.generation import (
    computed,
    generate,
    reported_logprobs,
    request_for,
    speaks_chat,
)
from ai4all.tasks.job import Computed, Job
from ai4all.tasks.sentences import ends_sentence, nearest_sentence_end
from ai4all.types.task import FinishReason, SummarizationInput, SummarizationOutput, SummaryStyle

__all__ = ["check_text", "summarize"]

_SYSTEM_PROMPTS: Final = {
    SummaryStyle.PARAGRAPH: "Summarize the user's text in one paragraph of about {words} words.",
    SummaryStyle.BULLETS: (
        "Summarize the user's text as a list of short bullet points, about {words} words in all. "
        'Begin each point with "- ".'
    ),
    SummaryStyle.TLDR: "Summarize the user's text in one sentence of at most {words} words.",
}

# A token is seldom more than a word and seldom less than half of one; the rest is for marks and
# for a last sentence that is a little too long.
_TOKENS_PER_WORD: Final = 2
_TOKENS_TO_SPARE: Final = 32

_WORDS_PER_BULLET: Final = 10


def check_text(task_input: SummarizationInput) -> None:
    """Refuse a text that says nothing.

    Raises:
        BadRequest: With the field.
    """
    if not task_input.text.strip():
        raise BadRequest("input.text: is empty")


async def summarize(job: Job, task_input: SummarizationInput) -> Computed:
    """Summarise a text.

    Raises:
        ContextOverflow: The text does not fit into the model's context; it is never cut.
    """
    completion = await generate(job, _request(job, task_input))
    summary = _in_form(task_input, completion)
    output = SummarizationOutput(
        summary=summary,
        compression_ratio=len(summary.split()) / len(task_input.text.split()),
        usage=completion.usage,
        logprobs=reported_logprobs(task_input, completion),
    )
    return computed(output, completion)


def _request(job: Job, task_input: SummarizationInput) -> GenerateRequest:
    task = _SYSTEM_PROMPTS[task_input.style].format(words=task_input.target_length)
    if speaks_chat(job):
        request = request_for(task_input, task_input.text, task, job.deadline)
    else:
        prompt = f"{task_input.text}\n\nSummary in about {task_input.target_length} words:\n"
        request = request_for(task_input, prompt, None, job.deadline)
    if not _names_length(task_input):
        most = _TOKENS_PER_WORD * task_input.target_length + _TOKENS_TO_SPARE
        request = replace(request, max_tokens=most)
    return request if _has_own_form(task_input) else replace(request, grammar=_grammar(task_input))


def _grammar(task_input: SummarizationInput) -> str | None:
    """The form as a grammar. A paragraph has none, so that its text can be speculated upon."""
    match task_input.style:
        case SummaryStyle.PARAGRAPH:
            return None
        case SummaryStyle.TLDR:
            return r"root ::= [^ \t\r\n] [^\r\n]*"
        case SummaryStyle.BULLETS:
            more = max(2, -(-task_input.target_length // _WORDS_PER_BULLET)) - 1
            return (
                f'root ::= bullet ("\\n" bullet){{0,{more}}}\n'
                r'bullet ::= "- " [^ \t\r\n*-] [^\r\n]*'
            )


def _in_form(task_input: SummarizationInput, completion: Completion) -> str:
    text = completion.text.strip()
    if _has_own_form(task_input):
        return text
    # Where the limit was ours, what stands behind it in the way of a last sentence helps nobody.
    broken_off = completion.finish_reason is FinishReason.LENGTH and not _names_length(task_input)
    if task_input.style is SummaryStyle.BULLETS:
        return _bullets(text, broken_off)
    text = " ".join(text.split())
    if broken_off or task_input.style is SummaryStyle.TLDR:
        text = text[: nearest_sentence_end(text, task_input.target_length)]
    return text


def _bullets(text: str, broken_off: bool) -> str:
    # A point that is made twice says nothing new: small models repeat themselves when greedy.
    # The grammar's lines end here and nowhere else; splitlines() knows eight other ends.
    points = list(dict.fromkeys(line.rstrip() for line in text.split("\n")))
    unfinished = points[-1:] == ["-"] or (broken_off and not ends_sentence(text))
    if unfinished and len(points) > 1:
        points.pop()
    return "\n".join(points)


def _has_own_form(task_input: SummarizationInput) -> bool:
    return task_input.grammar is not None or task_input.json_schema is not None


def _names_length(task_input: SummarizationInput) -> bool:
    return "max_tokens" in task_input.model_fields_set
