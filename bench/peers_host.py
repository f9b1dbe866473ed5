"""One contender in a process of its own, driven by JSON lines.

Each library brings its own copy of llama.cpp and its own threads, so none may share a process with
another. What this process does not know (the HTTP of a server) is in ``peers_contenders``.

Usage: python bench/peers_host.py ours|xllamacpp|llama-cpp-python OPTIONS
OPTIONS is a JSON object: model, threads, n_ctx, n_batch, n_ubatch, n_slots.
Each line of standard input is a request ``{"op": NAME, ...}``, each of standard output its answer,
or ``{"error": TEXT}``. Times are seconds by the clock of who asked for the tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TextIO

import ujson

Answer = dict[str, Any]


class Library(Protocol):
    """What every library can be asked."""

    def info(self) -> Answer:
        """What it is: ``version``, ``build``, ``device`` and more."""

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> Answer:
        """Generate greedily over end tokens.

        ``first_s`` and ``last_s`` are when the first and the last token came, ``total_s`` when
        all was done, ``tokens`` how many there were.
        """

    def close(self) -> None:
        """Let go."""


class Ours:
    """``ai4all.backend.native``, through the Python API."""

    def __init__(self, model: str, n_slots: int, **options: int) -> None:
        from ai4all.backend.base import EngineOptions
        from ai4all.backend.native import NativeBackend
        from ai4all.types.model import ModelFile

        path = Path(model)
        self._runner = asyncio.Runner()
        self._backend = NativeBackend()
        file = ModelFile(path.stem, path, _sha256(path), path.stat().st_size)
        threads = options.pop("threads")
        engine = EngineOptions(threads=threads, threads_batch=threads, n_slots=n_slots, **options)
        self._loaded = self._run(self._backend.load(file, engine))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def info(self) -> Answer:
        from ai4all import __version__
        from ai4all.backend.base import GenerateRequest

        return {
            "version": __version__,
            "build": self._backend.capabilities().engine_build,
            "device": self._loaded.device,
            "description": self._loaded.description,
            "threads": self._loaded.threads,
            "offers": sorted(field.name for field in fields(GenerateRequest)),
        }

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> Answer:
        answer: Answer = self._run(self._generate(prompt, max_tokens, **options))
        return answer

    def together(self, prompts: list[str], max_tokens: int) -> Answer:
        """Generate for all prompts at once; one answer for each, all by one clock."""

        async def all_of_them() -> list[Answer]:
            start = time.perf_counter()
            return await asyncio.gather(
                *(self._generate(prompt, max_tokens, start=start) for prompt in prompts)
            )

        return {"answers": self._run(all_of_them())}

    async def _generate(
        self,
        prompt: str,
        max_tokens: int,
        *,
        start: float | None = None,
        reuse: bool = False,
        speculate: bool = False,
        system_prompt: str | None = None,
    ) -> Answer:
        from ai4all.backend.base import Completion, GenerateRequest, TokenEvent

        known = {field.name for field in fields(GenerateRequest)}
        later = {"reuse_prefix": reuse, "speculate": speculate}
        request = GenerateRequest(
            prompt=prompt,
            system_prompt=system_prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            **{name: value for name, value in later.items() if name in known},
        )
        first = last = 0.0
        arrivals: list[tuple[float, int]] = []
        completion: Completion | None = None
        if start is None:
            start = time.perf_counter()
        events: AsyncIterator[Any] = self._backend.generate(request)
        async for event in events:
            if isinstance(event, TokenEvent) and event.token_ids:
                last = time.perf_counter() - start
                first = first or last
                arrivals.append((last, len(event.token_ids)))
            elif isinstance(event, Completion):
                completion = event
        total = time.perf_counter() - start
        assert completion is not None, "a generation ended without a completion"
        return {
            "prompt_tokens": completion.usage.prompt_tokens,
            "tokens": completion.usage.completion_tokens,
            "first_tokens": arrivals[0][1],
            "arrivals": arrivals,
            "first_s": first,
            "last_s": last,
            "total_s": total,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "reused": completion.fingerprint.prefix_reused,
        }

    def close(self) -> None:
        self._run(self._backend.close())
        self._runner.close()


class LlamaCppPython:
    """``llama_cpp.Llama.create_completion``, streaming."""

    def __init__(self, model: str, threads: int, n_slots: int, **options: int) -> None:
        from llama_cpp import Llama

        if n_slots != 1:
            raise NotImplementedError("it runs one sequence at a time")
        self._llama = Llama(
            model, n_threads=threads, n_threads_batch=threads, verbose=False, **options
        )
        vocabulary = range(self._llama.n_vocab())
        from llama_cpp import llama_cpp

        vocab = self._llama._model.vocab
        # End tokens would end it; the others are asked to sample on over them too.
        self._over_ends = {
            token: -100.0 for token in vocabulary if llama_cpp.llama_vocab_is_eog(vocab, token)
        }

    def info(self) -> Answer:
        from llama_cpp import llama_cpp

        return {
            "version": importlib.metadata.version("llama-cpp-python"),
            "build": llama_cpp.llama_print_system_info().decode(),
        }

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> Answer:
        if options:
            raise NotImplementedError(f"not offered: {', '.join(options)}")
        self._llama.reset()  # Or it would take the last prompt's cache.
        first = last = 0.0
        chunks = 0
        text: list[str] = []
        start = time.perf_counter()
        for chunk in self._llama.create_completion(
            prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            repeat_penalty=1.0,
            stream=True,
            logit_bias=self._over_ends,
        ):
            last = time.perf_counter() - start
            first = first or last
            choice = chunk["choices"][0]
            text.append(choice["text"])
            chunks += bool(choice["text"])
            reason = choice["finish_reason"]
        total = time.perf_counter() - start
        return {
            "tokens": max_tokens if reason == "length" else chunks,
            "first_s": first,
            "last_s": last,
            "total_s": total,
            "text": "".join(text),
        }

    def close(self) -> None:
        self._llama.close()


class Xllamacpp:
    """``xllamacpp.Server.handle_completions``, streaming to a callback."""

    def __init__(
        self, model: str, threads: int, n_ctx: int, n_batch: int, n_ubatch: int, n_slots: int
    ) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = model
        parameters.n_ctx = n_ctx * n_slots
        parameters.n_parallel = n_slots
        parameters.n_batch = n_batch
        parameters.n_ubatch = n_ubatch
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(parameters)

    def info(self) -> Answer:
        return {"version": importlib.metadata.version("xllamacpp")}

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> Answer:
        if options:
            raise NotImplementedError(f"not offered: {', '.join(options)}")
        first = last = 0.0
        tokens = 0
        text: list[str] = []

        def take(chunk: Any) -> None:
            nonlocal first, last, tokens
            last = time.perf_counter() - start
            first = first or last
            if isinstance(chunk, str | bytes):
                chunk = ujson.loads(chunk)
            for part in chunk if isinstance(chunk, list) else [chunk]:
                if "error" in part:
                    raise RuntimeError(str(part["error"]))
                text.extend(choice.get("text") or "" for choice in part.get("choices") or ())
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)

        start = time.perf_counter()
        self._server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            take,
        )
        total = time.perf_counter() - start
        return {
            "tokens": tokens,
            "first_s": first,
            "last_s": last,
            "total_s": total,
            "text": "".join(text),
        }

    def close(self) -> None:
        del self._server


LIBRARIES: dict[str, type[Any]] = {
    "ours": Ours,
    "llama-cpp-python": LlamaCppPython,
    "xllamacpp": Xllamacpp,
}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _serve(answers: TextIO) -> None:
    def answer(value: Answer) -> None:
        answers.write(ujson.dumps(value) + "\n")
        answers.flush()

    try:
        library: Library = LIBRARIES[sys.argv[1]](**ujson.loads(sys.argv[2]))
        answer(library.info())
    except Exception as exc:  # noqa: BLE001 - whatever it is, the other side wants to know.
        answer({"error": f"{type(exc).__name__}: {exc}"})
        return
    for line in sys.stdin:
        request = ujson.loads(line)
        try:
            answer(getattr(library, request.pop("op"))(**request))
        except Exception as exc:  # noqa: BLE001 - as above.
            answer({"error": f"{type(exc).__name__}: {exc}"})
    library.close()


if __name__ == "__main__":
    # Libraries write to standard output as they like; the answers have a copy of it.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(_answers)
