"""A short search, by measuring, for the fastest way to run a model on this machine.

Threads, flash attention and the physical batch are tried one after the other, each with the best
of what was tried before. What counts is the time that the benchmark's own work would take: about
1,000 prompt tokens and 300 decoded ones. A change has to win by more than noise does; between
equal counts of threads the smaller one is taken, because the machine has other work, too.

The search knows the engine by ``InferenceBackend`` alone and ends when its time is up, with the
best so far. It begins with the fewest threads: threads that wait for each other on a machine that
is busy otherwise can be a hundred times slower, and a trial that is far behind is broken off.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import psutil

from ai4all.backend.base import EngineOptions, GenerateRequest, InferenceBackend
from ai4all.backend.cores import compute_threads, usable_cores
from ai4all.backend.devices import CPU
from ai4all.benchmark.suite import benchmark_prompts
from ai4all.benchmark.tuning_store import PEACE, Trial, Tuning, TuningKey
from ai4all.errors import ComputeError, ContextOverflow
from ai4all.models.memory import load_model
from ai4all.types.model import ModelFile

__all__ = ["TUNING_BUDGET_S", "TuningProgress", "is_peaceful", "thread_candidates", "tune"]

TUNING_BUDGET_S = 20.0
"""Time after which nothing more is tried, in seconds."""

_UBATCHES = (256, 512, 1024)
_DEFAULT_UBATCH = 512

# Part of a speed by which a change must win to be one.
_NOISE = 0.03

# The benchmark's own work: three prompts of 4, 9 and about 1,000 tokens, 100 tokens decoded after
# each.
_PROMPT_TOKENS = 1013
_DECODED_TOKENS = 300

# A trial that takes so many times as long as the fastest one so far is broken off.
_FAR_BEHIND = 3.0

# How long one measurement shall take, and what bounds it on machines far from the usual.
_PROMPT_S, _LONG_PROMPT_S, _DECODE_S = 0.6, 1.8, 0.25
_MOST_PROMPT_TOKENS, _MOST_DECODED_TOKENS = 512, 32
_CONTEXT = 2048
_LOAD_SAMPLE_S = 0.2

_Flash = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class TuningProgress:
    """What is being tried, and the share of the time that has passed, 0..1."""

    stage: str
    share: float


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to run the model."""

    threads: int
    threads_batch: int
    ubatch: int
    flash: _Flash


@dataclass(frozen=True, slots=True)
class _Work:
    """What one measurement computes: prompts in words, the longer one in tokens too."""

    prompt_words: int
    long_prompt_words: int
    long_prompt_tokens: int
    decoded_tokens: int


@dataclass(slots=True)
class _Speeds:
    prompt: list[float] = field(default_factory=list)
    long_prompt: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """What the benchmark's own work takes at these speeds."""
        prompt, decode = _median(self.prompt), _median(self.decode)
        if prompt is None or decode is None:
            return None
        return _PROMPT_TOKENS / prompt + _DECODED_TOKENS / decode

    @property
    def long_prompt_seconds(self) -> float | None:
        """What its prompts take."""
        prompt = _median(self.long_prompt)
        return None if prompt is None else _PROMPT_TOKENS / prompt


def thread_candidates(usable: float | None = None, physical: int | None = None) -> list[int]:
    """Counts of threads worth trying: shares of the cores, and all hardware threads.

    Args:
        usable: Hardware threads that may be used; by default, those of this process.
        physical: Cores among them.
    """
    cores = physical or compute_threads()
    all_threads = max(1, math.floor(usable or usable_cores() or cores))
    cores = min(cores, all_threads)
    shares = {cores // 4, cores // 2, cores * 3 // 4, cores, all_threads}
    return sorted(shares - {0})


async def tune(
    backend: InferenceBackend,
    model: ModelFile,
    options: EngineOptions,
    *,
    budget_s: float = TUNING_BUDGET_S,
    progress: Callable[[TuningProgress], None] | None = None,
) -> Tuning:
    """Find the fastest way to run ``model``. Leaves it loaded in the last way that was tried.

    Args:
        backend: With nothing running. What it holds is dropped.
        model: The model.
        options: What a search cannot find, such as the type of the cache. All that it can
            find is searched for, also where ``options`` settle it.
        budget_s: Seconds after which nothing more is tried.
        progress: Called before each trial.

    Raises:
        OutOfMemory: The model does not fit.
        ComputeError: A load or a generation failed.
    """
    other_load = await asyncio.to_thread(_load_now)
    search = _Search(backend, model, options, budget_s, progress)
    await search.run()
    return Tuning(
        key=TuningKey.of(model.sha256, backend.capabilities(), options),
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        threads=search.best.threads,
        threads_batch=search.best.threads_batch,
        ubatch=search.best.ubatch,
        flash_attention=search.best.flash,
        seconds=round(search.elapsed(), 3),
        is_complete=search.is_complete,
        other_load=other_load,
        trials=search.trials(),
    )


def is_peaceful() -> bool:
    """Whether others leave the machine alone now. Blocks for a moment."""
    return _load_now() < PEACE


def _load_now() -> float:
    """Share of the machine that is in use, 0..1; ours counts, so nothing may run."""
    return min(1.0, psutil.cpu_percent(_LOAD_SAMPLE_S) / 100.0)


class _Search:
    def __init__(
        self,
        backend: InferenceBackend,
        model: ModelFile,
        options: EngineOptions,
        budget_s: float,
        progress: Callable[[TuningProgress], None] | None,
    ) -> None:
        threads = compute_threads()
        self.best = _Way(threads, threads, _DEFAULT_UBATCH, "auto")
        self.is_complete = True
        self._backend = backend
        self._model = model
        self._options = options
        self._budget_s = budget_s
        self._progress = progress
        self._begun = time.monotonic()
        self._measured: dict[_Way, _Speeds] = {}
        self._words = benchmark_prompts()[-1][1].split()
        self._work = _Work(24, 24, 32, 6)
        self._fastest_visit_s = math.inf

    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def trials(self) -> list[Trial]:
        return [
            Trial(
                threads=way.threads,
                threads_batch=way.threads_batch,
                ubatch=way.ubatch,
                flash_attention=way.flash,
                prompt_tokens_per_second=_median(speeds.prompt or speeds.long_prompt),
                decode_tokens_per_second=_median(speeds.decode),
            )
            for way, speeds in self._measured.items()
        ]

    async def run(self) -> None:
        ways = [
            dataclasses.replace(self.best, threads=count, threads_batch=count)
            for count in thread_candidates()
        ]
        try:
            async with asyncio.timeout(self._budget_s):
                await self._calibrate(ways[0])
        except TimeoutError as error:
            _raise_own(error)
            self.is_complete = False
            return
        await self._search_threads(ways)
        await self._search_flash_attention()
        await self._search_ubatch()

    async def _calibrate(self, way: _Way) -> None:
        """Choose amounts of work that take a known time, whatever the model and the machine."""
        await self._load(way)
        n_words = self._work.prompt_words
        await self._generate(4, 2)
        while True:
            try:
                prompt, decode, n_tokens = await self._generate(n_words, self._work.decoded_tokens)
                break
            except ContextOverflow:
                if n_words <= 4:
                    raise
                n_words //= 2
        loaded = self._backend.loaded
        context = loaded.n_ctx if loaded is not None else _CONTEXT
        room = 0.9 * context - _MOST_DECODED_TOKENS
        per_word = n_tokens / n_words

        def words(seconds: float, most: float) -> int:
            wanted = min(most, room, (prompt or 0.0) * seconds)
            return max(4, min(len(self._words), int(wanted / per_word)))

        longest = words(_LONG_PROMPT_S, room)
        self._work = _Work(
            prompt_words=words(_PROMPT_S, _MOST_PROMPT_TOKENS),
            long_prompt_words=longest,
            long_prompt_tokens=int(longest * per_word),
            decoded_tokens=max(4, min(_MOST_DECODED_TOKENS, int((decode or 0.0) * _DECODE_S))),
        )

    async def _search_threads(self, ways: Sequence[_Way]) -> None:
        loaded = self._backend.loaded
        if loaded is not None and CPU not in loaded.device.split("+"):
            # What a GPU computes does not wait for the CPU's threads.
            await self._visit("threads", self.best)
            return
        await self._visit_in_turn("threads", ways)
        speeds = {way.threads: self._measured.get(way, _Speeds()) for way in ways}
        self.best = dataclasses.replace(
            self.best,
            threads=_fewest({count: _median(each.decode) for count, each in speeds.items()}),
            threads_batch=_fewest({count: _median(each.prompt) for count, each in speeds.items()}),
        )

    async def _search_flash_attention(self) -> None:
        if self._options.kv_type.startswith("q"):
            return
        ways = [self.best, dataclasses.replace(self.best, flash="off")]
        await self._visit_in_turn("flash attention", ways)
        self.best = self._fastest(ways)

    async def _search_ubatch(self) -> None:
        # A batch that the prompt does not fill would say nothing.
        longest = self._work.long_prompt_tokens * 4 // 3
        ways = [self.best] + [
            dataclasses.replace(self.best, ubatch=size)
            for size in _UBATCHES
            if size != self.best.ubatch and size <= longest and self.best.ubatch <= longest
        ]
        if len(ways) > 1:
            await self._visit_in_turn("batch", ways, long_prompt=True)
            self.best = self._fastest(ways, long_prompt=True)

    async def _visit_in_turn(
        self, stage: str, ways: Sequence[_Way], *, long_prompt: bool = False
    ) -> None:
        self._fastest_visit_s = math.inf
        left = list(ways)
        # Twice in turn, so that what else the machine does meanwhile hits all alike.
        for way in (*ways, *ways):
            if way in left and not await self._visit(stage, way, long_prompt=long_prompt):
                left.remove(way)

    async def _visit(self, stage: str, way: _Way, *, long_prompt: bool = False) -> bool:
        """Load the model this way and measure; False when there was not the time for it."""
        left = self._budget_s - self.elapsed()
        if left <= 0.0:
            self.is_complete = False
            return False
        if self._progress is not None:
            self._progress(TuningProgress(stage, min(1.0, self.elapsed() / self._budget_s)))
        begun = time.monotonic()
        self._measured.setdefault(way, _Speeds())
        try:
            async with asyncio.timeout(min(left, self._fastest_visit_s * _FAR_BEHIND + 0.5)):
                await self._load(way)
                await self._measure(way, long_prompt=long_prompt)
        except TimeoutError as error:
            _raise_own(error)
            self.is_complete = self.is_complete and self.elapsed() < self._budget_s
            return False
        self._fastest_visit_s = min(self._fastest_visit_s, time.monotonic() - begun)
        return True

    async def _measure(self, way: _Way, *, long_prompt: bool) -> None:
        speeds = self._measured[way]
        if long_prompt:
            prompt, _, _ = await self._generate(self._work.long_prompt_words, 1)
            _add(speeds.long_prompt, prompt)
            return
        prompt, decode, _ = await self._generate(self._work.prompt_words, self._work.decoded_tokens)
        _add(speeds.prompt, prompt)
        _add(speeds.decode, decode)
        _, decode, _ = await self._generate(4, self._work.decoded_tokens)
        _add(speeds.decode, decode)

    async def _load(self, way: _Way) -> None:
        options = dataclasses.replace(
            self._options,
            n_ctx=min(self._options.n_ctx, _CONTEXT),
            n_slots=1,
            threads=way.threads,
            threads_batch=way.threads_batch,
            n_ubatch=way.ubatch,
            flash_attention=way.flash,
            prefix_cache_mb=0,
        )
        await load_model(self._backend, self._model, options)

    async def _generate(
        self, n_words: int, n_decode: int
    ) -> tuple[float | None, float | None, int]:
        end = await self._backend.complete(
            GenerateRequest(
                prompt=" ".join(self._words[:n_words]),
                max_tokens=n_decode,
                temperature=0.0,
                repetition_penalty=1.0,
                ignore_eos=True,
                reuse_prefix=False,
                speculate=False,
            )
        )
        timings = end.timings
        return (
            timings.prompt_tokens_per_second,
            timings.decode_tokens_per_second,
            end.usage.prompt_tokens,
        )

    def _fastest(self, ways: Sequence[_Way], *, long_prompt: bool = False) -> _Way:
        """The way that needs the least time; the first one, unless another is clearly better."""
        times: dict[_Way, float] = {}
        for way in ways:
            speeds = self._measured.get(way, _Speeds())
            seconds = speeds.long_prompt_seconds if long_prompt else speeds.seconds
            if seconds is not None:
                times[way] = seconds
        if ways[0] not in times:
            return ways[0]
        best = min(times, key=lambda way: times[way])
        return best if times[best] < times[ways[0]] * (1 - _NOISE) else ways[0]


def _raise_own(error: TimeoutError) -> None:
    # Some of the backend's errors are timeouts too, and are its to tell.
    if isinstance(error, ComputeError):
        raise error


def _add(speeds: list[float], speed: float | None) -> None:
    if speed is not None:
        speeds.append(speed)


def _median(speeds: Sequence[float]) -> float | None:
    return statistics.median(speeds) if speeds else None


def _fewest(speeds: dict[int, float | None]) -> int:
    """The smallest count that is as fast as the fastest, but for noise; the first if none is."""
    known = {count: speed for count, speed in speeds.items() if speed is not None}
    if not known:
        return next(iter(speeds))
    best = max(known.values())
    return min(count for count, speed in known.items() if speed >= best * (1 - _NOISE))
