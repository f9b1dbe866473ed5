from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ai4all.backend.base import (
    Completion,
    EngineOptions,
    GenerateRequest,
    GenerationEvent,
    PromptProgress,
    TokenEvent,
)
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import (
    ContextOverflow,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    EngineCrashed,
    LoadFailed,
)
from ai4all.types.model import ModelFile
from ai4all.types.task import FinishReason

MODEL = ModelFile("tiny", Path("absent.gguf"), "ab" * 32, 1)


async def loaded(backend: FakeBackend, **options: int) -> FakeBackend:
    await backend.load(MODEL, EngineOptions(**options))
    return backend


async def test_the_script_becomes_events_and_figures() -> None:
    script = ScriptedGeneration(
        tokens=("Hel", "lo", "!"),
        queue_ms=1.0,
        prompt_ms=20.0,
        prompt_chunks=2,
        token_ms=5.0,
        token_ms_at={0: 4.0},
    )
    backend = await loaded(FakeBackend(script, time_scale=0.0))
    events = [event async for event in backend.generate(GenerateRequest(prompt="a b c d"))]
    assert events[:2] == [PromptProgress(2, 4), PromptProgress(4, 4)]
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.text for event in tokens] == ["Hel", "lo", "!"]
    assert [event.completion_tokens for event in tokens] == [1, 2, 3]
    end = events[-1]
    assert isinstance(end, Completion)
    assert end.text == "Hello!"
    assert end.finish_reason is FinishReason.STOP
    assert end.token_ids == tuple(token.token_ids[0] for token in tokens)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (4, 3)
    timings = end.timings
    assert timings.time_to_first_token_ms == 25.0
    assert timings.total_ms == 35.0
    assert timings.prompt_tokens_per_second == 200.0
    assert timings.decode_tokens_per_second == 200.0
    assert end.fingerprint.model_sha256 == MODEL.sha256


async def test_equal_requests_give_equal_events() -> None:
    request = GenerateRequest(prompt="the same", max_tokens=20)
    runs = []
    for _ in range(2):
        backend = await loaded(FakeBackend())
        runs.append([event async for event in backend.generate(request)])
    assert runs[0] == runs[1]
    other = await backend.complete(GenerateRequest(prompt="another", max_tokens=20))
    assert other.text != runs[0][-1].text
    assert other.finish_reason is FinishReason.LENGTH
    assert other.usage.completion_tokens == 20


async def test_ignore_eos_starts_the_answer_over() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(tokens=("a", "b"))))
    request = GenerateRequest(prompt="x", max_tokens=5, ignore_eos=True)
    end = await backend.complete(request)
    assert end.text == "ababa"
    assert end.finish_reason is FinishReason.LENGTH


async def test_a_stop_sequence_over_a_token_border_is_cut_and_never_shown() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(tokens=("one S", "TO", "P two", "no"))))
    events = [e async for e in backend.generate(GenerateRequest(prompt="x", stop=("STOP",)))]
    end = events[-1]
    assert end.text == "one "
    assert end.finish_reason is FinishReason.STOP
    assert "".join(e.text for e in events if isinstance(e, TokenEvent)) == "one "
    assert end.usage.completion_tokens == 3


async def test_text_held_for_a_stop_sequence_that_does_not_come_is_given_at_the_end() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(tokens=("one S", "T"))))
    events = [e async for e in backend.generate(GenerateRequest(prompt="x", stop=("STOP",)))]
    assert "".join(e.text for e in events if isinstance(e, TokenEvent)) == "one ST"
    assert events[-1].text == "one ST"


async def test_scripts_go_in_turn_and_the_last_repeats() -> None:
    scripts = [ScriptedGeneration(tokens=("a",)), ScriptedGeneration(tokens=("b",))]
    backend = await loaded(FakeBackend(scripts))
    request = GenerateRequest(prompt="x")
    assert [(await backend.complete(request)).text for _ in range(3)] == ["a", "b", "b"]


async def test_a_function_can_be_the_script() -> None:
    backend = await loaded(
        FakeBackend(lambda request, n: ScriptedGeneration(tokens=(request.prompt, str(n))))
    )
    assert (await backend.complete(GenerateRequest(prompt="p"))).text == "p0"
    assert (await backend.complete(GenerateRequest(prompt="q"))).text == "q1"


async def test_an_error_comes_at_its_token_with_the_count() -> None:
    script = ScriptedGeneration(tokens=("a", "b", "c"), error=EngineCrashed("boom"), error_at=2)
    backend = await loaded(FakeBackend([script, ScriptedGeneration(tokens=("fine",))]))
    seen: list[GenerationEvent] = []

    async def read() -> None:
        async for event in backend.generate(GenerateRequest(prompt="x")):
            seen.append(event)  # noqa: PERF401 - what came before the error must be kept

    with pytest.raises(EngineCrashed, match="boom") as caught:
        await read()
    assert caught.value.details == {"completion_tokens": 2}
    assert len([e for e in seen if isinstance(e, TokenEvent)]) == 2
    assert backend.calls.failed == 1
    assert backend.active == 0
    assert (await backend.complete(GenerateRequest(prompt="x"))).text == "fine"


async def test_the_deadline_ends_a_slow_answer() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(token_ms_at={3: 60_000.0})))
    request = GenerateRequest(prompt="x", deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceeded) as caught:
        await backend.complete(request)
    assert caught.value.details == {"completion_tokens": 3}


async def test_a_passed_deadline_ends_it_without_any_delay() -> None:
    backend = await loaded(FakeBackend())
    request = GenerateRequest(prompt="x", deadline=time.monotonic() - 1.0)
    with pytest.raises(DeadlineExceeded):
        await backend.complete(request)


async def test_closing_the_iterator_cancels_and_frees_the_slot() -> None:
    backend = await loaded(FakeBackend())
    stream = backend.generate(GenerateRequest(prompt="x", max_tokens=50))
    async for event in stream:
        if isinstance(event, TokenEvent):
            break
    assert backend.active == 1
    await stream.aclose()
    assert backend.active == 0
    assert backend.calls.cancelled == 1
    assert backend.calls.completed == 0


async def test_a_hang_outlives_the_deadline_and_ends_with_cancellation() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(hang_at=1)))
    request = GenerateRequest(prompt="x", deadline=time.monotonic() + 0.01)
    task = asyncio.create_task(backend.complete(request))
    done, _ = await asyncio.wait({task}, timeout=0.05)
    assert not done
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.active == 0


async def test_close_ends_the_running_and_the_waiting() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(hang_at=0)))
    tasks = [asyncio.create_task(backend.complete(GenerateRequest(prompt="x"))) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert backend.active == 1
    await backend.close()
    await backend.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineClosed] * 3
    with pytest.raises(EngineClosed):
        await backend.complete(GenerateRequest(prompt="x"))


async def test_slots_bound_what_runs_at_once_and_none_is_lost() -> None:
    backend = FakeBackend(ScriptedGeneration(tokens=("a",), token_ms=1.0))
    await loaded(backend, n_slots=2)
    peak = 0

    async def one() -> None:
        nonlocal peak
        async for _ in backend.generate(GenerateRequest(prompt="x")):
            peak = max(peak, backend.active)

    tasks = [asyncio.create_task(one()) for _ in range(8)]
    await asyncio.sleep(0)
    tasks[5].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(r, asyncio.CancelledError) for r in results) == 1
    assert peak == 2
    assert backend.active == 0
    assert backend.calls.completed == 7


async def test_a_full_queue_is_busy() -> None:
    backend = await loaded(FakeBackend(ScriptedGeneration(hang_at=0), max_queue=1))
    stream = backend.generate(GenerateRequest(prompt="x"))
    await anext(stream)
    with pytest.raises(EngineBusy):
        await backend.complete(GenerateRequest(prompt="x"))
    await stream.aclose()


async def test_a_prompt_as_long_as_the_context_overflows() -> None:
    backend = await loaded(FakeBackend(), n_ctx=4)
    with pytest.raises(ContextOverflow) as caught:
        await backend.complete(GenerateRequest(prompt="a b c d"))
    assert caught.value.details == {"prompt_tokens": 4, "n_ctx": 4}
    fits = await backend.complete(GenerateRequest(prompt="a b c", max_tokens=9))
    assert fits.usage.completion_tokens == 1


async def test_a_request_waits_for_the_load_and_says_how_long() -> None:
    backend = FakeBackend(load_ms=5.0)
    shares: list[float] = []
    load = asyncio.create_task(backend.load(MODEL, EngineOptions(), shares.append))
    await asyncio.sleep(0)
    end = await backend.complete(GenerateRequest(prompt="x", max_tokens=1))
    assert end.timings.load_ms == 5.0
    assert end.timings.time_to_first_token_ms == 5.0
    assert (await load) is backend.loaded
    assert shares == [0.0, 1.0]


async def test_a_failed_load_fails_those_who_wait_for_it() -> None:
    backend = FakeBackend(load_ms=1.0, load_error=LoadFailed("bad file"))
    load = asyncio.create_task(backend.load(MODEL, EngineOptions()))
    await asyncio.sleep(0)
    with pytest.raises(LoadFailed):
        await backend.complete(GenerateRequest(prompt="x"))
    with pytest.raises(LoadFailed):
        await load
    assert backend.loaded is None


async def test_without_a_model_nothing_is_generated() -> None:
    backend = FakeBackend()
    with pytest.raises(EngineClosed):
        await backend.complete(GenerateRequest(prompt="x"))
    await loaded(backend)
    await backend.unload()
    with pytest.raises(EngineClosed):
        await backend.complete(GenerateRequest(prompt="x"))
    assert (backend.calls.loads, backend.calls.unloads) == (1, 1)
