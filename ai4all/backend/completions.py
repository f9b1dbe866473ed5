"""From what the native engine says of a generation to what callers are told.

Needs no extension: the engine may have said it in another process.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from array import array
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ai4all.backend.base import (
    Completion,
    EngineOptions,
    GenerateRequest,
    LoadedModel,
    Timings,
    TokenEvent,
    TokenLogprob,
)
from ai4all.backend.devices import backend_of
from ai4all.errors import (
    Ai4allError,
    BadRequest,
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    EngineCrashed,
    EngineError,
    LoadFailed,
    OutOfMemory,
)
from ai4all.types.task import Fingerprint, FinishReason, Usage

__all__ = [
    "Failed",
    "Finished",
    "GenerationSoFar",
    "NATIVE_ERRORS",
    "RunningModel",
    "native_error",
    "seed_of",
    "timings_of",
    "tokens_sha256",
]

NATIVE_ERRORS: dict[str, type[Ai4allError]] = {
    "bad_request": BadRequest,
    "context_overflow": ContextOverflow,
    "out_of_memory": OutOfMemory,
    "load_failed": LoadFailed,
    "cancelled": Cancelled,
    "deadline_exceeded": DeadlineExceeded,
    "compute_failed": EngineCrashed,
    "busy": EngineBusy,
    "closed": EngineClosed,
    "not_loaded": EngineError,
}
"""The one exception of each native error code. A test holds that the map is total."""

# llama.cpp reads this seed as "draw one", which would make the reported seed a lie.
_RESERVED_SEED = 0xFFFFFFFF

Times = tuple[int, int, int, int, int, int, int]


class Finished(NamedTuple):
    """The native engine's last word on a generation that ended well.

    ``text`` was kept back as a possible stop sequence. ``times`` are those of ``timings_of``.
    """

    text: str
    reason: Literal["stop", "length"]
    n_prompt: int
    n_tokens: int
    n_reused: int
    n_neighbours: int
    n_drafted: int
    n_draft_right: int
    n_by_model: int
    times: Times


class Failed(NamedTuple):
    """The native engine's last word on a generation that did not; ``code`` is its error's name."""

    code: str
    message: str
    n_prompt: int
    n_tokens: int

    def error(self) -> Ai4allError:
        """The exception of it.

        Raises:
            LookupError: There is no such code.
        """
        details = {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_tokens}
        return native_error(self.code, self.message, details)


@dataclass(frozen=True, slots=True)
class RunningModel:
    """A loaded model and the options that it was loaded with."""

    loaded: LoadedModel
    options: EngineOptions

    def fingerprint(
        self,
        engine_build: str,
        tokens: tuple[int, ...] = (),
        *,
        seed: int = 0,
        deterministic: bool = False,
        prefix_reused: int = 0,
        batched_with: int = 0,
        drafted_by_model: bool = False,
    ) -> Fingerprint:
        """All that decides about the bits of a result that this model gave."""
        loaded, options = self.loaded, self.options
        draft = options.draft if drafted_by_model else None
        return Fingerprint(
            model_sha256=loaded.file.sha256,
            engine_build=engine_build,
            backend=backend_of(loaded.device),
            device=loaded.device,
            threads=loaded.threads,
            n_ctx=loaded.n_ctx,
            n_batch=loaded.n_batch,
            n_ubatch=loaded.n_ubatch,
            kv_type=options.kv_type,
            flash_attention=options.flash_attention,
            seed=seed,
            deterministic=deterministic,
            prefix_reused=prefix_reused,
            batched_with=batched_with,
            draft_model_sha256=draft.sha256 if draft is not None else None,
            output_tokens_sha256=tokens_sha256(tokens),
        )


class GenerationSoFar:
    """What has come of a generation, up to the completion.

    Args:
        request: What was asked for.
        seed: What it is sampled with.
    """

    def __init__(self, request: GenerateRequest, seed: int) -> None:
        self._deterministic = request.deterministic
        self._seed = seed
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def add(self, step: TokenEvent) -> TokenEvent:
        """Note tokens; returns them."""
        self._text.append(step.text)
        self._tokens += step.token_ids
        self._logprobs += step.logprobs
        return step

    def completion(self, end: Finished, running: RunningModel, engine_build: str) -> Completion:
        """The whole of it.

        Args:
            end: How it ended. Its text has been added.
            running: The model that served it.
            engine_build: The line of the build that did.

        Raises:
            ValueError: The counts do not fit each other, or what came before.
        """
        tokens = tuple(self._tokens)
        counts = (end.n_neighbours, end.n_by_model, end.times[-1] - end.times[0])
        if (
            end.n_tokens != len(tokens)
            or not 0 <= end.n_reused <= end.n_prompt
            or not 0 <= end.n_draft_right <= end.n_drafted
            or min(counts) < 0
        ):
            raise ValueError("an end that does not fit its generation")
        return Completion(
            text="".join(self._text),
            token_ids=tokens,
            finish_reason=FinishReason(end.reason),
            usage=Usage(
                prompt_tokens=end.n_prompt,
                completion_tokens=end.n_tokens,
                total_tokens=end.n_prompt + end.n_tokens,
            ),
            timings=timings_of(end.times, end.n_prompt - end.n_reused, end.n_tokens),
            fingerprint=running.fingerprint(
                engine_build,
                tokens,
                seed=self._seed,
                deterministic=self._deterministic,
                prefix_reused=end.n_reused,
                batched_with=end.n_neighbours,
                drafted_by_model=end.n_by_model > 0,
            ),
            logprobs=tuple(self._logprobs),
            draft_tokens=end.n_drafted,
            draft_accepted=end.n_draft_right,
            draft_model_tokens=end.n_by_model,
        )


def native_error(code: str, message: str, details: dict[str, Any] | None = None) -> Ai4allError:
    """The exception of a native error code.

    Raises:
        LookupError: There is no such code.
    """
    kind = NATIVE_ERRORS[code]
    if details is not None and issubclass(kind, DeadlineExceeded | Cancelled | EngineCrashed):
        return kind(message, details)
    return kind(message)


def seed_of(request: GenerateRequest) -> int:
    """The seed to sample with, in 32 bits: the request's, or one that is drawn."""
    if request.temperature <= 0.0:
        return 0
    seed = secrets.randbits(32) if request.seed is None else request.seed
    # The sampler takes 32 bits; the upper half of a longer seed counts too.
    seed = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return seed if seed != _RESERVED_SEED else _RESERVED_SEED - 1


def tokens_sha256(tokens: tuple[int, ...]) -> str:
    """Hash of token ids: sha256 over them as little-endian 32-bit integers."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return hashlib.sha256(ids.tobytes()).hexdigest()


def timings_of(times: Times, n_prompt: int, n_tokens: int) -> Timings:
    """Turn the engine's time stamps into spans.

    Args:
        times: Nanoseconds: submitted, model ready, admitted, prompt done, first token sampled,
            last token sampled, finished.
        n_prompt: Prompt tokens that were computed.
        n_tokens: Tokens sampled.
    """
    submitted, ready, admitted, prompt_done, first, last, finished = times
    prompt_ns, decode_ns = prompt_done - admitted, last - first
    return Timings(
        queue_ms=(admitted - ready) / 1e6,
        load_ms=(ready - submitted) / 1e6,
        prompt_ms=prompt_ns / 1e6,
        first_sample_ms=(first - prompt_done) / 1e6 if first else 0.0,
        time_to_first_token_ms=(first - submitted) / 1e6 if first else None,
        total_ms=(finished - submitted) / 1e6,
        prompt_tokens_per_second=n_prompt / prompt_ns * 1e9 if n_prompt and prompt_ns > 0 else None,
        decode_tokens_per_second=(n_tokens - 1) / decode_ns * 1e9
        if n_tokens > 1 and decode_ns > 0
        else None,
    )
