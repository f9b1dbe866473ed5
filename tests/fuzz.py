"""Fuzz what reads bytes from outside: frames, the header of a model, the file of the spool.

Each target runs for some seconds, in a process of its own, and prints how many inputs it took, how
much of the code they reached, and what they found. With atheris (the extra ``fuzz``) coverage
leads the way; where it cannot be had, hypothesis mutates the same seeds without it. An input that
found something is kept below ``--keep`` and can be given back: ``--input FILE TARGET``.

Usage: python tests/fuzz.py [TARGET...] [--seconds 60] [--engine atheris|hypothesis] [--json]
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

NAMES = ("codec", "gguf", "spool")
# One input that takes longer, or a process that grows beyond this, is a finding.
INPUT_SECONDS = 10
MEMORY_MB = 1024
# What a process may take to load, and to write down what it found.
GRACE_SECONDS = 120

CHILD = "AI4ALL_FUZZ_CHILD"


class Engine(enum.StrEnum):
    """What makes the inputs."""

    ATHERIS = "atheris"
    HYPOTHESIS = "hypothesis"


@dataclass
class Outcome:
    """What a run of one target came to.

    Attributes:
        target: Its name.
        engine: What made the inputs.
        seconds: How long it ran.
        executions: Inputs that it took.
        coverage: Edges that were reached; None where nobody counts them.
        corpus: Inputs that reached something new, the seeds included; None as before.
        findings: What was raised, and where, each once; with the file of its input.
    """

    target: str
    engine: str
    seconds: float = 0.0
    executions: int = 0
    coverage: int | None = None
    corpus: int | None = None
    findings: list[dict[str, str]] = field(default_factory=list)


# In a process of its own.


def run_child(target: str, engine: Engine, seconds: int, keep: Path, folder: Path) -> None:
    """Feed one target until the time is over. With atheris, this ends the process."""
    if engine is Engine.ATHERIS:
        import atheris

        # Under instrumentation, whatever is imported for the first time.
        with atheris.instrument_imports(include=["ai4all"]):
            import fuzz_targets
    else:
        import fuzz_targets
    chosen = fuzz_targets.TARGETS[target]
    work = folder / "work"
    work.mkdir()
    findings = fuzz_targets.Findings(target, chosen.make(work), keep)
    seeds = chosen.seeds()
    for seed in seeds:
        findings(seed)
    if engine is Engine.ATHERIS:
        _with_atheris(findings, chosen, seeds, seconds, keep / f"{target}-", folder)
    else:
        _with_hypothesis(findings, seeds, chosen.words, chosen.max_len, seconds)


def _with_atheris(
    feed: Any, target: Any, seeds: list[bytes], seconds: int, artifacts: Path, folder: Path
) -> None:
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = folder / "words"
    quoted = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in target.words)
    words.write_text("\n".join(quoted) + "\n")
    options = {
        "max_total_time": seconds,
        "max_len": target.max_len,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "dict": words,
        "artifact_prefix": artifacts,
        "print_final_stats": 1,
        "verbosity": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], feed)
    atheris.Fuzz()


def _with_hypothesis(
    feed: Any, seeds: list[bytes], words: tuple[bytes, ...], max_len: int, seconds: int
) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    piece = st.one_of(st.binary(max_size=8), st.sampled_from(words), st.just(b""))
    edit = st.tuples(st.integers(0, max_len), st.sampled_from((0, 0, 1, 4, 64)), piece)

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds), st.lists(edit, max_size=8))
    def mutate(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        data = bytearray(seed)
        for at, taken, given_instead in edits:
            place = at % (len(data) + 1)
            # As many bytes as come, so that what follows stays where it was; or others.
            data[place : place + (taken or len(given_instead))] = given_instead
        if time.monotonic() < until:
            feed(bytes(data[:max_len]))

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        mutate()
    print(f"stat::number_of_executed_units: {feed.executions}", file=sys.stderr)


# Beside it.


def run_target(target: str, engine: Engine, seconds: int, keep: Path) -> Outcome:
    """Run a target in a process of its own, and read what it printed."""
    outcome = Outcome(target, engine.value)
    notes = keep / f"{target}.jsonl"
    notes.unlink(missing_ok=True)
    before = set(keep.iterdir())
    # Memory, where there is a disk of it: the spool syncs each time.
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        job = {"target": target, "engine": engine, "seconds": seconds, "keep": str(keep)}
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            env={**os.environ, CHILD: ujson.dumps({**job, "folder": folder})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=seconds + GRACE_SECONDS,
            check=False,
        )
    outcome.seconds = time.monotonic() - started
    outcome.executions = _last(r"number_of_executed_units:\s*(\d+)", done.stderr) or 0
    outcome.coverage = _last(r"cov: (\d+)", done.stderr)
    outcome.corpus = _last(r"corp: (\d+)", done.stderr)
    if notes.exists():
        outcome.findings = [ujson.loads(line) for line in notes.read_text().splitlines()]
    # What libFuzzer itself ends a process for: time and memory.
    known = {finding["input"] for finding in outcome.findings}
    for path in sorted(set(keep.iterdir()) - before - {notes}):
        if str(path) not in known:
            outcome.findings.append({"what": path.name.split("-")[1], "input": str(path)})
    if done.returncode != 0 and not outcome.findings:
        said = done.stderr.strip().splitlines()[-12:]
        what = f"ended with status {done.returncode}: " + " | ".join(said)
        outcome.findings.append({"what": what, "input": ""})
    return outcome


def _last(pattern: str, text: str) -> int | None:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else None


def give_back(target: str, path: Path) -> None:
    """Feed one input once; what it raises is raised."""
    import fuzz_targets

    with tempfile.TemporaryDirectory() as folder:
        fuzz_targets.TARGETS[target].make(Path(folder))(path.read_bytes())


def print_outcomes(console: Console, outcomes: list[Outcome]) -> None:
    """A row for each target, and a line for each finding."""
    table = Table("target", "engine", "s", "executions", "edges", "corpus", "findings")
    for each in outcomes:
        reached = ["-" if n is None else str(n) for n in (each.coverage, each.corpus)]
        figures = [f"{each.seconds:.0f}", str(each.executions), *reached, str(len(each.findings))]
        table.add_row(each.target, each.engine, *figures)
    console.print(table)
    for each in outcomes:
        for finding in each.findings:
            console.print(f"{each.target}: {finding['what']}\n  {finding['input']}", markup=False)


def chosen_engine(wanted: Engine | None, console: Console) -> Engine:
    """Atheris where it is installed, unless another is asked for."""
    if wanted is not None:
        return wanted
    if importlib.util.find_spec("atheris") is not None:
        return Engine.ATHERIS
    console.print("atheris is not installed (pip install 'ai4all-native[fuzz]'): hypothesis it is")
    return Engine.HYPOTHESIS


def main(
    targets: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="How long each target runs.")] = 60,
    engine: Annotated[Engine | None, typer.Option(help="What makes the inputs.")] = None,
    keep: Annotated[Path, typer.Option(help="Where inputs that found something go.")] = Path(
        "build/fuzz"
    ),
    given: Annotated[Path | None, typer.Option("--input", help="Feed this file once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Run; the exit status is 1 when something was found."""
    console = Console(stderr=as_json, highlight=False, width=100)
    names = targets or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(f"{unknown[0]}: no such target; there are {', '.join(NAMES)}")
    if given is not None:
        for name in names:
            give_back(name, given)
        return
    made_by = chosen_engine(engine, console)
    keep.mkdir(parents=True, exist_ok=True)
    outcomes = list(_run_all(names, made_by, seconds, keep.resolve()))
    print_outcomes(console, outcomes)
    if as_json:
        print(ujson.dumps([asdict(each) for each in outcomes], indent=2))
    raise typer.Exit(1 if any(each.findings for each in outcomes) else 0)


def _run_all(names: list[str], engine: Engine, seconds: int, keep: Path) -> Iterator[Outcome]:
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("targets", total=len(names))
        for name in names:
            yield run_target(name, engine, seconds, keep)
            progress.advance(bar)


if __name__ == "__main__":
    if job := os.environ.get(CHILD):
        told = ujson.loads(job)
        with contextlib.suppress(KeyboardInterrupt):
            run_child(
                told["target"],
                Engine(told["engine"]),
                told["seconds"],
                Path(told["keep"]),
                Path(told["folder"]),
            )
    else:
        typer.run(main)
