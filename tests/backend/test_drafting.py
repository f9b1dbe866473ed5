"""A draft model beside the tiny one, through both backends: the text is what it is without."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.backend.base import (
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    InferenceBackend,
    ScoreRequest,
    TokenEvent,
)
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.native import NativeBackend
from ai4all.errors import LoadFailed
from ai4all.types.model import ModelFile

# A fixed length: how fast the machine is must not decide whether anything is drafted.
OPTIONS = EngineOptions(n_ctx=512, n_batch=64, n_ubatch=64, threads=1, device="cpu", draft_tokens=5)


def file_of(path: Path) -> ModelFile:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelFile(path.stem, path, digest, path.stat().st_size)


def request(prompt: str = "Hello, world!", max_tokens: int = 40, **more: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
    return GenerateRequest(prompt=prompt, max_tokens=max_tokens, **(fields | more))


REQUESTS = [
    request(),
    request("the sea " * 60),
    request(temperature=1.2, seed=5),
    request(temperature=0.8, seed=6, repetition_penalty=1.2, top_k=30),
    request("They have", stop=("a", "zz")),
    request(max_tokens=80, ignore_eos=False, grammar='root ::= ("yes " | "no ")+ "."'),
    request(logprobs=2, max_tokens=12),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The tiny model, in a format whose products are the same for one token and for several."""
    folder = tmp_path_factory.mktemp("target")
    return file_of(write_tiny_gguf(folder / "target.gguf", weight_type=Q8_0))


@pytest.fixture
def close(tiny_model: Path) -> ModelFile:
    """The same with its weights as they were: mostly right, at times wrong."""
    return file_of(tiny_model)


@pytest.fixture(params=[NativeBackend, IsolatedBackend])
async def backend(
    request: pytest.FixtureRequest, target: ModelFile, close: ModelFile
) -> AsyncIterator[InferenceBackend]:
    make: Callable[[], InferenceBackend] = request.param
    async with make() as backend:
        await backend.load(target, replace(OPTIONS, draft=close))
        yield backend


async def test_the_tokens_are_those_of_plain_decoding(
    backend: InferenceBackend, close: ModelFile
) -> None:
    assert backend.loaded is not None
    assert backend.loaded.draft == close
    drafted = accepted = 0
    for each in REQUESTS:
        with_draft = await backend.complete(each)
        plain = await backend.complete(replace(each, speculate=False, reuse_prefix=False))
        assert with_draft.token_ids == plain.token_ids
        assert (with_draft.text, with_draft.finish_reason) == (plain.text, plain.finish_reason)
        assert [each.token for each in with_draft.logprobs] == [
            each.token for each in plain.logprobs
        ]
        assert (plain.draft_tokens, plain.draft_model_tokens) == (0, 0)
        assert plain.fingerprint.draft_model_sha256 is None
        used = with_draft.draft_model_tokens > 0
        assert with_draft.fingerprint.draft_model_sha256 == (close.sha256 if used else None)
        drafted += with_draft.draft_model_tokens
        accepted += with_draft.draft_accepted
    assert drafted > 50
    assert accepted > 10


@pytest.mark.parametrize("n_batch", [1, 2, 4])
async def test_a_draft_is_no_longer_than_the_batch(
    target: ModelFile, close: ModelFile, n_batch: int
) -> None:
    options = replace(OPTIONS, n_batch=n_batch, n_ubatch=n_batch, draft=close, draft_tokens=16)
    async with NativeBackend() as backend:
        await backend.load(target, options)
        for each in REQUESTS:
            with_draft = await backend.complete(each)
            plain = await backend.complete(replace(each, speculate=False, reuse_prefix=False))
            assert with_draft.token_ids == plain.token_ids


async def test_deterministic_requests_do_without(backend: InferenceBackend) -> None:
    end = await backend.complete(request(deterministic=True))
    assert (end.draft_tokens, end.draft_model_tokens) == (0, 0)
    assert end.fingerprint.draft_model_sha256 is None


async def test_other_work_goes_on_beside_it(backend: InferenceBackend) -> None:
    rows, scores, end = await asyncio.gather(
        backend.embed(EmbedRequest(texts=("the sea", "salt"))),
        backend.score_labels(ScoreRequest(prompt="The sea is", continuations=(" salt", " wide"))),
        backend.complete(request()),
    )
    assert rows.vectors.shape[0] == 2
    assert len(scores.log_likelihoods) == 2
    assert end.usage.completion_tokens == 40
    assert rows.fingerprint.draft_model_sha256 is None


async def test_a_generation_can_be_closed_in_the_middle(backend: InferenceBackend) -> None:
    expected = await backend.complete(request())
    for _ in range(5):
        stream = backend.generate(request(max_tokens=480))
        async for event in stream:
            if isinstance(event, TokenEvent) and event.completion_tokens > 6:
                break
        await stream.aclose()
        assert (await backend.complete(request())).token_ids == expected.token_ids


@pytest.mark.parametrize("make", [NativeBackend, IsolatedBackend])
async def test_one_that_does_not_serve_is_refused(
    make: Callable[[], InferenceBackend], tiny_model: Path, tmp_path: Path
) -> None:
    strange = file_of(write_tiny_gguf(tmp_path / "strange.gguf", renamed={300: "nowhere"}))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model.read_bytes()[:5000])
    async with make() as backend:
        for draft, reason in ((strange, "token 300 is 'nowhere'"), (file_of(broken), "")):
            with pytest.raises(LoadFailed, match=f"^draft_model: .*{reason}"):
                await backend.load(file_of(tiny_model), replace(OPTIONS, draft=draft))
            assert backend.loaded is None
        await backend.load(file_of(tiny_model), OPTIONS)
        assert (await backend.complete(request())).draft_model_tokens == 0
