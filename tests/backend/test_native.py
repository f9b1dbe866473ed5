"""The real engine behind the real adapter, with the tiny model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import encode_gguf, tiny_metadata, tiny_tensors

from ai4all import _engine
from ai4all.backend import native, registry
from ai4all.backend.base import (
    Completion,
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    PromptProgress,
    ScoreRequest,
    TokenEvent,
)
from ai4all.backend.completions import NATIVE_ERRORS, timings_of, tokens_sha256
from ai4all.backend.native import NativeBackend
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
    EngineUnavailable,
    LoadFailed,
)
from ai4all.types.model import ModelFile
from ai4all.types.task import FinishReason

OPTIONS = EngineOptions(n_ctx=512, n_batch=64, n_ubatch=64, threads=1)


def model_file(path: Path) -> ModelFile:
    return ModelFile(
        "tiny", path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    )


def greedy(prompt: str = "Hello, world!", max_tokens: int = 16, **more: object) -> GenerateRequest:
    fields: dict[str, object] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
    }
    return GenerateRequest(**(fields | more))  # type: ignore[arg-type]


@pytest.fixture
async def backend(tiny_model: Path) -> AsyncIterator[NativeBackend]:
    backend = NativeBackend()
    await backend.load(model_file(tiny_model), OPTIONS)
    yield backend
    await backend.close()


async def collect(backend: NativeBackend, request: GenerateRequest) -> list[GenerationEvent]:
    return [event async for event in backend.generate(request)]


class TestErrors:
    def test_every_native_code_has_one_exception(self) -> None:
        codes = set(_engine.ERROR_NAMES) - {"ok"}
        assert codes == set(NATIVE_ERRORS)
        assert len(set(NATIVE_ERRORS.values())) == len(codes)
        assert all(issubclass(kind, Ai4allError) for kind in NATIVE_ERRORS.values())
        assert "unknown" not in codes

    async def test_missing_file(self) -> None:
        async with NativeBackend() as backend:
            gone = ModelFile("gone", Path("/nonexistent.gguf"), "0" * 64, 1)
            with pytest.raises(LoadFailed, match="could not be loaded"):
                await backend.load(gone, OPTIONS)
            assert backend.loaded is None

    async def test_nothing_loaded(self) -> None:
        async with NativeBackend() as backend:
            with pytest.raises(EngineError, match="no model is loaded"):
                await backend.complete(greedy())

    async def test_context_overflow_names_both_numbers(self, backend: NativeBackend) -> None:
        with pytest.raises(ContextOverflow, match=r"\d+ tokens, the context 512"):
            await backend.complete(greedy("the sea " * 400))

    async def test_bad_grammar(self, backend: NativeBackend) -> None:
        with pytest.raises(BadRequest, match="grammar"):
            await backend.complete(greedy(ignore_eos=False, grammar="root ::= ("))

    async def test_queue_is_bounded(self, tiny_model: Path) -> None:
        async with NativeBackend(queue_capacity=2) as backend:
            await backend.load(model_file(tiny_model), OPTIONS)
            work = [
                asyncio.create_task(backend.complete(greedy(max_tokens=400))) for _ in range(40)
            ]
            done = await asyncio.gather(*work, return_exceptions=True)
            refused = [result for result in done if isinstance(result, EngineBusy)]
            served = [result for result in done if isinstance(result, Completion)]
            assert refused
            assert served
            assert len(refused) + len(served) == 40


class TestGenerate:
    async def test_events_add_up(self, backend: NativeBackend) -> None:
        events = await collect(backend, greedy("the sea " * 60, 12))
        prompts = [event for event in events if isinstance(event, PromptProgress)]
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        end = events[-1]
        assert isinstance(end, Completion)
        assert prompts[-1].processed == prompts[-1].total == end.usage.prompt_tokens > 64
        assert [p.processed for p in prompts] == sorted({p.processed for p in prompts})
        assert "".join(event.text for event in tokens) == end.text
        assert tuple(t for event in tokens for t in event.token_ids) == end.token_ids
        assert len(end.token_ids) == end.usage.completion_tokens == 12
        assert end.finish_reason is FinishReason.LENGTH

    async def test_timings_split_the_time_to_first_token(self, backend: NativeBackend) -> None:
        timings = (await backend.complete(greedy())).timings
        parts = timings.queue_ms + timings.load_ms + timings.prompt_ms + timings.first_sample_ms
        assert timings.time_to_first_token_ms == pytest.approx(parts, abs=1e-6)
        assert timings.load_ms == 0.0
        assert 0 < timings.prompt_ms < timings.time_to_first_token_ms < timings.total_ms
        assert timings.decode_tokens_per_second
        assert timings.prompt_tokens_per_second

    async def test_a_request_behind_a_load_reports_it(self, tiny_model: Path) -> None:
        async with NativeBackend() as backend:
            # The tiny model loads in a millisecond; on a busy machine that may be over before the
            # request is made, so there is more than one try.
            for _ in range(50):
                load, end = await asyncio.gather(
                    backend.load(model_file(tiny_model), OPTIONS), backend.complete(greedy())
                )
                assert end.fingerprint.model_sha256 == load.file.sha256
                if end.timings.load_ms > 0:
                    break
            assert 0 < end.timings.load_ms <= load.load_ms

    async def test_greedy_repeats_and_the_fingerprint_hashes_it(
        self, backend: NativeBackend
    ) -> None:
        first, second = [await backend.complete(greedy()) for _ in range(2)]
        assert first.token_ids == second.token_ids
        assert first.fingerprint == second.fingerprint
        packed = struct.pack(f"<{len(first.token_ids)}i", *first.token_ids)
        assert first.fingerprint.output_tokens_sha256 == hashlib.sha256(packed).hexdigest()
        assert first.fingerprint.n_ctx == 512

    async def test_seed_is_reported_and_repeats(self, backend: NativeBackend) -> None:
        drawn = await backend.complete(greedy(temperature=1.5, seed=None))
        seed = drawn.fingerprint.seed
        again = await backend.complete(greedy(temperature=1.5, seed=seed))
        assert again.token_ids == drawn.token_ids
        wide = await backend.complete(greedy(temperature=1.5, seed=2**64 - 1))
        assert wide.fingerprint.seed < 2**32

    async def test_chat_template_changes_the_prompt(self, backend: NativeBackend) -> None:
        plain = await backend.complete(greedy("Hello"))
        chat = await backend.complete(greedy("Hello", system_prompt="Be brief."))
        assert chat.usage.prompt_tokens > plain.usage.prompt_tokens + 4

    async def test_several_at_once(self, tiny_model: Path) -> None:
        async with NativeBackend() as backend:
            await backend.load(
                model_file(tiny_model), EngineOptions(n_ctx=256, threads=1, n_slots=4)
            )
            ends = await asyncio.gather(
                *(backend.complete(greedy("Hello" + "!" * n, 24)) for n in range(9))
            )
            assert all(end.usage.completion_tokens == 24 for end in ends)
            assert max(end.fingerprint.batched_with for end in ends) == 3

    async def test_stop_sequence(self, backend: NativeBackend) -> None:
        whole = (await backend.complete(greedy(max_tokens=64))).text
        marker = next(whole[i : i + 3] for i in range(4, len(whole)) if whole[i : i + 3].isascii())
        end = await backend.complete(greedy(max_tokens=64, stop=(marker,)))
        assert end.finish_reason is FinishReason.STOP
        assert end.text == whole[: whole.index(marker)]


class TestNoNumbers:
    """A model whose weights overflow."""

    @pytest.fixture
    async def broken(self, tmp_path: Path) -> AsyncIterator[NativeBackend]:
        tensors = [
            dataclasses.replace(tensor, data=np.full(tensor.dims, 1e38, np.float32).tobytes())
            if tensor.name == "output.weight"
            else tensor
            for tensor in tiny_tensors()
        ]
        path = tmp_path / "broken.gguf"
        path.write_bytes(encode_gguf(tiny_metadata(), tensors))
        async with NativeBackend() as backend:
            await backend.load(model_file(path), OPTIONS)
            yield backend

    async def test_a_generation_fails(self, broken: NativeBackend) -> None:
        with pytest.raises(EngineCrashed, match="hold no number"):
            await broken.complete(greedy())

    async def test_a_score_fails(self, broken: NativeBackend) -> None:
        for _ in range(2):
            with pytest.raises(EngineCrashed, match="hold no number"):
                await broken.score_labels(
                    ScoreRequest(prompt="the sea", continuations=(" is", " was salt"))
                )


class TestCancellation:
    async def test_closing_the_iterator_cancels(self, backend: NativeBackend) -> None:
        stream = backend.generate(greedy(max_tokens=400))
        async for event in stream:
            if isinstance(event, TokenEvent):
                break
        await stream.aclose()
        end = await backend.complete(greedy(max_tokens=3))
        assert end.usage.completion_tokens == 3
        assert end.fingerprint.batched_with == 0

    async def test_cancelling_the_task_cancels(self, backend: NativeBackend) -> None:
        task = asyncio.create_task(backend.complete(greedy(max_tokens=400)))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await backend.complete(greedy(max_tokens=3))).usage.completion_tokens == 3

    async def test_deadline(self, backend: NativeBackend) -> None:
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.complete(greedy(deadline=time.monotonic() - 1))
        assert caught.value.details == {"prompt_tokens": 0, "completion_tokens": 0}


class TestLimits:
    """Requests at the edges of what fits."""

    async def test_a_deadline_that_has_passed_is_nobody_elses(
        self, backend: NativeBackend, tiny_model: Path
    ) -> None:
        soon = time.monotonic() + 0.3
        await backend.embed(EmbedRequest(texts=("a",), deadline=soon))
        await backend.complete(greedy(max_tokens=1, deadline=soon))
        await asyncio.sleep(0.4)
        await backend.load(model_file(tiny_model), OPTIONS)
        assert (await backend.complete(greedy())).usage.completion_tokens == 16

    async def test_labels_at_the_end_of_the_context(self, backend: NativeBackend) -> None:
        labels = tuple(f"label number {n}" for n in range(20))
        scored = []
        for words in range(200, 800, 10):
            request = ScoreRequest(prompt="a " * words, continuations=labels)
            try:
                scored.append(len((await backend.score_labels(request)).log_likelihoods))
            except ContextOverflow:
                break
        else:
            pytest.fail("everything fits")
        assert set(scored) == {20}

    async def test_a_text_without_an_end_is_cut_into_words(self, tmp_path: Path) -> None:
        """By std::regex, which recurses once for each character."""
        file = tmp_path / "words.gguf"
        metadata = tiny_metadata() | {
            "tokenizer.ggml.model": ("str", "gpt2"),
            "tokenizer.ggml.pre": ("str", "deepseek-coder"),
            "tokenizer.ggml.merges": ("array:str", ["a a"]),
        }
        file.write_bytes(encode_gguf(metadata, tiny_tensors()))
        async with NativeBackend() as backend:
            await backend.load(model_file(file), OPTIONS)
            with pytest.raises(ContextOverflow):
                await backend.complete(greedy("a" * 300_000))


class TestLifetime:
    async def test_close_ends_everything_once(self, tiny_model: Path) -> None:
        backend = NativeBackend()
        await backend.load(model_file(tiny_model), OPTIONS)
        work = [asyncio.create_task(backend.complete(greedy(max_tokens=400))) for _ in range(20)]
        await asyncio.sleep(0)
        await backend.close()
        await backend.close()
        done = await asyncio.gather(*work, return_exceptions=True)
        assert any(isinstance(result, EngineClosed) for result in done)
        assert all(isinstance(result, EngineClosed | Completion | Cancelled) for result in done)
        with pytest.raises(EngineClosed):
            await backend.complete(greedy())

    async def test_unload_and_load_again(self, backend: NativeBackend, tiny_model: Path) -> None:
        first = await backend.complete(greedy())
        await backend.unload()
        await backend.unload()
        assert backend.loaded is None
        seen: list[float] = []
        await backend.load(model_file(tiny_model), OPTIONS, seen.append)
        assert seen == sorted(seen)
        assert (await backend.complete(greedy())).token_ids == first.token_ids

    async def test_a_cancelled_load_leaves_a_usable_backend(self, tiny_model: Path) -> None:
        async with NativeBackend() as backend:
            load = asyncio.create_task(backend.load(model_file(tiny_model), OPTIONS))
            await asyncio.sleep(0)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            await backend.load(model_file(tiny_model), OPTIONS)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16

    def test_an_unclosed_engine_warns(self) -> None:
        engines = [_engine.Engine(4)]
        with pytest.warns(ResourceWarning, match="not closed"):
            engines.clear()

    def test_use_after_fork_is_refused(self) -> None:
        engine = _engine.Engine(4)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                engine.drain()
                os.write(write, b"served")
            except RuntimeError:
                os.write(write, b"refused")
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 16) == b"refused"
        os.close(read)
        os.waitpid(child, 0)
        engine.close()

    async def test_the_loop_keeps_turning(self, backend: NativeBackend) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        await backend.complete(greedy(max_tokens=200))
        ticking.cancel()
        assert ticks > 200


class TestFigures:
    def test_timings_of(self) -> None:
        ms = 1_000_000
        stamps = (10 * ms, 14 * ms, 15 * ms, 25 * ms, 26 * ms, 126 * ms, 127 * ms)
        timings = timings_of(stamps, 20, 11)
        assert timings.to_dict() == {
            "queue_ms": 1.0,
            "load_ms": 4.0,
            "prompt_ms": 10.0,
            "first_sample_ms": 1.0,
            "time_to_first_token_ms": 16.0,
            "total_ms": 117.0,
            "prompt_tokens_per_second": 2000.0,
            "decode_tokens_per_second": 100.0,
        }

    def test_tokens_sha256_is_little_endian(self) -> None:
        assert (
            tokens_sha256((1, 258)) == hashlib.sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).hexdigest()
        )

    async def test_capabilities_and_usage(self, backend: NativeBackend) -> None:
        capabilities = backend.capabilities()
        assert capabilities.backend in ("cpu", "cuda", "rocm", "vulkan", "metal")
        assert capabilities.engine_build.startswith("llama.cpp ")
        assert capabilities.devices
        assert capabilities.build_info["backends"]
        usage = backend.resource_usage()
        assert usage.memory_mb > 0
        assert usage.active_threads == 0
        assert 0 <= usage.cpu_percent <= 100

    def test_the_build_reports_the_pin_and_not_our_commit(self) -> None:
        pin = (Path(__file__).parents[2] / "vendor" / "llama.cpp.toml").read_text()
        assert f'upstream_commit = "{registry.build_info()["llama_commit"]}"' in pin


class TestRegistry:
    def test_describe_names_what_runs_and_why_not(self) -> None:
        assert [(status.name, status.available) for status in registry.describe()] == [
            ("isolated", True),
            ("native", True),
        ]
        found = registry.capabilities()
        targets = {status.name: status for status in registry.targets(found)}
        assert set(targets) == {"cpu", "cuda", "rocm", "vulkan", "metal"}
        assert targets["cpu"].available
        assert all(status.available or status.reason for status in targets.values())

    def test_targets_tell_a_build_without_one_from_a_driver_without_a_device(self) -> None:
        found = registry.capabilities()
        info = {"backends": ["CPU", "CUDA"], "not_loaded": {"hip": "libamdhip64.so.6: cannot open"}}
        targets = {s.name: s for s in registry.targets(dataclasses.replace(found, build_info=info))}
        built = {name: (status.built, status.available) for name, status in targets.items()}
        assert built["cuda"] == built["rocm"] == (True, False)
        assert built["vulkan"] == (False, False)
        assert targets["cuda"].reason == "cuda is built in, but the driver shows no device"
        assert "could not be loaded: libamdhip64.so.6" in targets["rocm"].reason
        assert "cmake.define.GGML_VULKAN=ON" in targets["vulkan"].reason

    def test_the_same_is_said_by_a_process_of_its_own(self) -> None:
        here, there = registry.capabilities(), registry.ask_capabilities()
        assert there.build_info == here.build_info
        assert [device.name for device in there.devices] == [d.name for d in here.devices]

    def test_a_missing_driver_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise ImportError("libcuda.so.1: cannot open shared object file: No such file")

        monkeypatch.setattr(registry.importlib, "import_module", absent)
        with pytest.raises(EngineUnavailable, match="NVIDIA's driver, which is not installed"):
            registry.open_backend()

    def test_unknown_backend(self) -> None:
        with pytest.raises(EngineUnavailable, match="no backend 'gpu'"):
            registry.open_backend("gpu")

    def test_a_missing_extension_says_how_to_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise ImportError("cannot import name '_engine' from 'ai4all'")

        monkeypatch.setattr(registry.importlib, "import_module", absent)
        with pytest.raises(EngineUnavailable, match="pip install"):
            registry.open_backend()
        for status in registry.describe():
            assert not status.available
            assert "pip install" in status.reason


def test_stub_matches_the_extension() -> None:
    """Every public name of the extension is in its stub, and the other way round."""
    stub = (Path(native.__file__).parents[1] / "_engine.pyi").read_text()
    public: Callable[[str], bool] = lambda name: not name.startswith("_")  # noqa: E731
    names = {name for name in vars(_engine) if public(name)} - {"os", "warnings"}
    assert all(name in stub for name in names)
    methods = {name for name in vars(_engine.Engine) if public(name)}
    assert all(f"def {name}(" in stub for name in methods)
