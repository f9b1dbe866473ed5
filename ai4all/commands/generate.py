"""``ai4all-native generate``: one generation, streamed or as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ai4all.backend.base import (
    Completion,
    EngineOptions,
    GenerateRequest,
    InferenceBackend,
    TokenEvent,
)
from ai4all.benchmark.tuning_store import TuningStore
from ai4all.commands.drafting import Drafting
from ai4all.commands.environment import (
    Environment,
    log_to_terminal,
    print_json,
    read_settings,
    stderr_console,
)
from ai4all.errors import BadRequest
from ai4all.first_run import open_store
from ai4all.models.memory import load_model
from ai4all.models.progress import show_download
from ai4all.types.model import ModelFile
from ai4all.types.task import TextCompletionInput

__all__ = ["completion_as_json", "generate", "request_from_flags", "run_generate"]

_FLAG_OF_FIELD = {"stop_sequences": "--stop"}


def run_generate(
    environment: Environment,
    config: Path | None,
    data_dir: Path | None,
    model: str,
    *,
    threads: int | None,
    context_length: int | None,
    device: str | None,
    gpu_layers: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Generate with the model of that id or path.

    Args:
        environment: Where compute comes from.
        config: Configuration file.
        data_dir: Data directory.
        model: Id or path.
        threads: Threads; 0 is one for each core.
        context_length: Tokens; 0 is the model's own.
        device: As ``engine.device``.
        gpu_layers: As ``engine.gpu_layers``.
        as_json: One JSON object in place of the text.
        flags: As in ``request_from_flags``.

    Raises:
        ConfigError: The settings are wrong.
        ModelNotFound: There is no such model.
        ComputeError: It could not be computed.
    """
    request = request_from_flags(**flags)
    settings = read_settings(
        config,
        data_dir,
        engine__threads=threads,
        engine__context_length=context_length,
        engine__device=device,
        engine__gpu_layers=gpu_layers,
    )
    log_to_terminal(settings)
    options = dataclasses.replace(settings.engine_options(), n_slots=1)
    store = open_store(settings)

    async def run() -> None:
        drafting = await Drafting.find(settings, stderr_console())
        with show_download(stderr_console(), model) as progress:
            file = await store.resolve(model, progress)
        await asyncio.to_thread(drafting.require, file)
        tunings = TuningStore(settings.data_dir)
        backend = environment.open_backend()
        drafted = drafting.options_for(options, file)
        await generate(backend, file, drafted, tunings, request, as_json=as_json)

    asyncio.run(run())


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
    tunings: TuningStore,
    request: GenerateRequest,
    *,
    as_json: bool,
) -> None:
    """Load ``model``, generate, and print the text as it comes, or one JSON object at the end.

    What ``options`` leave open is filled in from ``tunings``.

    Raises:
        ComputeError: The load or the generation failed.
    """
    async with backend:
        options = tunings.options_for(options, model.sha256, backend.capabilities())
        await load_model(backend, model, options)
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
