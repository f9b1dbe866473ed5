"""Load and unload a model again and again, and see whether the process grows.

Each cycle loads, generates a few tokens and unloads. What an allocator keeps for reuse shows in
the first cycles; growth is counted from the cycle after the warm-up to the last one.

Usage: python tests/load_cycles.py MODEL.gguf [--cycles 100] [--allowed MIB]
Exit status 0 when the process has not grown by more than what is allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path

import psutil

from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend
from ai4all.types.model import ModelFile

WARM_UP_CYCLES = 3
ALLOWED_MIB = 8.0

MIB = 1024 * 1024


async def resident_after_each(path: Path, cycles: int, options: EngineOptions) -> list[int]:
    """Resident bytes after each unload."""
    process = psutil.Process()
    model = ModelFile(path.stem, path, "0" * 64, path.stat().st_size)
    request = GenerateRequest(prompt="The sea", max_tokens=4, temperature=0.0, ignore_eos=True)
    figures = []
    async with NativeBackend() as backend:
        for _ in range(cycles):
            await backend.load(model, options)
            await backend.complete(request)
            await backend.unload()
            figures.append(process.memory_info().rss)
    return figures


def growth(figures: list[int]) -> int:
    """Bytes between the first and the last third of the cycles after the warm-up, by medians."""
    steady = figures[WARM_UP_CYCLES:]
    third = max(1, len(steady) // 3)
    return int(statistics.median(steady[-third:]) - statistics.median(steady[:third]))


def main() -> int:
    """Run the cycles and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--allowed", type=float, default=ALLOWED_MIB, metavar="MIB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.cycles <= WARM_UP_CYCLES:
        parser.error(f"--cycles: more than {WARM_UP_CYCLES}")
    before = psutil.Process().memory_info().rss
    options = EngineOptions(n_ctx=arguments.context, threads=arguments.threads)
    figures = asyncio.run(resident_after_each(arguments.model, arguments.cycles, options))
    grown = growth(figures)
    shown = [(n, figures[n - 1]) for n in (1, WARM_UP_CYCLES, len(figures) // 2, len(figures))]
    print(f"resident before the first load: {before / MIB:.1f} MiB")
    for number, resident in shown:
        print(f"resident after {number} cycles: {resident / MIB:.1f} MiB")
    print(f"grown by {grown / MIB:.2f} MiB over {len(figures) - WARM_UP_CYCLES} cycles")
    return 0 if grown <= arguments.allowed * MIB else 1


if __name__ == "__main__":
    sys.exit(main())
