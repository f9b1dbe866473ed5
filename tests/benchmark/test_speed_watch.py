from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from ai4all.backend.base import Completion, EngineOptions, GenerateRequest
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark.scores import PromptFigures
from ai4all.benchmark.speed_watch import LoadMeter, SpeedBaseline, SpeedWatch, fair_rate
from ai4all.types.model import ModelFile

MODEL = ModelFile("benchmark", Path("absent.gguf"), "a" * 64, 100)

# 10 ms a token, and 1 ms more for every 100 tokens in the context.
BASELINE = SpeedBaseline(0.010, 0.00001)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def row(prompt: int, completion: int, rate: float | None, accepted: int = 0) -> PromptFigures:
    return PromptFigures(
        name="p",
        prompt_tokens=prompt,
        completion_tokens=completion,
        time_to_first_token_ms=1.0,
        queue_ms=0.0,
        load_ms=0.0,
        prompt_ms=1.0,
        first_sample_ms=0.0,
        total_ms=1.0,
        prompt_tokens_per_second=None,
        decode_tokens_per_second=rate,
        draft_accepted=accepted,
    )


def test_the_baseline_is_the_line_through_the_benchmarks_prompts() -> None:
    rows = [row(prompt, 100, BASELINE.rate(prompt + 50)) for prompt in (4, 9, 1000)]
    found = SpeedBaseline.of(rows)
    assert found is not None
    for depth in (10, 500, 4000):
        assert found.rate(depth) == pytest.approx(BASELINE.rate(depth))
    assert found.rate(4000) < 0.25 * found.rate(0)


def test_a_line_that_falls_is_none() -> None:
    # Noise made the long prompt the fastest: the mean time, at any depth.
    found = SpeedBaseline.of([row(4, 100, 80.0), row(1000, 100, 100.0)])
    assert found == SpeedBaseline(pytest.approx(0.01125), 0.0)
    assert SpeedBaseline.of([row(4, 100, 50.0)]) == SpeedBaseline(0.02, 0.0)
    assert SpeedBaseline.of([row(4, 1, None), row(9, 100, None)]) is None
    assert SpeedBaseline.of([]) is None


def test_tokens_that_drafts_gave_are_not_the_machines_speed() -> None:
    # Half of the tokens came without a step of their own.
    found = SpeedBaseline.of([row(4, 101, 200.0, accepted=50)])
    assert found is not None
    assert found.rate(0) == pytest.approx(100.0)


async def completion(**changes: object) -> Completion:
    script = ScriptedGeneration(token_ms=20.0)
    async with FakeBackend(script, time_scale=0.0) as backend:
        await backend.load(MODEL, EngineOptions())
        done = await backend.complete(GenerateRequest(prompt="a b c d", max_tokens=20))
    changed = {k: v for k, v in changes.items() if k != "batched_with"}
    if "batched_with" in changes:
        changed["fingerprint"] = done.fingerprint.model_copy(update=changes)
    return dataclasses.replace(done, **changed)  # type: ignore[arg-type]


async def test_only_a_generation_that_ran_alone_and_undrafted_is_compared() -> None:
    fair = await completion()
    assert fair_rate(fair) == (4 + 10, pytest.approx(50.0))
    assert fair_rate(await completion(draft_tokens=1)) is None
    assert fair_rate(await completion(batched_with=1)) is None
    short = fair.usage.model_copy(update={"completion_tokens": 15})
    assert fair_rate(await completion(usage=short)) is None
    unmeasured = dataclasses.replace(fair.timings, decode_tokens_per_second=None)
    assert fair_rate(await completion(timings=unmeasured)) is None


def run(watch: SpeedWatch, clock: Clock, shares: Iterable[float], every: float = 10.0) -> None:
    """Generations at such parts of the expected speed, at depths that differ."""
    for number, share in enumerate(shares):
        clock.now += every
        depth = (50, 700, 3000)[number % 3]
        watch.saw(depth, share * BASELINE.rate(depth))


def test_a_lasting_drop_is_seen_and_so_is_its_end() -> None:
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    run(watch, clock, [1.0] * 15)
    assert watch.share == pytest.approx(1.0)
    run(watch, clock, [0.3] * 8)
    assert watch.share == pytest.approx(0.3)
    assert not watch.is_slow, "it has not lasted yet"
    run(watch, clock, [0.3] * 12)
    assert watch.is_slow
    # Better, and not yet well.
    run(watch, clock, [0.55] * 15)
    assert watch.is_slow
    run(watch, clock, [0.9] * 7)
    assert watch.is_slow, "most of what was seen is from before"
    run(watch, clock, [0.9])
    assert not watch.is_slow


def test_little_is_no_evidence() -> None:
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    run(watch, clock, [0.1] * 4, every=300.0)
    assert watch.share is None
    assert not watch.is_slow
    # What is half an hour old says nothing about now.
    watch = SpeedWatch(BASELINE, clock)
    run(watch, clock, [0.1] * 20, every=500.0)
    assert watch.share is None
    assert not watch.is_slow


def test_a_burst_of_slow_ones_is_no_lasting_drop() -> None:
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    for _ in range(3):
        run(watch, clock, [1.0] * 15, every=1.0)
        run(watch, clock, [0.2] * 100, every=1.0)
        assert not watch.is_slow


def test_a_few_slow_ones_far_apart_are_no_lasting_drop() -> None:
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    run(watch, clock, [0.2] * 9, every=400.0)
    assert not watch.is_slow


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_variation_raises_no_alarm(seed: int) -> None:
    """A day of blocks whose speed varies by a third; each tenth has a tenth of the speed."""
    draw = random.Random(seed)
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    for _ in range(2000):
        share = max(0.05, draw.gauss(0.85, 0.15))
        run(watch, clock, [0.1 if draw.random() < 0.1 else share], every=draw.expovariate(1 / 40))
        assert not watch.is_slow


@pytest.mark.parametrize("seed", range(20))
def test_a_third_of_the_speed_is_found_within_the_variation(seed: int) -> None:
    draw = random.Random(seed)
    clock = Clock()
    watch = SpeedWatch(BASELINE, clock)
    run(watch, clock, [draw.gauss(0.9, 0.1) for _ in range(50)])
    run(watch, clock, [max(0.05, draw.gauss(0.33, 0.08)) for _ in range(30)])
    assert watch.is_slow


class Machine:
    """A machine with a clock, and what is computed on it."""

    def __init__(self) -> None:
        self.now = self.busy = self.own = 0.0
        self.meter = LoadMeter(lambda: self.own, lambda: self.now, lambda: self.busy)

    def passes(self, seconds: float, *, ours: float, others: float) -> None:
        self.now += seconds
        self.own += ours * seconds
        self.busy += (ours + others) * seconds


def test_others_count_beyond_the_processors_that_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)

    def is_quiet(others: float, threads: int) -> bool:
        machine = Machine()
        mark = machine.meter.mark()
        machine.passes(2.0, ours=threads, others=others)
        return machine.meter.is_quiet_since(mark, threads)

    assert is_quiet(0.2, threads=4)
    assert not is_quiet(0.5, threads=4)
    assert is_quiet(2.0, threads=2)
    assert not is_quiet(2.5, threads=2)
    assert is_quiet(4.0, threads=0)


def test_no_time_is_no_quiet() -> None:
    machine = Machine()
    assert not machine.meter.is_quiet_since(machine.meter.mark(), 1)


def test_the_real_clock_of_the_processors_runs() -> None:
    meter = LoadMeter(lambda: 0.0)
    first = meter.mark()
    total = sum(psutil.cpu_times())
    assert 0.0 < first.busy <= total
    assert meter.mark().busy >= first.busy
