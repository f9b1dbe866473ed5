"""The engine in a process of its own: the same answers, and whatever can happen to the process."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import scripted_host
import ujson
from mortality import deadly_model
from structlog.testing import capture_logs
from tiny_gguf import encode_gguf, tiny_metadata, tiny_tensors

from ai4all.backend.base import (
    Completion,
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    InferenceBackend,
    PromptProgress,
    ScoreRequest,
    TokenEvent,
)
from ai4all.backend.crash_records import CrashRecords
from ai4all.backend.engine_process import EngineProcess, engine_environment
from ai4all.backend.isolated import IsolatedBackend
from ai4all.backend.native import NativeBackend
from ai4all.backend.quarantine import Quarantine
from ai4all.backend.watchdog import WatchdogLimits
from ai4all.errors import (
    BadRequest,
    ContextOverflow,
    DeadlineExceeded,
    DeviceUnavailable,
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineHung,
    EngineUnavailable,
    LoadFailed,
)
from ai4all.types.model import ModelFile

OPTIONS = EngineOptions(n_ctx=512, n_batch=64, n_ubatch=64, threads=1)
SCRIPTED = ModelFile("scripted", Path("absent.gguf"), "a" * 64, 100)
LONG = 400
FIGURES = "1, 1, 0, 0, 0, 0, 0, [1, 2, 3, 4, 5, 6, 7]"
"""Of a "finished" of the native engine: counts of tokens, and times."""
TIMES = "[1, 2, 3, 4, 5, 6, 7]"
TOKEN = '[2, "token", {"text": "a", "token_ids": [5], "completion_tokens": 1}]'


def file_of(path: Path) -> ModelFile:
    return ModelFile(
        "tiny", path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    )


def greedy(prompt: str = "Hello, world!", max_tokens: int = 16, **more: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
    }
    return GenerateRequest(**(fields | more))


@pytest.fixture
async def isolated(tiny_model: Path) -> AsyncIterator[IsolatedBackend]:
    """The real engine with the tiny model."""
    async with IsolatedBackend() as backend:
        await backend.load(file_of(tiny_model), OPTIONS)
        yield backend


Scripted = Callable[..., IsolatedBackend]


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    """Makes backends with a scripted engine process, and closes them."""
    opened: list[IsolatedBackend] = []

    def make(limits: WatchdogLimits | None = None, **script: Any) -> IsolatedBackend:
        opened.append(IsolatedBackend(limits=limits, command=scripted_host.command(**script)))
        return opened[-1]

    yield make
    for backend in opened:
        await backend.close()


async def under_way(
    backend: InferenceBackend, request: GenerateRequest
) -> asyncio.Task[Completion]:
    """A generation that has begun: its first token is here."""
    begun = asyncio.Event()

    async def run() -> Completion:
        stream = backend.generate(request)
        try:
            async for event in stream:
                if isinstance(event, TokenEvent):
                    begun.set()
                if isinstance(event, Completion):
                    return event
        finally:
            begun.set()
            await stream.aclose()
        raise AssertionError("no completion")

    task = asyncio.create_task(run())
    await begun.wait()
    return task


def pid_of(backend: IsolatedBackend) -> int:
    assert backend.process_id is not None
    return backend.process_id


def strike(backend: IsolatedBackend, number: int) -> None:
    os.kill(pid_of(backend), number)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def without_times(event: GenerationEvent) -> GenerationEvent:
    if isinstance(event, Completion):
        return replace(event, timings=None)  # type: ignore[arg-type]
    return event


def joined(events: list[GenerationEvent]) -> list[GenerationEvent]:
    """Events without times; tokens in a row as one, since how many come at once is chance."""
    found: list[GenerationEvent] = []
    for event in map(without_times, events):
        last = found[-1] if found else None
        if isinstance(event, TokenEvent) and isinstance(last, TokenEvent):
            found[-1] = TokenEvent(
                last.text + event.text,
                last.token_ids + event.token_ids,
                event.completion_tokens,
                last.logprobs + event.logprobs,
            )
        else:
            found.append(event)
    return found


class TestSameAsInProcess:
    async def test_events_are_equal(self, isolated: IsolatedBackend, tiny_model: Path) -> None:
        requests = [
            greedy("the sea " * 60, 30),
            greedy("Grüße, 世界 🌍"),
            greedy("Hello", system_prompt="Be brief."),
            greedy(temperature=1.3, seed=2**64 - 1, top_k=20),
            greedy(max_tokens=64, stop=("a", "zz")),
            greedy("half a pair \ud83d of surrogates"),
            greedy(max_tokens=5, logprobs=2),
        ]
        async with NativeBackend() as native:
            await native.load(file_of(tiny_model), OPTIONS)
            for request in requests:
                here = joined([event async for event in native.generate(request)])
                there = joined([event async for event in isolated.generate(request)])
                assert there == here
                assert {type(event) for event in there} == {
                    PromptProgress,
                    TokenEvent,
                    Completion,
                }

    async def test_what_was_loaded_is_described_alike(
        self, isolated: IsolatedBackend, tiny_model: Path
    ) -> None:
        async with NativeBackend() as native:
            here = await native.load(file_of(tiny_model), OPTIONS)
            there = isolated.loaded
            assert there is not None
            assert replace(there, load_ms=here.load_ms) == here
            assert isolated.capabilities().engine_build == native.capabilities().engine_build
            assert isolated.capabilities().build_info == native.capabilities().build_info

    async def test_embeddings_and_scores_are_equal(
        self, isolated: IsolatedBackend, tiny_model: Path
    ) -> None:
        embed = EmbedRequest(texts=("the sea", "salty \ud83d water"))
        score = ScoreRequest(prompt="The sea is", continuations=(" salt", " very much alive"))
        async with NativeBackend() as native:
            await native.load(file_of(tiny_model), OPTIONS)
            here, there = await native.embed(embed), await isolated.embed(embed)
            assert there.vectors.dtype == here.vectors.dtype
            assert there.vectors.tolist() == here.vectors.tolist()
            assert there.fingerprint == here.fingerprint
            scores = await isolated.score_labels(score)
            assert replace(scores, timings=None) == replace(  # type: ignore[arg-type]
                await native.score_labels(score),
                timings=None,  # type: ignore[arg-type]
            )

    async def test_timings_are_those_of_the_native_loop(self, isolated: IsolatedBackend) -> None:
        timings = (await isolated.complete(greedy())).timings
        parts = timings.queue_ms + timings.load_ms + timings.prompt_ms + timings.first_sample_ms
        assert timings.time_to_first_token_ms == pytest.approx(parts, abs=1e-6)
        assert timings.load_ms == 0.0

    async def test_load_reports_progress(self, tiny_model: Path) -> None:
        seen: list[float] = []
        async with IsolatedBackend() as backend:
            await backend.load(file_of(tiny_model), OPTIONS, seen.append)
        assert seen
        assert seen == sorted(seen)

    async def test_errors_keep_their_kind(self, isolated: IsolatedBackend) -> None:
        with pytest.raises(ContextOverflow, match=r"\d+ tokens, the context 512"):
            await isolated.complete(greedy("the sea " * 400))
        with pytest.raises(BadRequest, match="grammar"):
            await isolated.complete(greedy(ignore_eos=False, grammar="root ::= ("))
        with pytest.raises(DeadlineExceeded) as caught:
            await isolated.complete(greedy(deadline=time.monotonic() - 1))
        assert caught.value.details == {"prompt_tokens": 0, "completion_tokens": 0}
        await isolated.unload()
        await isolated.unload()
        assert isolated.loaded is None
        with pytest.raises(EngineError, match="no model is loaded"):
            await isolated.complete(greedy())
        with pytest.raises(LoadFailed, match="could not be loaded"):
            await isolated.load(ModelFile("gone", Path("/nonexistent.gguf"), "0" * 64, 1), OPTIONS)

    async def test_a_request_behind_a_load_waits_for_it(self, tiny_model: Path) -> None:
        async with IsolatedBackend() as backend:
            load = asyncio.create_task(backend.load(file_of(tiny_model), OPTIONS))
            await asyncio.sleep(0)
            assert (await backend.complete(greedy())).timings.load_ms > 0
            await load

    async def test_several_at_once(self, tiny_model: Path) -> None:
        async with IsolatedBackend() as backend:
            await backend.load(file_of(tiny_model), replace(OPTIONS, n_slots=4))
            alone = await backend.complete(greedy(max_tokens=24))
            ends = await asyncio.gather(
                *(backend.complete(greedy(max_tokens=24)) for _ in range(9))
            )
            assert all(end.usage.completion_tokens == 24 for end in ends)
            assert all(end.text == alone.text for end in ends)


class TestCancellation:
    async def test_closing_the_iterator_cancels(self, isolated: IsolatedBackend) -> None:
        stream = isolated.generate(greedy(max_tokens=LONG))
        async for event in stream:
            if isinstance(event, TokenEvent):
                break
        await stream.aclose()
        end = await isolated.complete(greedy(max_tokens=3))
        assert end.fingerprint.batched_with == 0
        assert isolated.resource_usage().active_threads == 0

    async def test_a_cancelled_task_leaves_nothing_running(self, scripted: Scripted) -> None:
        backend = scripted(generation={"hang_at": 1})
        await backend.load(SCRIPTED, OPTIONS)
        task = await under_way(backend, greedy())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: backend.resource_usage().active_threads == 0)
        assert (await backend.complete(greedy(max_tokens=1))).usage.completion_tokens == 1

    async def test_a_cancelled_load_leaves_a_usable_backend(
        self, isolated: IsolatedBackend, tiny_model: Path
    ) -> None:
        load = asyncio.create_task(isolated.load(file_of(tiny_model), OPTIONS))
        await asyncio.sleep(0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        await isolated.load(file_of(tiny_model), OPTIONS)
        assert (await isolated.complete(greedy())).usage.completion_tokens == 16

    async def test_after_a_cancelled_load_no_other_model_answers(
        self, isolated: IsolatedBackend, tiny_model: Path
    ) -> None:
        process_id = isolated.process_id
        given_up = 0
        for turn in range(60):
            await isolated.load(file_of(tiny_model), OPTIONS)
            other = replace(OPTIONS, n_ctx=256)
            load = asyncio.create_task(isolated.load(file_of(tiny_model), other))
            for _ in range(turn % 30):
                await asyncio.sleep(0.0005)
            load.cancel()
            await asyncio.wait({load})
            if isolated.loaded is None:
                given_up += 1
                with pytest.raises(EngineError):
                    await isolated.complete(greedy())
            else:
                # It had not begun, or was just over.
                completion = await isolated.complete(greedy())
                assert completion.fingerprint.n_ctx == isolated.loaded.n_ctx
        assert given_up > 0
        assert isolated.process_id == process_id

    async def test_at_once_it_leaves_nothing_that_counts_as_hung(
        self, tmp_path: Path, tiny_model: Path
    ) -> None:
        limits = WatchdogLimits(prefill=1.0, load=1.0, decode=1.0)
        records = CrashRecords(tmp_path)
        async with IsolatedBackend(limits=limits, crash_records=records) as backend:
            await backend.load(file_of(tiny_model), OPTIONS)
            for _ in range(20):
                task = asyncio.create_task(backend.embed(EmbedRequest(texts=("a",))))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: backend.resource_usage().active_threads == 0)
            await asyncio.sleep(1.5)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16
        assert not list(tmp_path.iterdir())


async def test_a_number_that_is_none_is_a_bad_request(
    isolated: IsolatedBackend,
) -> None:
    process_id = isolated.process_id
    assert (await isolated.complete(greedy(deadline=math.inf))).usage.completion_tokens == 16
    with pytest.raises(BadRequest, match="temperature"):
        await isolated.complete(greedy(temperature=math.nan))
    with pytest.raises(BadRequest, match="deadline"):
        await isolated.embed(EmbedRequest(texts=("a",), deadline=-math.inf))
    assert isolated.process_id == process_id


class TestDeath:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
    async def test_it_is_reported_and_the_next_request_computes(
        self, tmp_path: Path, tiny_model: Path, number: signal.Signals
    ) -> None:
        async with IsolatedBackend(crash_records=CrashRecords(tmp_path)) as backend:
            await backend.load(file_of(tiny_model), OPTIONS)
            before = await backend.complete(greedy())
            tasks = [await under_way(backend, greedy(max_tokens=LONG))]
            # One more, which waits in the engine's queue.
            tasks.append(asyncio.create_task(backend.complete(greedy())))
            await asyncio.sleep(0)
            pid = pid_of(backend)
            strike(backend, number)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            for error in errors:
                assert isinstance(error, EngineCrashed)
                assert error.retryable
                assert error.details is not None
                assert error.details["signal"] == number.name
            # Still there, because it will be again; and it is.
            assert backend.loaded is not None
            after = await backend.complete(greedy())
            assert after.token_ids == before.token_ids
            assert after.timings.load_ms > 0
            assert pid_of(backend) != pid
            (record,) = tmp_path.iterdir()
            assert errors[0].details["crash_record"] == record.name
            content = ujson.loads(record.read_text())
            assert content["signal"] == number.name
            assert content["kind"] == "crashed"
            assert content["state"] == "prefill"
            assert content["model_sha256"] == file_of(tiny_model).sha256
            assert content["engine_build"] == backend.capabilities().engine_build
            assert content["options"]["n_ctx"] == 512
            assert "Hello" not in record.read_text()

    async def test_an_assertion_is_recorded_and_no_debugger_is_started(
        self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in ("gdb", "lldb"):
            (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/debugged\n")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        hostile = tmp_path / "hostile.gguf"
        hostile.write_bytes(deadly_model())
        records = tmp_path / "crashes"
        async with IsolatedBackend(crash_records=CrashRecords(records)) as backend:
            with pytest.raises(EngineCrashed, match="GGML_ASSERT") as caught:
                await backend.load(file_of(hostile), OPTIONS)
            assert backend.loaded is None
            assert caught.value.details is not None
            assert caught.value.details["state"] == "loading"
            content = ujson.loads((records / caught.value.details["crash_record"]).read_text())
            assert "baichuan.cpp:" in content["assertion"]
            assert content["signal"] == "SIGABRT"
            await backend.load(file_of(tiny_model), OPTIONS)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16
        assert not (tmp_path / "debugged").exists()

    async def test_a_request_during_the_restart_waits_for_it(
        self, isolated: IsolatedBackend
    ) -> None:
        pid = pid_of(isolated)
        strike(isolated, signal.SIGKILL)
        await until(lambda: isolated.process_id is None)
        end = await isolated.complete(greedy())
        assert end.usage.completion_tokens == 16
        timings = end.timings
        assert timings.time_to_first_token_ms is not None
        assert timings.load_ms < timings.time_to_first_token_ms < timings.total_ms
        assert pid_of(isolated) != pid

    async def test_a_deadline_holds_during_the_restart(self, scripted: Scripted) -> None:
        backend = scripted(load_ms=300.0)
        await backend.load(SCRIPTED, OPTIONS)
        strike(backend, signal.SIGKILL)
        await until(lambda: backend.process_id is None)
        with pytest.raises(DeadlineExceeded):
            await backend.complete(greedy(deadline=time.monotonic() + 0.05))
        assert (await backend.complete(greedy())).usage.completion_tokens == 16

    async def test_an_idle_death_is_no_one_s_fault(
        self, isolated: IsolatedBackend, tiny_model: Path
    ) -> None:
        for _ in range(3):
            pid = pid_of(isolated)
            strike(isolated, signal.SIGKILL)
            await until(lambda pid=pid: isolated.process_id not in (None, pid))  # type: ignore[misc]
            await isolated.open()
        assert isolated.loaded is not None
        assert (await isolated.complete(greedy())).usage.completion_tokens == 16

    async def test_the_loop_keeps_turning(self, isolated: IsolatedBackend) -> None:
        gaps: list[float] = []

        async def tick() -> None:
            while True:
                at = time.monotonic()
                await asyncio.sleep(0.005)
                gaps.append(time.monotonic() - at)

        ticking = asyncio.create_task(tick())
        task = await under_way(isolated, greedy(max_tokens=LONG))
        strike(isolated, signal.SIGKILL)
        with pytest.raises(EngineCrashed):
            await task
        await isolated.complete(greedy())
        ticking.cancel()
        # Far below what a link's keepalive would notice.
        assert max(gaps) < 2.0

    async def test_twenty_restarts_leave_nothing_behind(self, scripted: Scripted) -> None:
        me = psutil.Process()
        backend = scripted(generation={"token_ms": 1.0})
        await backend.load(SCRIPTED, OPTIONS)
        counts = []
        for _ in range(21):
            task = await under_way(backend, greedy(max_tokens=LONG))
            strike(backend, signal.SIGKILL)
            with pytest.raises((EngineCrashed, LoadFailed)):
                await task
            backend._quarantine.lift(SCRIPTED.sha256)
            if backend.loaded is None:
                await backend.load(SCRIPTED, OPTIONS)
            await backend.complete(greedy(max_tokens=1))
            children = me.children()
            assert [child.pid for child in children] == [pid_of(backend)]
            counts.append((me.num_fds(), len(asyncio.all_tasks())))
        assert counts[-1] == counts[0]
        await backend.close()
        assert me.children() == []


async def test_how_one_ended_is_known_though_it_was_killed_meanwhile() -> None:
    for _ in range(20):
        process = EngineProcess(lambda process, message: None)
        process._process = ended = await asyncio.create_subprocess_exec("true")
        while ended.returncode is None:
            process.kill()
            await asyncio.sleep(0)
        assert ended.returncode in (0, -signal.SIGKILL)


class TestHang:
    LIMITS = WatchdogLimits(load=0.6, prefill=0.6, decode=0.6, silence=0.6)

    async def test_a_stopped_process(self, tmp_path: Path, tiny_model: Path) -> None:
        limits = WatchdogLimits(silence=0.8)
        async with IsolatedBackend(limits=limits, crash_records=CrashRecords(tmp_path)) as backend:
            await backend.load(file_of(tiny_model), OPTIONS)
            task = await under_way(backend, greedy(max_tokens=LONG))
            pid = pid_of(backend)
            strike(backend, signal.SIGSTOP)
            with pytest.raises(EngineHung, match="made no progress") as caught:
                await task
            assert caught.value.details is not None
            assert caught.value.details["signal"] == "SIGKILL"
            (record,) = tmp_path.iterdir()
            content = ujson.loads(record.read_text())
            assert content["kind"] == "hung"
            assert content["seconds"] >= 0.8
            assert is_gone(pid)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16

    @pytest.mark.parametrize(
        ("state", "script"),
        [
            ("decode", {"generation": {"hang_at": 3}}),
            ("prefill", {"generation": {"prompt_ms": 1e6}}),
        ],
    )
    async def test_a_hung_engine_in_a_lively_process(
        self, scripted: Scripted, state: str, script: dict[str, Any]
    ) -> None:
        backend = scripted(self.LIMITS, **script)
        await backend.load(SCRIPTED, OPTIONS)
        with pytest.raises(EngineHung, match=rf"for 0\.\d+ s \({state}\)") as caught:
            await backend.complete(greedy())
        assert caught.value.details is not None
        assert caught.value.details["state"] == state
        assert caught.value.retryable

    async def test_a_hung_load(self, scripted: Scripted) -> None:
        backend = scripted(self.LIMITS, load_ms=1e6)
        with pytest.raises(EngineHung, match="loading"):
            await backend.load(SCRIPTED, OPTIONS)
        assert backend.loaded is None
        with pytest.raises(EngineError, match="loaded"):
            await backend.complete(greedy())

    async def test_slow_is_not_hung_while_the_pulse_moves(self, scripted: Scripted) -> None:
        slow = {"prompt_ms": 1500.0, "token_ms_at": {"0": 0.0}}
        backend = scripted(self.LIMITS, generation={**slow}, load_ms=1500.0, pulse=True)
        await backend.load(SCRIPTED, OPTIONS)
        assert (await backend.complete(greedy(max_tokens=2))).usage.completion_tokens == 2

    async def test_an_idle_process_is_left_alone(self, scripted: Scripted) -> None:
        backend = scripted(self.LIMITS)
        await backend.load(SCRIPTED, OPTIONS)
        pid = pid_of(backend)
        await asyncio.sleep(1.5)
        assert backend.process_id == pid
        assert (await backend.complete(greedy())).usage.completion_tokens == 16


class TestStart:
    async def test_why_no_engine_can_run_is_passed_on(self, scripted: Scripted) -> None:
        backend = scripted(unavailable="the extension is not built")
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="the extension is not built"):
                await backend.open()
        with pytest.raises(EngineError, match="not been started"):
            backend.capabilities()

    async def test_a_program_that_is_not_there(self) -> None:
        backend = IsolatedBackend(command=["/nonexistent/python"])
        with pytest.raises(EngineUnavailable, match="No such file"):
            await backend.open()
        await backend.close()

    async def test_a_process_that_dies_at_its_start(self, scripted: Scripted) -> None:
        with pytest.raises(EngineCrashed, match="status 7 before it was ready"):
            await scripted(exit=7).open()

    async def test_a_process_that_never_speaks(self, scripted: Scripted) -> None:
        with pytest.raises(EngineHung, match="starting"):
            await scripted(WatchdogLimits(start=0.3), sleep=60).open()

    async def test_the_context_opens(self) -> None:
        async with IsolatedBackend() as backend:
            assert backend.capabilities().engine_build.startswith("llama.cpp ")

    async def test_a_load_opens(self, scripted: Scripted) -> None:
        backend = scripted()
        assert (await backend.load(SCRIPTED, OPTIONS)).description == "scripted"


class TestTrust:
    @pytest.mark.parametrize(
        "text",
        [
            "not JSON",
            "3",
            "[3]",
            '[["hello", {}]]',
            '[["tick", "x"]]',
            '[[1, "token", {"text": "x", "token_ids": [1], "completion_tokens": 1}]]',
            '[[1, "loaded", {"description": 3}]]',
            '[[1, "share", 1e999999]]',
            '[[1, "error", "SystemExit", "text", null]]',
            '[[1, "error"]]',
            "[" * 100_000,
        ],
    )
    async def test_a_process_that_breaks_the_rules_is_ended(
        self, scripted: Scripted, text: str
    ) -> None:
        backend = scripted(say=text)
        with pytest.raises(EngineCrashed, match="broke off the conversation"):
            await backend.load(SCRIPTED, OPTIONS)

    @pytest.mark.parametrize(
        "text",
        [
            '[[2, "finished", ["", "length", 1]]]',
            f'[[2, "finished", ["", "whim", {FIGURES}]]]',
            f'[[2, "finished", [7, "stop", {FIGURES}]]]',
            f'[[2, "finished", ["", "stop", {FIGURES.replace("1", "null", 1)}]]]',
            '[[2, "finished"]]',
            '[[2, "failed", ["no_such_code", "text", 0, 0]]]',
            '[[2, "failed", "busy"]]',
            # Counts that fit neither each other nor the one token.
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 2, 0, 0, 0, 0, 0, {TIMES}]]]',
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 1, 5, 0, 0, 0, 0, {TIMES}]]]',
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 1, -1, 0, 0, 0, 0, {TIMES}]]]',
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 1, 0, -1, 0, 0, 0, {TIMES}]]]',
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 1, 0, 0, 1, 2, 0, {TIMES}]]]',
            f'[{TOKEN}, [2, "finished", ["", "stop", 4, 1, 0, 0, 0, 0, 0, [7, 6, 5, 4, 3, 2, 1]]]]',
            '[[2, "token", {"text": "x", "token_ids": [1099511627776], "completion_tokens": 1}],'
            f' [2, "finished", ["", "stop", {FIGURES}]]]',
        ],
    )
    async def test_a_generation_that_is_none_ends_the_process(
        self, scripted: Scripted, text: str
    ) -> None:
        backend = scripted(answer=text)
        await backend.load(SCRIPTED, OPTIONS)
        with pytest.raises(EngineCrashed, match="broke off the conversation"):
            await backend.complete(greedy())

    async def test_what_the_native_engine_tells_is_made_a_whole_here(
        self, scripted: Scripted
    ) -> None:
        backend = scripted(answer=f'[{TOKEN}, [2, "finished", ["b", "stop", {FIGURES}]]]')
        await backend.load(SCRIPTED, OPTIONS)
        completion = await backend.complete(greedy())
        assert (completion.text, completion.token_ids) == ("ab", (5,))
        assert completion.finish_reason == "stop"
        assert completion.fingerprint.model_sha256 == SCRIPTED.sha256

    async def test_no_secret_and_no_descriptor_reaches_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret = "swordfish-1234"
        for name in ("AI4ALL_COORDINATOR_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, secret)
        with (tmp_path / "kept-open").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            async with IsolatedBackend() as backend:
                process = psutil.Process(pid_of(backend))
                assert secret not in process.environ().values()
                assert not any(name.startswith("AI4ALL_") for name in process.environ())
                assert process.environ()["GGML_NO_BACKTRACE"] == "1"
                assert secret not in " ".join(process.cmdline())
                assert file.name not in {opened.path for opened in process.open_files()}
                assert process.net_connections("inet") == []
                assert os.getsid(process.pid) == process.pid

    def test_the_environment_is_an_allow_list(self) -> None:
        kept = engine_environment(
            {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "0", "MY_TOKEN": "x", "PYTHONPATH": "/p"}
        )
        assert kept.keys() == {"HOME", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "GGML_NO_BACKTRACE"}
        assert kept["PYTHONPATH"].endswith(f"{os.pathsep}/p")

    async def test_signals_meant_for_the_worker_do_not_end_it(
        self, isolated: IsolatedBackend
    ) -> None:
        pid = pid_of(isolated)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            strike(isolated, number)
        assert (await isolated.complete(greedy())).usage.completion_tokens == 16
        assert pid_of(isolated) == pid

    async def test_nothing_in_the_current_directory_is_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "ujson.py").write_text("raise SystemExit(3)\n")
        monkeypatch.chdir(tmp_path)
        async with IsolatedBackend() as backend:
            assert backend.capabilities().devices


class TestQuarantine:
    async def test_three_deaths_and_across_instances(
        self, tmp_path: Path, tiny_model: Path
    ) -> None:
        file = tmp_path / "quarantine.json"
        model = file_of(tiny_model)
        async with IsolatedBackend(quarantine=Quarantine(file)) as backend:
            await backend.load(model, OPTIONS)
            for _ in range(3):
                task = await under_way(backend, greedy(max_tokens=LONG))
                strike(backend, signal.SIGSEGV)
                with pytest.raises(EngineCrashed):
                    await task
            # Whoever comes now is told, and so is whoever loads it.
            with pytest.raises(LoadFailed, match="quarantined until"):
                await backend.complete(greedy())
            assert backend.loaded is None
            with pytest.raises(LoadFailed, match="quarantined until"):
                await backend.load(model, OPTIONS)
            # Another shape is another matter, and lives.
            await backend.load(model, replace(OPTIONS, n_ctx=256))
            assert (await backend.complete(greedy())).usage.completion_tokens == 16
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        async with IsolatedBackend(quarantine=Quarantine(file)) as backend:
            with pytest.raises(LoadFailed, match="models unquarantine tiny"):
                await backend.load(model, OPTIONS)
            assert Quarantine(file).lift(model.sha256) == 1
            await backend.load(model, OPTIONS)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16

    async def test_a_model_that_dies_at_each_load(self, tmp_path: Path) -> None:
        hostile = tmp_path / "hostile.gguf"
        hostile.write_bytes(deadly_model())
        async with IsolatedBackend() as backend:
            for _ in range(3):
                with pytest.raises(EngineCrashed, match="GGML_ASSERT"):
                    await backend.load(file_of(hostile), OPTIONS)
            pid = pid_of(backend) if backend.process_id else None
            with pytest.raises(LoadFailed, match="quarantined"):
                await backend.load(file_of(hostile), OPTIONS)
            await backend.open()
            assert pid is None or pid_of(backend) == pid

    async def test_a_model_that_vanished_is_said_once_the_engine_is_back(
        self, tmp_path: Path, tiny_model: Path
    ) -> None:
        copy = tmp_path / "copy.gguf"
        shutil.copyfile(tiny_model, copy)
        async with IsolatedBackend() as backend:
            await backend.load(file_of(copy), OPTIONS)
            copy.unlink()
            strike(backend, signal.SIGKILL)
            await until(lambda: backend.process_id is None)
            for _ in range(2):
                with pytest.raises(LoadFailed, match="could not be loaded"):
                    await backend.complete(greedy())
            assert backend.loaded is None
            await backend.load(file_of(tiny_model), OPTIONS)
            assert (await backend.complete(greedy())).usage.completion_tokens == 16


class TestClose:
    async def test_it_ends_everything_once(self, isolated: IsolatedBackend) -> None:
        pid = pid_of(isolated)
        work = [await under_way(isolated, greedy(max_tokens=LONG))]
        work += [asyncio.create_task(isolated.complete(greedy())) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.gather(isolated.close(), isolated.close())
        done = await asyncio.gather(*work, return_exceptions=True)
        assert all(isinstance(result, EngineClosed) for result in done)
        assert is_gone(pid)
        assert psutil.Process().children() == []
        for call in (isolated.complete(greedy()), isolated.open()):
            with pytest.raises(EngineClosed):
                await call
        await isolated.close()
        assert isolated.loaded is None

    async def test_a_process_that_does_not_listen_is_killed(self, scripted: Scripted) -> None:
        backend = scripted(WatchdogLimits(close=0.2))
        await backend.load(SCRIPTED, OPTIONS)
        pid = pid_of(backend)
        strike(backend, signal.SIGSTOP)
        await backend.close()
        assert is_gone(pid)

    async def test_before_it_was_opened(self) -> None:
        backend = IsolatedBackend()
        await backend.close()
        with pytest.raises(EngineClosed):
            await backend.open()

    async def test_while_it_starts(self, scripted: Scripted) -> None:
        backend = scripted(sleep=60)
        opening = asyncio.create_task(backend.open())
        await until(lambda: psutil.Process().children() != [])
        await backend.close()
        with pytest.raises(EngineClosed):
            await opening
        assert psutil.Process().children() == []

    async def test_while_it_restarts(self, isolated: IsolatedBackend) -> None:
        waiting = await under_way(isolated, greedy(max_tokens=LONG))
        strike(isolated, signal.SIGKILL)
        await until(lambda: isolated.process_id is None)
        later = asyncio.create_task(isolated.complete(greedy()))
        await asyncio.sleep(0)
        await isolated.close()
        assert isinstance((await asyncio.gather(later, return_exceptions=True))[0], EngineClosed)
        with pytest.raises((EngineClosed, EngineCrashed)):
            await waiting
        assert psutil.Process().children() == []

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    async def test_it_does_not_outlive_its_parent(self, number: signal.Signals) -> None:
        program = """
            import asyncio, sys
            from ai4all.backend.isolated import IsolatedBackend

            async def main():
                backend = IsolatedBackend()
                await backend.open()
                print(backend.process_id, file=sys.stderr, flush=True)
                await asyncio.sleep(60)

            asyncio.run(main())
        """
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            textwrap.dedent(program),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert parent.stderr is not None
        pid = int(await parent.stderr.readline())
        assert not is_gone(pid)
        parent.send_signal(number)
        await parent.wait()
        await until(lambda: is_gone(pid))


class TestFigures:
    async def test_usage_includes_the_process(self, isolated: IsolatedBackend) -> None:
        usage = isolated.resource_usage()
        own = psutil.Process().memory_info().rss // 2**20
        assert usage.memory_mb > own + 10
        assert 0 <= usage.cpu_percent <= 100
        task = await under_way(isolated, greedy(max_tokens=LONG))
        assert isolated.resource_usage().active_threads == 1
        strike(isolated, signal.SIGKILL)
        assert isolated.resource_usage().memory_mb >= 0
        with pytest.raises(EngineCrashed):
            await task
        assert isolated.resource_usage().memory_mb > 0


async def test_a_file_that_is_not_spoiled_loads(tmp_path: Path) -> None:
    """Guards the trick of the hostile files."""
    file = tmp_path / "fine.gguf"
    file.write_bytes(encode_gguf(tiny_metadata(), tiny_tensors()))
    async with IsolatedBackend() as backend:
        assert (await backend.load(file_of(file), OPTIONS)).n_ctx_train == 512


GPU = {"name": "CUDA0", "kind": "gpu", "description": "a card", "memory_mb": 24_000,
       "memory_free_mb": 23_000, "backend": "cuda", "address": "0000:01:00.0"}  # fmt: skip
PROCESSOR = {"name": "CPU", "kind": "cpu", "description": "", "memory_mb": 100,
             "memory_free_mb": 50}  # fmt: skip


async def test_devices_are_asked_for_again(scripted: Scripted) -> None:
    backend = scripted(devices=[GPU, PROCESSOR])
    await backend.open()
    first = await backend.devices()
    assert first == backend.capabilities().devices
    assert [device.name for device in first] == ["CUDA0", "CPU"]
    assert (first[0].backend, first[0].is_gpu) == ("cuda", True)


async def test_a_device_that_is_gone_after_a_restart_is_an_error_and_not_the_cpu(
    scripted: Scripted, tmp_path: Path
) -> None:
    devices = tmp_path / "devices.json"
    devices.write_text(ujson.dumps([GPU, PROCESSOR]))
    backend = scripted(devices_file=str(devices))
    await backend.open()
    loaded = await backend.load(SCRIPTED, replace(OPTIONS, device="CUDA0"))
    assert loaded.device == "CUDA0"
    # The driver goes, and the process dies of it.
    devices.write_text(ujson.dumps([PROCESSOR]))
    assert backend.process_id is not None
    os.kill(backend.process_id, signal.SIGKILL)
    with pytest.raises((EngineCrashed, DeviceUnavailable)):
        await backend.complete(greedy())
    with pytest.raises(DeviceUnavailable, match="CUDA0"):
        await backend.complete(greedy())
    assert backend.loaded is None
    assert [device.name for device in backend.capabilities().devices] == ["CPU"]


async def test_another_look_is_another_process_and_no_death(
    scripted: Scripted, tmp_path: Path
) -> None:
    devices = tmp_path / "devices.json"
    devices.write_text(ujson.dumps([PROCESSOR]))
    backend = scripted(devices_file=str(devices))
    await backend.open()
    await backend.load(SCRIPTED, OPTIONS)
    first = backend.process_id
    devices.write_text(ujson.dumps([GPU, PROCESSOR]))
    with capture_logs() as logs:
        assert await backend.look_again()
    assert backend.process_id not in (None, first)
    assert [device.name for device in backend.capabilities().devices] == ["CUDA0", "CPU"]
    # The model is there again, as it was asked for.
    assert backend.loaded is not None
    assert (await backend.complete(greedy())).usage.completion_tokens > 0
    assert "engine_died" not in {entry["event"] for entry in logs}


async def test_a_process_that_is_sent_away_gets_no_more_work(scripted: Scripted) -> None:
    backend = scripted(devices=[PROCESSOR])
    await backend.open()
    await backend.load(SCRIPTED, OPTIONS)
    looking = asyncio.create_task(backend.look_again())
    await asyncio.sleep(0)
    asked = [asyncio.create_task(backend.devices()) for _ in range(3)]
    asked_too = asyncio.create_task(backend.complete(greedy()))
    assert await looking
    assert [len(found) for found in await asyncio.gather(*asked)] == [1, 1, 1]
    assert (await asked_too).usage.completion_tokens > 0
    assert not backend._commands


async def test_no_other_look_while_something_is_computed(scripted: Scripted) -> None:
    backend = scripted(generation={"token_ms": 20.0})
    await backend.open()
    await backend.load(SCRIPTED, OPTIONS)
    running = await under_way(backend, greedy(max_tokens=20))
    process = backend.process_id
    assert not await backend.look_again()
    assert (await running).usage.completion_tokens == 20
    assert backend.process_id == process


async def test_a_death_of_a_question_is_held_against_no_model(
    scripted: Scripted, tmp_path: Path
) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.json")
    backend = IsolatedBackend(
        quarantine=quarantine, command=scripted_host.command(die_of_devices=True)
    )
    async with backend:
        await backend.load(SCRIPTED, OPTIONS)
        for _ in range(3):
            with pytest.raises(EngineCrashed):
                await backend.devices()
        assert quarantine.held() == []
        assert (await backend.complete(greedy())).usage.completion_tokens > 0


async def test_processor_time_of_both_processes_counts(isolated: IsolatedBackend) -> None:
    before, own = isolated.cpu_seconds(), time.process_time()
    await isolated.complete(greedy(max_tokens=LONG))
    assert isolated.cpu_seconds() - before > time.process_time() - own
