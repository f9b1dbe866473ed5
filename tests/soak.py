"""Let a real worker work for hours, hurt it now and then, and see whether anything grows.

The worker is the command line's own, its engine runs in a process of its own with the tiny model,
and the coordinator is in this process. Links are cut, closed and refused, acknowledgements lost,
assignments repeated, blocks cancelled, and the engine is killed (rarely: three deaths in half an
hour would quarantine the model). Memory, descriptors and threads of both processes, throughput and
log volume are sampled; a line is fitted to each after the warm-up. An engine that was killed starts
a new line with the slope of the others, after a warm-up of its own.

Usage: python tests/soak.py [--hours H] [--rate TASKS_PER_SECOND] [--json] [--plot FILE.png]

Exit status 0 when nothing grows by more than is allowed, beyond doubt, and every block has ended
exactly once.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import psutil
import typer
import ujson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from soak_coordinator import SoakCoordinator
from tiny_gguf import write_tiny_gguf

MIB = 1024 * 1024
WARM_UP = 0.2
"""Share of the run, at the start, that no line is fitted to."""

ENGINE_WARM_UP_S = 300.0
"""The same of each engine process: until it has had each kind of work, and long prompts."""

MAIN = "import sys; from ai4all.cli import main; sys.exit(main(sys.argv[1:]))"

ENGINE_DEATH_S = 1200.0
FINISH_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment.

    Attributes:
        at: Seconds since the start.
        engine: Number of the engine process, counted from 0.
        worker_mib: Resident memory.
        engine_mib: Resident memory.
        descriptors: Open ones, of both together.
        threads: Of both together.
        tasks: Blocks that have ended so far.
        log_bytes: Written so far, what was rotated away left out.
        spool_bytes: Size of the results' file and its log.
    """

    at: float
    engine: int
    worker_mib: float
    engine_mib: float
    descriptors: int
    threads: int
    tasks: int
    log_bytes: int
    spool_bytes: int


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth in an hour, and its standard error."""

    per_hour: float
    error: float

    @property
    def at_least(self) -> float:
        """The growth that is beyond doubt: two standard errors less."""
        return self.per_hour - 2 * self.error


@dataclass(slots=True)
class Soak:
    """What a run came to."""

    hours: float
    samples: list[Sample]
    slopes: dict[str, Slope]
    counts: dict[str, int]
    faults: list[str]
    short: list[str] = field(default_factory=list)


def steady_engines(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of engine processes that have warmed up."""
    begun: dict[int, float] = {}
    for sample in samples:
        begun.setdefault(sample.engine, sample.at)
    return [sample for sample in samples if sample.at >= begun[sample.engine] + ENGINE_WARM_UP_S]


def slope(samples: Sequence[Sample], name: str) -> Slope:
    """Fit one slope to a figure, with an intercept for each engine process (least squares)."""
    groups: dict[int, list[tuple[float, float]]] = {}
    if name == "engine_mib":
        samples = steady_engines(samples)
    for sample in samples:
        engine = sample.engine if name == "engine_mib" else 0
        groups.setdefault(engine, []).append((sample.at / 3600.0, float(getattr(sample, name))))
    squares = products = 0.0
    centred = []
    for points in groups.values():
        x_mean = statistics.fmean(x for x, _ in points)
        y_mean = statistics.fmean(y for _, y in points)
        centred += [(x - x_mean, y - y_mean) for x, y in points]
    for x, y in centred:
        squares += x * x
        products += x * y
    freedom = len(centred) - len(groups) - 1
    if squares == 0.0 or freedom < 1:
        return Slope(0.0, float("inf"))
    per_hour = products / squares
    residual = sum((y - per_hour * x) ** 2 for x, y in centred) / freedom
    return Slope(per_hour, (residual / squares) ** 0.5)


class Watched:
    """The worker's process and its engine's."""

    def __init__(self, process_id: int, data_dir: Path) -> None:
        self._worker = psutil.Process(process_id)
        self._engine: psutil.Process | None = None
        self._engines = -1
        self._data_dir = data_dir
        self._began = time.monotonic()

    def engine(self) -> psutil.Process | None:
        """The engine process, if there is one that has loaded."""
        if self._engine is None or not self._engine.is_running():
            children = self._worker.children()
            self._engine = children[0] if children else None
            self._engines += self._engine is not None
        return self._engine

    def sample(self, tasks: int) -> Sample | None:
        """Look at both; None while there is no engine."""
        engine = self.engine()
        if engine is None:
            return None
        both = (self._worker, engine)
        try:
            if engine.status() == psutil.STATUS_ZOMBIE:
                return None
            return Sample(
                at=time.monotonic() - self._began,
                engine=self._engines,
                worker_mib=self._worker.memory_info().rss / MIB,
                engine_mib=engine.memory_info().rss / MIB,
                descriptors=sum(process.num_fds() for process in both),
                threads=sum(process.num_threads() for process in both),
                tasks=tasks,
                log_bytes=_size(self._data_dir / "logs", "*.jsonl*"),
                spool_bytes=_size(self._data_dir, "results.sqlite3*"),
            )
        except psutil.NoSuchProcess:
            return None


def _size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())


async def hurt(coordinator: SoakCoordinator, watched: Watched, every: float) -> None:
    """Do something bad now and then."""
    rng = random.Random(2)
    next_death = time.monotonic() + ENGINE_DEATH_S / 4
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * every)
        name, fault = rng.choice(sorted(coordinator.faults_by_name().items()))
        fault()
        coordinator.counts[f"fault: {name}"] += 1
        engine = watched.engine()
        if engine is not None and time.monotonic() >= next_death:
            next_death += ENGINE_DEATH_S
            os.kill(engine.pid, signal.SIGKILL)
            coordinator.counts["fault: engine killed"] += 1


async def soak(
    folder: Path, hours: float, rate: float, sample_every: float, progress: Progress
) -> Soak:
    """Run for so many hours."""
    model = write_tiny_gguf(folder / "tiny.gguf")
    data_dir = folder / "data"
    environment = os.environ | {
        "AI4ALL_DATA_DIR": str(data_dir),
        "AI4ALL_MODELS_BENCHMARK_SOURCE": f"file:{model}",
        "AI4ALL_COORDINATOR_RECONNECT_INTERVAL_MS": "200",
        "AI4ALL_WORKER_MAX_CONCURRENT_TASKS": "2",
        "AI4ALL_ENGINE_CONTEXT_LENGTH": "4096",
        "AI4ALL_ENGINE_THREADS": "1",
    }
    coordinator = SoakCoordinator("benchmark", rate)
    samples: list[Sample] = []
    async with coordinator.serving() as url:
        with (folder / "stderr").open("wb") as stderr:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", MAIN, "worker", "--coordinator", url),
                env=environment,
                stderr=stderr,
            )
        try:
            while coordinator.counts["succeeded"] == 0:
                await asyncio.sleep(0.1)
                if worker.returncode is not None:
                    raise RuntimeError((folder / "stderr").read_text())
            watched = Watched(worker.pid, data_dir)
            hurting = asyncio.ensure_future(hurt(coordinator, watched, every=5.0))
            seconds = hours * 3600.0
            bar = progress.add_task("soaking", total=seconds)
            began = time.monotonic()
            while (passed := time.monotonic() - began) < seconds and worker.returncode is None:
                sample = watched.sample(coordinator.counts["SubmitResult"])
                samples += [] if sample is None else [sample]
                progress.update(bar, completed=passed)
                await asyncio.sleep(sample_every)
            hurting.cancel()
            coordinator.pause()
            async with asyncio.timeout(FINISH_S):
                while coordinator.unfinished:
                    await asyncio.sleep(0.1)
        finally:
            if worker.returncode is None:
                worker.terminate()
            await worker.wait()
    steady = [sample for sample in samples if sample.at >= WARM_UP * samples[-1].at]
    names = ("worker_mib", "engine_mib", "descriptors", "threads", "log_bytes", "spool_bytes")
    slopes = {name: slope(steady, name) for name in names}
    return Soak(hours, samples, slopes, dict(coordinator.counts), coordinator.faults)


def shortfalls(found: Soak, allowed: float) -> list[str]:
    """What falls short of the goal."""
    short = list(found.faults)
    for name, most in (
        ("worker_mib", allowed),
        ("engine_mib", allowed),
        ("descriptors", 0.0),
        ("threads", 0.0),
    ):
        if found.slopes[name].at_least > most:
            short.append(f"{name} grows by {found.slopes[name].per_hour:.2f} an hour")
    return short


def print_soak(found: Soak, console: Console) -> None:
    """Print a row for each figure, and what happened."""
    table = Table("figure", "first", "last", "most", "an hour", "±")
    for name, fitted in found.slopes.items():
        unit = MIB if name.endswith("bytes") else 1
        values = [getattr(sample, name) / unit for sample in found.samples]
        table.add_row(
            name.replace("bytes", "mib"),
            *(f"{value:.1f}" for value in (values[0], values[-1], max(values))),
            f"{fitted.per_hour / unit:+.2f}",
            f"{2 * fitted.error / unit:.2f}",
        )
    console.print(table)
    ended = found.samples[-1].tasks - found.samples[0].tasks
    seconds = found.samples[-1].at - found.samples[0].at
    console.print(f"{len(found.samples)} samples over {seconds / 60:.1f} minutes")
    console.print(f"{ended} results, {ended / seconds:.1f} a second")
    for name, count in sorted(found.counts.items()):
        console.print(f"{count:>9} {name}", highlight=False)


def plot(found: Soak, file: Path) -> None:
    """Draw all figures over time, one below the other."""
    # It wants the library "packaging", and has the script of that name that lies here.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [sample.at / 60 for sample in found.samples]
    rows = {
        "resident, MiB": ("worker_mib", "engine_mib"),
        "descriptors, threads": ("descriptors", "threads"),
        "log, spool, bytes": ("log_bytes", "spool_bytes"),
    }
    figure, axes = plt.subplots(len(rows) + 1, 1, sharex=True, figsize=(9, 9))
    for axis, (label, names) in zip(axes, rows.items(), strict=False):
        for name in names:
            axis.plot(minutes, [getattr(sample, name) for sample in found.samples], label=name)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right", fontsize="small")
    between = list(zip(found.samples, found.samples[1:], strict=False))
    rates = [(later.tasks - earlier.tasks) / (later.at - earlier.at) for earlier, later in between]
    axes[-1].plot(minutes[1:], rates)
    axes[-1].set_ylabel("results a second")
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(
    hours: Annotated[float, typer.Option(min=0.001)] = 0.05,
    rate: Annotated[float, typer.Option(min=0.1, help="Tasks a second.")] = 5.0,
    sample_every: Annotated[float, typer.Option(min=0.05, help="Seconds.")] = 2.0,
    allowed: Annotated[float, typer.Option(help="MiB an hour that each may grow.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="All samples, as JSON.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A picture.")] = None,
) -> None:
    """Let a real worker work for hours, and see whether anything grows."""
    quiet = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=quiet, transient=True, disable=not quiet.is_terminal) as progress,
    ):
        found = asyncio.run(soak(Path(folder), hours, rate, sample_every, progress))
    found.short = shortfalls(found, allowed)
    if as_json:
        typer.echo(ujson.dumps(asdict(found)))
    else:
        print_soak(found, Console())
        print("\n".join(found.short) if found.short else "nothing grows, nothing is lost")
    if plot_file is not None:
        plot(found, plot_file)
    raise typer.Exit(1 if found.short else 0)


if __name__ == "__main__":
    typer.run(main)
