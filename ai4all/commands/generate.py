"""``ai4all-native generate``: one generation, streamed or as JSON."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from pydantic import ValidationError

from ai4all.backend.base import (
    Completion,
    EngineOptions,
    GenerateRequest,
    InferenceBackend,
    TokenEvent,
)
from ai4all.commands.environment import print_json
from ai4all.errors import BadRequest
from ai4all.types.model import ModelFile
from ai4all.types.task import TextCompletionInput

__all__ = ["completion_as_json", "generate", "request_from_flags"]

_FLAG_OF_FIELD = {"stop_sequences": "--stop"}


def request_from_flags(**flags: Any) -> GenerateRequest:
    """Check the flags by the rules of a text completion block, and fill in its defaults.

    Args:
        flags: Fields of ``TextCompletionInput``; those that are None were not given.

    Raises:
        BadRequest: A value is out of range; the text names the flag.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        checked = TextCompletionInput.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0])
        flag = _FLAG_OF_FIELD.get(field, "--" + field.replace("_", "-"))
        raise BadRequest(f"{flag}: {first['msg']}") from None
    return GenerateRequest(
        prompt=checked.prompt,
        system_prompt=checked.system_prompt,
        max_tokens=checked.max_tokens,
        temperature=checked.temperature,
        top_k=checked.top_k,
        top_p=checked.top_p,
        min_p=checked.min_p,
        repetition_penalty=checked.effective_repetition_penalty,
        seed=checked.seed,
        stop=tuple(checked.stop_sequences),
        ignore_eos=checked.ignore_eos,
        deterministic=checked.deterministic,
    )


async def generate(
    backend: InferenceBackend,
    model: ModelFile,
    options: EngineOptions,
    request: GenerateRequest,
    *,
    as_json: bool,
) -> None:
    """Load ``model``, generate, and print the text as it comes, or one JSON object at the end.

    Raises:
        ComputeError: The load or the generation failed.
    """
    async with backend:
        await backend.load(model, options)
        async with contextlib.aclosing(backend.generate(request)) as events:
            async for event in events:
                if isinstance(event, Completion):
                    if as_json:
                        print_json(completion_as_json(event))
                    else:
                        sys.stdout.write("\n")
                        sys.stdout.flush()
                elif isinstance(event, TokenEvent) and not as_json:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()


def completion_as_json(completion: Completion) -> dict[str, Any]:
    """The completion with the names that ``--json`` and the demo print. Times in milliseconds."""
    return {
        "text": completion.text,
        "tokens": list(completion.token_ids),
        "finish_reason": completion.finish_reason.value,
        "usage": completion.usage.model_dump(mode="json"),
        "timings": completion.timings.to_dict(),
        "fingerprint": completion.fingerprint.model_dump(mode="json"),
    }
