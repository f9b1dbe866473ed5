"""What a scripted backend does for a request, and the answer that comes of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ai4all.backend.base import GenerateRequest, TokenLogprob
from ai4all.errors import Ai4allError
from ai4all.types.task import FinishReason

__all__ = ["Script", "ScriptedAnswer", "ScriptedGeneration", "token_at", "token_ms"]

_WORDS = ("the", "river", "carries", "its", "stones", "slowly", "towards", "a", "distant", "sea")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedGeneration:
    """What the backend does for one request.

    Attributes:
        tokens: The answer, one entry a token. None: words that follow from the prompt, as many as
            ``max_tokens`` allows. A list that runs out ends the answer, or starts over when the
            request says ``ignore_eos``.
        queue_ms: Queue time to report; it is not waited.
        prompt_ms: Time for the prompt, reported and waited.
        prompt_chunks: Number of ``PromptProgress`` events in that time.
        token_ms: Time for each token, reported and waited.
        token_ms_at: Times that differ, by index of the token.
        error: Raised in place of token number ``error_at``; ``completion_tokens`` is added to the
            details of a ``ComputeError`` that has none.
        error_at: Index of the token that fails; 0 fails after the prompt.
        hang_at: Index of the token that never comes: not at the deadline either, as with an
            engine that hangs. Closing the iterator or the backend ends it.
        logprobs: Log probability of each token, for requests that ask for them; the last one
            counts for all that follow.
    """

    tokens: tuple[str, ...] | None = None
    queue_ms: float = 0.0
    prompt_ms: float = 0.0
    prompt_chunks: int = 1
    token_ms: float = 0.0
    token_ms_at: dict[int, float] = field(default_factory=dict)
    error: Ai4allError | None = None
    error_at: int = 0
    hang_at: int | None = None
    logprobs: tuple[float, ...] = (-0.5,)


Script = (
    ScriptedGeneration
    | Sequence[ScriptedGeneration]
    | Callable[[GenerateRequest, int], ScriptedGeneration]
)
"""One script for all requests; one for each in turn, the last repeated; or a function of the
request and its number."""


class ScriptedAnswer:
    """The text so far, with what could still become a stop sequence held back."""

    def __init__(self, request: GenerateRequest) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason = FinishReason.LENGTH
        self._stop = request.stop
        self._likeliest = request.logprobs
        self._given = 0

    def add(self, token: str, script: ScriptedGeneration) -> str:
        """Take the next token; return the text that became certain."""
        token_id = zlib.crc32(token.encode()) % 32_000
        self.token_ids.append(token_id)
        if self._likeliest is not None:
            logprob = script.logprobs[min(len(self.logprobs), len(script.logprobs) - 1)]
            top = ((token_id, token, logprob),)[: self._likeliest]
            self.logprobs.append(TokenLogprob(token_id, token, logprob, top))
        self.text += token
        found = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = FinishReason.STOP
            return self.flush()
        return self._give(len(self.text) - self._open_stop_length())

    def flush(self) -> str:
        """Return all that was held back."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        certain = self.text[self._given : end]
        self._given += len(certain)
        return certain

    def _open_stop_length(self) -> int:
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )


def token_at(script: ScriptedGeneration, request: GenerateRequest, index: int) -> str | None:
    """The text of an answer's token, or None where the answer ends."""
    if script.tokens is None:
        # Follows from the prompt, so that a test sees whose answer it got.
        seed = zlib.crc32(request.prompt.encode())
        return " " + _WORDS[zlib.crc32(b"%d" % index, seed) % len(_WORDS)]
    if index < len(script.tokens):
        return script.tokens[index]
    if request.ignore_eos and script.tokens:
        return script.tokens[index % len(script.tokens)]
    # A fault planned for after the answer's last token still happens.
    if index in (script.hang_at, script.error_at if script.error is not None else None):
        return ""
    return None


def token_ms(script: ScriptedGeneration, index: int) -> float:
    """The time of a token in milliseconds."""
    return script.token_ms_at.get(index, script.token_ms)
