"""Load spoiled models in an engine that sanitizers watch.

The same named files and mutants as in ``hostile_models.py``. What our pre-check lets through is
loaded, each in a process of its own, by the native program ``spoiled_models``, and generates a few
tokens. The goal: not one report. An assertion of llama.cpp's that ends the process is none.

Usage: python tests/spoiled_models.py build/cpu-asan/spoiled_models [--mutants 10000] [--seed 0]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

import typer
import ujson
from gguf_mutants import BUG_SHAPES, MALFORMED, Mutator, small_model
from rich.console import Console
from rich.progress import track

from ai4all.errors import InvalidModelFile
from ai4all.models.gguf import read_header

REPORT = "report"
REFUSED_BEFORE = "refused by the pre-check"

# 86 is what the program takes for a report. Leaks are what the native tests look for.
SANITIZERS = {
    "ASAN_OPTIONS": "exitcode=86:detect_leaks=0:allocator_may_return_null=1",
    "TSAN_OPTIONS": "exitcode=86:halt_on_error=1",
    "UBSAN_OPTIONS": "exitcode=86:halt_on_error=1:print_stacktrace=1",
}


def models(mutants: int, seed: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names, and what makes the bytes; the good one is the first."""
    yield "good", small_model
    yield from (MALFORMED | BUG_SHAPES).items()
    for number in range(seed * 1_000_000, seed * 1_000_000 + mutants):
        yield str(number), lambda number=number: Mutator(number).mutant()[1]


def run(program: Path, mutants: int, seed: int, log: Path) -> dict[str, str]:
    """What became of each model, by its name; what the program says goes to ``log``."""
    console = Console(stderr=True)
    became: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        log.open("wb") as said,
        subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | SANITIZERS,
            text=True,
        ) as loading,
    ):
        assert loading.stdin is not None
        assert loading.stdout is not None
        path = Path(folder) / "model.gguf"
        everything = list(models(mutants, seed))
        for name, make in track(everything, console=console, disable=not console.is_terminal):
            path.write_bytes(make())
            try:
                read_header(path)
            except InvalidModelFile:
                became[name] = REFUSED_BEFORE
                continue
            said.write(f"== {name}\n".encode())
            said.flush()
            loading.stdin.write(f"{path}\n")
            loading.stdin.flush()
            became[name] = loading.stdout.readline().strip() or "the program ended"
    return became


def main(
    program: Annotated[Path, typer.Argument(help="The native program of a sanitizer preset.")],
    mutants: Annotated[int, typer.Option(min=1, help="Spoiled models to try.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed makes other mutants.")] = 0,
    log: Annotated[Path, typer.Option(help="Where reports go.")] = Path("spoiled_models.log"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Load spoiled models in an engine that sanitizers watch."""
    began = time.monotonic()
    became = run(program.resolve(), mutants, seed, log)
    counts = Counter(became.values())
    bad = sorted(n for n, what in became.items() if what in (REPORT, "hung", "the program ended"))
    if became["good"] != "answered":
        bad.insert(0, "good")
    if as_json:
        print(ujson.dumps({"models": len(became), "counts": counts, "bad": bad}))
    else:
        for what, count in counts.most_common():
            print(f"{count:6d} {what}")
        print(f"{len(became)} models in {time.monotonic() - began:.0f} s")
        print("the goal is met" if not bad else f"see {log}: {', '.join(bad[:20])}")
    raise typer.Exit(bool(bad))


if __name__ == "__main__":
    typer.run(main)
