"""``QUESTION_ANSWERING``: an answer from a context, how sure the model is, and where it stands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from ai4all.backend.base import Completion, GenerateRequest, TokenLogprob
from ai4all.errors import BadRequest, EngineCrashed
from ai4all.tasks.evidence import find_evidence
from ai4all.tasks.generation import (
    computed,
    generate,
    reported_logprobs,
    request_for,
    speaks_chat,
)
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import QuestionAnsweringInput, QuestionAnsweringOutput

__all__ = ["answer_question", "check_question", "confidence"]

_SYSTEM_PROMPT: Final = "You answer questions about a text briefly."
# Behind a long context, because a small model heeds best what it read last.
_INSTRUCTION: Final = "Answer briefly, in the words of the text."

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_PIECE: Final = re.compile(f"({_REPLACEMENT})")


def check_question(task_input: QuestionAnsweringInput) -> None:
    """Refuse a question or a context that says nothing.

    Raises:
        BadRequest: With the field.
    """
    for name in ("question", "context"):
        if not getattr(task_input, name).strip():
            raise BadRequest(f"input.{name}: is empty")


async def answer_question(job: Job, task_input: QuestionAnsweringInput) -> Computed:
    """Answer from the context, and say where in it the answer is found.

    Raises:
        ContextOverflow: The context does not fit into the model's; it is never cut.
    """
    completion = await generate(job, _request(job, task_input))
    answer = completion.text.strip()
    output = QuestionAnsweringOutput(
        answer=answer,
        confidence=confidence(completion),
        evidence_spans=find_evidence(answer, task_input.question, task_input.context),
        usage=completion.usage,
        logprobs=reported_logprobs(task_input, completion),
    )
    return computed(output, completion)


def confidence(completion: Completion) -> float:
    """Geometric mean of the probabilities that the model gave to the answer's tokens.

    They are the model's own, whatever the sampling did with them. Tokens that lie beyond the end
    of the text, such as those of a stop sequence, do not count. 0 for an empty answer.

    Raises:
        EngineCrashed: The engine gave no probabilities.
    """
    if not completion.text.strip():
        return 0.0
    logprobs = [token.logprob for token in _within(completion.text, completion.logprobs)]
    if not logprobs:
        raise EngineCrashed("the engine gave no log probabilities")
    return min(1.0, math.exp(math.fsum(logprobs) / len(logprobs)))


def _within(text: str, tokens: Sequence[TokenLogprob]) -> Iterator[TokenLogprob]:
    """The tokens that ``text`` was made of.

    A character may be split over several tokens. Each has U+FFFD for its piece, so from there to
    the next whole character it is only known that there are no more characters than pieces.
    """
    end = pieces = 0
    for token in tokens:
        if end >= len(text):
            return
        for part in _PIECE.split(token.text):
            if part == _REPLACEMENT:
                pieces += 1
            elif part:
                begin = text.find(part, end, end + pieces + len(part))
                if begin < 0 and pieces:
                    return
                # A token may reach beyond the end, with the beginning of a stop sequence.
                end, pieces = max(begin, end) + len(part), 0
        yield token


def _request(job: Job, task_input: QuestionAnsweringInput) -> GenerateRequest:
    asked = f"{task_input.context}\n\nQuestion: {task_input.question}"
    if speaks_chat(job):
        prompt = f"{asked}\n{_INSTRUCTION}"
        request = request_for(task_input, prompt, _SYSTEM_PROMPT, job.deadline)
    else:
        # A model without a chat template goes on with questions of its own.
        request = request_for(task_input, f"{asked}\nAnswer:", None, job.deadline)
        request = replace(request, stop=(*request.stop, "\n"))
    return replace(request, logprobs=task_input.logprobs or 0)
