"""From the input of a task to requests for the backend, and from what they give to its output.

There is one function for each task type that this worker offers. What is not in ``OFFERED`` is
known by name and declined.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import ujson
from pydantic import BaseModel, ValidationError

from ai4all.backend.base import (
    Completion,
    GenerateRequest,
    InferenceBackend,
    PromptProgress,
    TokenEvent,
)
from ai4all.errors import BadRequest, EngineCrashed, UnsupportedTask
from ai4all.protocol.codec import describe_invalid
from ai4all.types.task import (
    INPUT_MODELS,
    GenerationParameters,
    TaskOutput,
    TaskType,
    TextCompletionInput,
    TextCompletionOutput,
)

__all__ = ["OFFERED", "Computed", "Job", "compute", "parse_input"]


@dataclass(frozen=True, slots=True)
class Computed:
    """A task's output, and the generation it came from."""

    output: TaskOutput
    completion: Completion


@dataclass(slots=True)
class Job:
    """One task at work.

    Attributes:
        task_type: What to do.
        input: Its checked input.
        backend: What computes; its model is loaded.
        deadline: ``time.monotonic()`` value after which the work is dropped, or None.
        on_text: Called with text that became certain and the count of tokens so far.
        processed: Tokens done: of the prompt, and sampled.
        expected: Tokens that there can be at most, as far as is known.
    """

    task_type: TaskType
    input: BaseModel
    backend: InferenceBackend
    deadline: float | None
    on_text: Callable[[str, int], None]
    processed: int = 0
    expected: int = 0

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1, by tokens; it never goes back."""
        return min(1.0, self.processed / self.expected) if self.expected else 0.0


def parse_input(task_type: TaskType, data: Mapping[str, Any]) -> BaseModel:
    """Check the input of an assignment.

    Raises:
        UnsupportedTask: This worker does not offer ``task_type``.
        BadRequest: A field is wrong, or asks for what is not there yet; the text has its path.
    """
    if task_type not in OFFERED:
        raise UnsupportedTask(f"this worker does not offer {task_type.value}")
    try:
        parsed = INPUT_MODELS[task_type].model_validate(dict(data))
    except ValidationError as exc:
        raise BadRequest(describe_invalid(exc, "input")) from None
    if isinstance(parsed, GenerationParameters):
        _refuse_unsupported(parsed)
    return parsed


async def compute(job: Job) -> Computed:
    """Do a task.

    Raises:
        ComputeError: It could not be done; the code says whose fault it was.
        EngineError: The backend cannot serve now.
    """
    return await OFFERED[job.task_type](job)


def _refuse_unsupported(parameters: GenerationParameters) -> None:
    # What is silently left out would be trusted to be there.
    if parameters.logprobs is not None:
        raise BadRequest("input.logprobs: this worker does not report log-probabilities")
    if parameters.grammar is not None and parameters.json_schema is not None:
        raise BadRequest("input.grammar: cannot be combined with json_schema")


async def _complete_text(job: Job) -> Computed:
    assert isinstance(job.input, TextCompletionInput)
    completion = await _generate(
        job, _request(job.input, job.input.prompt, job.input.system_prompt, job.deadline)
    )
    output = TextCompletionOutput(
        text=completion.text,
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        generation_time_ms=round(
            completion.timings.total_ms - completion.timings.queue_ms - completion.timings.load_ms
        ),
    )
    return Computed(output, completion)


def _request(
    parameters: GenerationParameters,
    prompt: str,
    system_prompt: str | None,
    deadline: float | None,
) -> GenerateRequest:
    schema = parameters.json_schema
    return GenerateRequest(
        prompt=prompt,
        system_prompt=system_prompt,
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
        repetition_penalty=parameters.effective_repetition_penalty,
        seed=parameters.seed,
        stop=tuple(parameters.stop_sequences),
        ignore_eos=parameters.ignore_eos,
        deterministic=parameters.deterministic,
        grammar=parameters.grammar,
        json_schema=None if schema is None else ujson.dumps(schema, ensure_ascii=False),
        deadline=deadline,
    )


async def _generate(job: Job, request: GenerateRequest) -> Completion:
    """Run one generation to its end and keep the job's progress true meanwhile."""
    prompt_done = 0
    job.expected = request.max_tokens
    # Closing the iterator is what cancels the work when this task is cancelled.
    async with aclosing(job.backend.generate(request)) as events:
        async for event in events:
            match event:
                case PromptProgress(processed=processed, total=total):
                    prompt_done = max(prompt_done, processed)
                    job.expected = total + request.max_tokens
                    job.processed = prompt_done
                case TokenEvent(text=text, completion_tokens=completion_tokens):
                    job.processed = prompt_done + completion_tokens
                    if text:
                        job.on_text(text, completion_tokens)
                case Completion():
                    return event
    raise EngineCrashed("the engine ended a generation without a completion")


OFFERED: Final[Mapping[TaskType, Callable[[Job], Awaitable[Computed]]]] = MappingProxyType(
    {TaskType.TEXT_COMPLETION: _complete_text}
)
"""What this worker does, and by which function."""
