"""Generation as the tasks use it: ``TEXT_COMPLETION``, and what the tasks built on it share."""

from __future__ import annotations

from typing import Final

import ujson

from ai4all.backend.base import (
    Completion,
    GenerateRequest,
    PromptProgress,
    TokenEvent,
    TokenLogprob,
)
from ai4all.errors import BadRequest, EngineCrashed
from ai4all.tasks.job import Computed, Job
from ai4all.types.task import (
    GenerationParameters,
    QuestionAnsweringOutput,
    SummarizationOutput,
    TextCompletionInput,
    TextCompletionOutput,
    TokenLikelihood,
    TokenLogprobs,
)

__all__ = [
    "check_constraints",
    "complete_text",
    "computed",
    "generate",
    "request_for",
    "reported_logprobs",
    "speaks_chat",
]

# A token that the model rules out altogether has the logarithm of zero, which JSON cannot hold.
_LEAST_LOGPROB: Final = -1e4


async def complete_text(job: Job, task_input: TextCompletionInput) -> Computed:
    """Continue a prompt, or answer it through the chat template when there is a system prompt."""
    completion = await generate(
        job, request_for(task_input, task_input.prompt, task_input.system_prompt, job.deadline)
    )
    timings = completion.timings
    output = TextCompletionOutput(
        text=completion.text,
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        generation_time_ms=round(timings.total_ms - timings.queue_ms - timings.load_ms),
        logprobs=reported_logprobs(task_input, completion),
    )
    return computed(output, completion)


def computed(
    output: TextCompletionOutput | QuestionAnsweringOutput | SummarizationOutput,
    completion: Completion,
) -> Computed:
    """An output with the figures of the one generation that it came from."""
    return Computed(output, completion.usage, completion.timings, completion.fingerprint)


def check_constraints(parameters: GenerationParameters, path: str) -> None:
    """Refuse two constraints at once: which of them should hold?

    Raises:
        BadRequest: With ``path`` and the field.
    """
    if parameters.grammar is not None and parameters.json_schema is not None:
        raise BadRequest(f"{path}.grammar: cannot be combined with json_schema")


def speaks_chat(job: Job) -> bool:
    """Whether the model has a chat template; without one it is given text to continue."""
    loaded = job.backend.loaded
    return loaded is not None and loaded.has_chat_template


def request_for(
    parameters: GenerationParameters,
    prompt: str,
    system_prompt: str | None,
    deadline: float | None,
) -> GenerateRequest:
    """The backend's request for ``prompt`` with all that the input says about how to generate."""
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
        logprobs=parameters.logprobs,
        deadline=deadline,
    )


async def generate(job: Job, request: GenerateRequest) -> Completion:
    """Run one generation to its end and keep the job's progress true meanwhile.

    Raises:
        ComputeError: As ``InferenceBackend.generate``.
    """
    prompt_done = 0
    job.expected = request.max_tokens
    events = job.backend.generate(request)
    try:
        async for event in events:
            match event:
                case TokenEvent(text=text, completion_tokens=completion_tokens):
                    job.processed = prompt_done + completion_tokens
                    if text:
                        job.on_text(text, completion_tokens)
                case PromptProgress(processed=processed, total=total):
                    prompt_done = max(prompt_done, processed)
                    job.expected = total + request.max_tokens
                    job.processed = prompt_done
                case Completion():
                    if job.on_completion is not None:
                        job.on_completion(event)
                    return event
    finally:
        # This is what cancels the work when this task is cancelled.
        await events.aclose()
    raise EngineCrashed("the engine ended a generation without a completion")


def reported_logprobs(
    parameters: GenerationParameters, completion: Completion
) -> list[TokenLogprobs] | None:
    """The log probabilities as the wire has them, or None when the input does not ask for them."""
    if parameters.logprobs is None:
        return None
    return [_described(token, parameters.logprobs) for token in completion.logprobs]


def _described(token: TokenLogprob, likeliest: int) -> TokenLogprobs:
    return TokenLogprobs(
        token=token.token,
        text=token.text,
        logprob=_wire_logprob(token.logprob),
        top=[
            TokenLikelihood(token=other, text=text, logprob=_wire_logprob(logprob))
            for other, text, logprob in token.top[:likeliest]
        ],
    )


def _wire_logprob(logprob: float) -> float:
    # More digits than float32 has would only make the frame longer.
    return round(max(logprob, _LEAST_LOGPROB), 6)
