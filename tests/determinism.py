"""Deterministic mode: do the same request and the same build always give the same token ids?

Each run computes the prompts below with ``deterministic`` set: some greedily, some drawn with a
seed. Every few runs a fresh process goes on, and between the runs of a process other work goes
through the engine, so that caches, slots and memory are never twice the same. The first run's
token ids are what all others must give.

Usage: python tests/determinism.py MODEL.gguf [--runs 1000] [--restart-every 50] [--quick]
Exit status 0 when all runs are identical.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ujson

from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend
from ai4all.types.model import ModelFile

PROMPTS = (
    "Hello, world!",
    "The ferry leaves the harbour at ten past six, whatever the weather",
    "One, two, three, four,",
)
TOKENS = 16
QUICK_RUNS, QUICK_RESTART = 12, 4


def requests() -> list[GenerateRequest]:
    """What one run computes."""
    made = []
    for prompt in PROMPTS:
        for temperature, penalty in ((0.0, 1.0), (0.9, 1.1)):
            made.append(
                GenerateRequest(
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=temperature,
                    repetition_penalty=penalty,
                    seed=20260101,
                    ignore_eos=True,
                    deterministic=True,
                )
            )
    return made


def disturbance(number: int) -> GenerateRequest:
    """Other work: shares beginnings with the prompts, and is never twice the same."""
    return GenerateRequest(
        prompt=f"{PROMPTS[number % len(PROMPTS)]} and so on, {number} times over",
        max_tokens=1 + number % 5,
        temperature=1.0,
        seed=number,
        ignore_eos=True,
    )


async def runs_of_one_process(
    path: Path, first: int, count: int, options: EngineOptions
) -> list[str]:
    """The digest of each run's token ids."""
    model = ModelFile(path.stem, path, "0" * 64, path.stat().st_size)
    digests = []
    async with NativeBackend() as backend:
        await backend.load(model, options)
        for number in range(first, first + count):
            digest = hashlib.sha256()
            # Neighbours that are running when a deterministic request comes must not touch it.
            others = [
                asyncio.ensure_future(backend.complete(disturbance(number + n)))
                for n in range(options.n_slots)
            ]
            for request in requests():
                completion = await backend.complete(request)
                digest.update(repr(completion.token_ids).encode())
            await asyncio.gather(*others)
            digests.append(digest.hexdigest())
    return digests


def run_all(path: Path, runs: int, restart_every: int, threads: int, slots: int) -> list[str]:
    """The digests of all runs, ``restart_every`` of them to a process."""
    digests: list[str] = []
    while len(digests) < runs:
        count = min(restart_every, runs - len(digests))
        command = [sys.executable, __file__, str(path), "--child", str(len(digests)), str(count)]
        command += ["--threads", str(threads), "--slots", str(slots)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"a process ended with {done.returncode}:\n{done.stderr[-2000:]}")
        digests += ujson.loads(done.stdout)
    return digests


def main() -> int:
    """Run and say how many runs were identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--restart-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        first, count = arguments.child
        options = EngineOptions(n_ctx=512, threads=arguments.threads, n_slots=arguments.slots)
        digests = asyncio.run(runs_of_one_process(arguments.model, first, count, options))
        print(ujson.dumps(digests))
        return 0
    if arguments.quick:
        arguments.runs, arguments.restart_every = QUICK_RUNS, QUICK_RESTART
    digests = run_all(
        arguments.model,
        arguments.runs,
        arguments.restart_every,
        arguments.threads,
        arguments.slots,
    )
    same = digests.count(digests[0])
    restarts = -(-len(digests) // arguments.restart_every)
    print(f"{same} of {len(digests)} runs identical, over {restarts} processes")
    for digest, count in Counter(digests).most_common():
        print(f"{count:6d}  token ids sha256 {digest}")
    return 0 if same == len(digests) else 1


if __name__ == "__main__":
    sys.exit(main())
