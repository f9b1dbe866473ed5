"""How soon work that was cancelled stops, in each of its phases, and the next work begins.

Each trial cancels at a random moment of one phase: while it waits for the only slot, in the middle
of a prompt of 3,000 tokens, while tokens are decoded, while the model is loaded. Two times are
told: until the backend says that it is over, and by how much the first token of a short task after
it is later than that of the same task on an idle engine. Work that went on shows in the second.

Usage: python tests/cancellation.py MODEL.gguf [--trials 10] [--backend isolated] [--json]
Exit status 0 when every cancellation was over within the limits of its phase.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import structlog
import typer
import ujson
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ai4all.backend.base import EngineOptions, GenerateRequest, InferenceBackend, TokenEvent
from ai4all.backend.registry import open_backend
from ai4all.types.model import ModelFile

PROMPT = "The keeper of the lighthouse wrote down every ship that passed. " * 250
PROMPT_TOKENS = 3000
LIMIT_MS = {"queued": 100.0, "prefill": 100.0, "decode": 100.0, "loading": 1000.0}
"""Of the median trial: a decode step or 100 ms; a load stops between two tensors."""

SHORT = GenerateRequest(
    prompt="One, two, three,",
    max_tokens=1,
    temperature=0.0,
    repetition_penalty=1.0,
    reuse_prefix=False,
)


@dataclass
class Phase:
    """What was measured of one phase, in milliseconds."""

    name: str
    over_ms: list[float] = field(default_factory=list)
    next_ms: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the engine was free again in time, in the median."""
        free_ms = [over + later for over, later in zip(self.over_ms, self.next_ms, strict=True)]
        return statistics.median(free_ms) <= LIMIT_MS[self.name]


async def first_token_ms(backend: InferenceBackend, request: GenerateRequest) -> float:
    """Wait for the first token of a task, and for its end."""
    began = time.perf_counter()
    first: float | None = None
    async for event in backend.generate(request):
        if isinstance(event, TokenEvent) and first is None:
            first = time.perf_counter() - began
    return 1e3 * (first if first is not None else time.perf_counter() - began)


async def cancelled(work: Awaitable[object], after: float) -> float | None:
    """Start ``work``, cancel it after so many seconds, and return how long that took, in ms.

    None: it was over before.
    """
    task = asyncio.ensure_future(work)
    await asyncio.sleep(after)
    if task.done():
        return None
    began = time.perf_counter()
    task.cancel()
    await asyncio.wait({task})
    return 1e3 * (time.perf_counter() - began)


class Trials:
    """The trials of all phases on one backend."""

    def __init__(self, backend: InferenceBackend, model: ModelFile, seed: int) -> None:
        self._backend = backend
        self._model = model
        self._random = random.Random(seed)
        self._options = EngineOptions(n_ctx=4096, n_slots=1)
        self._prefill_s = 0.0
        self._load_s = 0.0
        self._idle_ms = 0.0
        self.prompt_tokens = 0

    async def prepare(self) -> None:
        """Load the model, and learn how long things take when nobody cancels them."""
        await self._backend.load(self._model, self._options)
        await self._backend.unload()
        began = time.perf_counter()
        await self._backend.load(self._model, self._options)
        self._load_s = time.perf_counter() - began
        self._long = GenerateRequest(
            prompt=PROMPT,
            max_tokens=900,
            temperature=0.0,
            ignore_eos=True,
            reuse_prefix=False,
            speculate=False,
        )
        whole = await self._backend.complete(
            GenerateRequest(prompt=PROMPT, max_tokens=1, reuse_prefix=False)
        )
        self.prompt_tokens = whole.usage.prompt_tokens
        self._prefill_s = whole.timings.prompt_ms / 1e3
        self._idle_ms = statistics.median(
            [await first_token_ms(self._backend, SHORT) for _ in range(9)]
        )

    async def one(self, phase: Phase) -> None:
        """One trial."""
        ways: dict[str, Callable[[], Awaitable[float | None]]] = {
            "queued": self._queued,
            "prefill": self._prefill,
            "decode": self._decode,
            "loading": self._loading,
        }
        while (over := await ways[phase.name]()) is None:
            pass  # Other machines are faster at times. The moment is drawn anew.
        phase.over_ms.append(over)
        if phase.name == "loading":
            await self._backend.load(self._model, self._options)
        phase.next_ms.append(await first_token_ms(self._backend, SHORT) - self._idle_ms)

    async def _queued(self) -> float | None:
        ahead = asyncio.ensure_future(self._backend.complete(self._long))
        await asyncio.sleep(0.05)
        over = await cancelled(self._backend.complete(SHORT), self._random.uniform(0.0, 0.2))
        ahead.cancel()
        await asyncio.wait({ahead})
        return over

    async def _prefill(self) -> float | None:
        moment = self._random.uniform(0.05, 0.8) * self._prefill_s
        return await cancelled(self._backend.complete(self._long), moment)

    async def _decode(self) -> float | None:
        text = GenerateRequest(
            prompt=SHORT.prompt, max_tokens=3000, temperature=0.0, ignore_eos=True, speculate=False
        )
        return await cancelled(self._backend.complete(text), self._random.uniform(0.2, 1.0))

    async def _loading(self) -> float | None:
        await self._backend.unload()
        moment = self._random.uniform(0.1, 0.6) * self._load_s
        return await cancelled(self._backend.load(self._model, self._options), moment)


async def measure(
    backend: str, model: ModelFile, trials: int, seed: int
) -> tuple[int, list[Phase]]:
    """Run all trials; the tokens of the long prompt, and what was measured."""
    phases = [Phase(name) for name in LIMIT_MS]
    async with open_backend(backend) as opened:
        run = Trials(opened, model, seed)
        await run.prepare()
        work = [phase for phase in phases for _ in range(trials)]
        for phase in track(
            work, "cancelling", console=Console(stderr=True), disable=not sys.stderr.isatty()
        ):
            await run.one(phase)
    return run.prompt_tokens, phases


def main(
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="GGUF file.")],
    trials: Annotated[int, typer.Option(min=1, help="Cancellations in each phase.")] = 20,
    backend: Annotated[str, typer.Option(help="isolated or native.")] = "isolated",
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Measure how soon cancelled work stops."""
    # The engine's own words about a decode that was broken off.
    logging.getLogger("ai4all").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    file = ModelFile(
        model.stem, model, hashlib.sha256(model.read_bytes()).hexdigest(), model.stat().st_size
    )
    tokens, phases = asyncio.run(measure(backend, file, trials, seed))
    if tokens < PROMPT_TOKENS:
        raise typer.BadParameter(f"the prompt has {tokens} tokens with it, not {PROMPT_TOKENS}")
    if json:
        rows = [
            asdict(phase) | {"limit_ms": LIMIT_MS[phase.name], "met": phase.met} for phase in phases
        ]
        print(ujson.dumps({"backend": backend, "prompt_tokens": tokens, "phases": rows}))
    else:
        table = Table("phase", "over: median", "most", "next task later by", "limit", "met")
        for phase in phases:
            over, later = statistics.median(phase.over_ms), statistics.median(phase.next_ms)
            table.add_row(
                phase.name,
                f"{over:.1f} ms",
                f"{max(phase.over_ms):.1f} ms",
                f"{later:.1f} ms",
                f"{LIMIT_MS[phase.name]:.0f} ms",
                "yes" if phase.met else "no",
            )
        Console().print(table)
        print(f"{backend}, {trials} trials each, a prompt of {tokens} tokens")
    raise typer.Exit(0 if all(phase.met for phase in phases) else 1)


if __name__ == "__main__":
    typer.run(main)
