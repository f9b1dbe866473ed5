"""Compare greedy decoding with llama.cpp's own, on ten prompts.

Builds ``llama-completion`` and ``llama-server`` from the pinned source (bench/reference.py). The
text of every prompt must equal ``llama-completion``'s to the byte, and its token ids those that
``llama-server`` returns. Both run with the threads and batch sizes of ours.

Usage: python tests/compare_greedy.py MODEL.gguf [--tokens 64] [--threads N] [--programs DIR]
Exit status 0 when all are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ujson

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from reference import build

from ai4all.backend.base import Completion, EngineOptions, GenerateRequest
from ai4all.backend.registry import open_backend
from ai4all.types.model import ModelFile

PROMPTS = [
    "Hello, world!",
    "Explain quantum computing in simple terms.",
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "Die Hauptstadt von Deutschland ist",
    "List three uses for a brick:\n1.",
    "Q: What is the boiling point of water?\nA:",
    "The naïve café owner said: “",
]


async def ours(file: ModelFile, threads: int, n: int) -> list[Completion]:
    """Our completions."""
    async with open_backend() as backend:
        await backend.load(file, EngineOptions(n_ctx=2048, threads=threads))
        return [
            await backend.complete(
                GenerateRequest(
                    prompt=prompt,
                    max_tokens=n,
                    temperature=0.0,
                    repetition_penalty=1.0,
                    ignore_eos=True,
                )
            )
            for prompt in PROMPTS
        ]


def completion_text(program: Path, model: Path, threads: int, prompt: str, n: int) -> str:
    """What ``llama-completion`` writes after the prompt."""
    command = [str(program), "-m", str(model), "-t", str(threads), "-c", "2048", "-n", str(n)]
    command += ["--temp", "0", "--ignore-eos", "--no-conversation", "--no-display-prompt"]
    command += ["--no-escape", "--prompt", prompt]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return done.stdout.decode("utf-8", "replace")


@contextmanager
def server(program: Path, model: Path, threads: int) -> Any:
    """A ``llama-server`` on a free loopback port; gives its completion URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "-m", str(model), "-t", str(threads), "-c", "2048", "-np", "1"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("llama-server ended before it was ready") from None
                time.sleep(0.1)
        yield f"{url}/completion"
    finally:
        process.terminate()
        process.wait()


def server_tokens(url: str, prompt: str, n: int) -> list[int]:
    """Token ids that ``llama-server`` generates."""
    body = {
        "prompt": prompt,
        "n_predict": n,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    request = urllib.request.Request(
        url, ujson.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        tokens: list[int] = ujson.loads(answer.read())["tokens"]
    return tokens


def main() -> int:
    """Run the comparison and print a line for each prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--programs", type=Path, help="folder with llama.cpp's programs, already built"
    )
    arguments = parser.parse_args()
    programs = arguments.programs or build(("llama-completion", "llama-server"))
    content = arguments.model.read_bytes()
    file = ModelFile("m", arguments.model, hashlib.sha256(content).hexdigest(), len(content))
    mine = asyncio.run(ours(file, arguments.threads, arguments.tokens))
    bad = 0
    with server(programs / "llama-server", arguments.model, arguments.threads) as url:
        for prompt, completion in zip(PROMPTS, mine, strict=True):
            text = completion_text(
                programs / "llama-completion",
                arguments.model,
                arguments.threads,
                prompt,
                arguments.tokens,
            )
            # The program ends its output with line feeds of its own.
            same_text = text.rstrip("\n") == completion.text.rstrip("\n")
            same_tokens = (
                tuple(server_tokens(url, prompt, arguments.tokens)) == completion.token_ids
            )
            bad += not (same_text and same_tokens)
            verdict = "equal" if same_text and same_tokens else "DIFFERENT"
            print(f"{verdict}  text {same_text}  tokens {same_tokens}  {prompt!r}")
    print(f"{len(PROMPTS) - bad} of {len(PROMPTS)} prompts equal, {arguments.tokens} tokens each")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
