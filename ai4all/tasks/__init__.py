"""From the input of a task to requests for the backend, and from what they give to its output.

There is one module for each kind of task. What is not in ``OFFERED`` is known by name and declined.
``docs/tasks.md`` says how each is computed, and why so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from ai4all.errors import BadRequest, UnsupportedTask
from ai4all.protocol.codec import describe_invalid
from ai4all.tasks.classification import check_labels, classify
from ai4all.tasks.embeddings import embed
from ai4all.tasks.generation import check_constraints, complete_text
from ai4all.tasks.job import Computed, Job
from ai4all.tasks.question_answering import answer_question, check_question
from ai4all.tasks.summarization import check_text, summarize
from ai4all.tasks.validation import validate
from ai4all.types.task import (
    INPUT_MODELS,
    ClassificationInput,
    EmbeddingsInput,
    GenerationParameters,
    QuestionAnsweringInput,
    SummarizationInput,
    TaskType,
    TextCompletionInput,
    ValidationInput,
)

__all__ = ["OFFERED", "Computed", "Job", "compute", "parse_input"]


def parse_input(task_type: TaskType, data: Mapping[str, Any]) -> BaseModel:
    """Check the input of an assignment.

    Raises:
        UnsupportedTask: This worker does not offer ``task_type``.
        BadRequest: A field is wrong; the text has its path and never its content.
    """
    if task_type not in OFFERED:
        raise UnsupportedTask(f"this worker does not offer {task_type.value}")
    try:
        parsed = INPUT_MODELS[task_type].model_validate(dict(data))
    except ValidationError as exc:
        raise BadRequest(describe_invalid(exc, "input")) from None
    match parsed:
        case ClassificationInput():
            check_labels(parsed)
        case QuestionAnsweringInput():
            check_question(parsed)
        case SummarizationInput():
            check_text(parsed)
        case ValidationInput(task=GenerationParameters() as inner):
            check_constraints(inner, "input.task")
    if isinstance(parsed, GenerationParameters):
        check_constraints(parsed, "input")
    return parsed


def compute(job: Job) -> Awaitable[Computed]:
    """Do a task.

    Raises:
        ComputeError: It could not be done; the code says whose fault it was.
        EngineError: The backend cannot serve now.
    """
    return OFFERED[job.task_type](job)


def _text_completion(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, TextCompletionInput)
    return complete_text(job, job.input)


def _embeddings(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, EmbeddingsInput)
    return embed(job, job.input)


def _classification(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, ClassificationInput)
    return classify(job, job.input)


def _question_answering(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, QuestionAnsweringInput)
    return answer_question(job, job.input)


def _summarization(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, SummarizationInput)
    return summarize(job, job.input)


def _validation(job: Job) -> Awaitable[Computed]:
    assert isinstance(job.input, ValidationInput)
    return validate(job, job.input)


OFFERED: Final[Mapping[TaskType, Callable[[Job], Awaitable[Computed]]]] = MappingProxyType(
    {
        TaskType.TEXT_COMPLETION: _text_completion,
        TaskType.EMBEDDINGS: _embeddings,
        TaskType.CLASSIFICATION: _classification,
        TaskType.QUESTION_ANSWERING: _question_answering,
        TaskType.SUMMARIZATION: _summarization,
        TaskType.VALIDATION: _validation,
    }
)
"""What this worker does, and by which function."""
