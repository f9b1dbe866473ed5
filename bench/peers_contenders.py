"""Who is measured: us, the Python bindings, and llama.cpp's own programs. No figure is made here.

Each one runs in its own process, on loopback where it has a port, and is ended with its context.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import ujson

OURS = "ai4all-native"
BINDINGS = ("xllamacpp", "llama-cpp-python")

_HOST = Path(__file__).with_name("peers_host.py")
_START_S = 180.0
_ANSWER_S = 600.0


class MissingPeer(Exception):
    """It cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation. Times are seconds from the request; ``arrivals`` is (time, tokens)."""

    tokens: int
    first_s: float
    last_s: float
    total_s: float
    prompt_tokens: int = 0
    first_tokens: int = 1
    text: str = field(default="", repr=False)
    token_ids: list[int] = field(default_factory=list, repr=False)
    arrivals: list[tuple[float, int]] = field(default_factory=list, repr=False)
    reused: int = 0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first step; infinite where all came at once."""
        seconds = self.last_s - self.first_s
        return (self.tokens - self.first_tokens) / seconds if seconds > 0.0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all contenders have in common.

    Attributes:
        model: The GGUF file.
        programs: Folder with llama.cpp's programs.
        threads: For decoding and for prompts.
        n_ctx: Context of one sequence, in tokens.
        n_batch: Logical batch.
        n_ubatch: Physical batch.
    """

    model: Path
    programs: Path
    threads: int
    n_ctx: int = 4096
    n_batch: int = 2048
    n_ubatch: int = 512

    def program(self, name: str) -> str:
        """Path of one of llama.cpp's programs.

        Raises:
            MissingPeer: It has not been built.
        """
        path = self.programs / name
        if not path.is_file():
            raise MissingPeer(f"there is no {name} in {self.programs}")
        return str(path)

    def flags(self, n_slots: int = 1) -> list[str]:
        """What llama.cpp's programs are given."""
        flags = ["-m", str(self.model), "-t", str(self.threads), "-tb", str(self.threads)]
        flags += ["-c", str(self.n_ctx * n_slots)]
        return [*flags, "-b", str(self.n_batch), "-ub", str(self.n_ubatch)]


class Hosted:
    """A library in a process of its own: ours, or a binding.

    Args:
        kind: ``ours``, or the name of a binding.
        setup: The model and its shape.
        n_slots: Sequences at once.

    Raises:
        MissingPeer: It cannot run here.
    """

    def __init__(self, kind: str, setup: Setup, n_slots: int = 1) -> None:
        self.name = OURS if kind == "ours" else kind
        options = {
            "model": str(setup.model),
            "threads": setup.threads,
            "n_ctx": setup.n_ctx,
            "n_batch": setup.n_batch,
            "n_ubatch": setup.n_ubatch,
            "n_slots": n_slots,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(_HOST), kind, ujson.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self.info = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MissingPeer(f"it ended with status {self._process.wait()}")
        answer: dict[str, Any] = ujson.loads(line)
        if "error" in answer:
            raise MissingPeer(answer["error"])
        return answer

    def _ask(self, op: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(ujson.dumps({"op": op, **request}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> Sample:
        """Generate greedily over end tokens.

        Args:
            prompt: The prompt.
            max_tokens: Tokens to generate.
            options: ``reuse``, ``speculate``, ``system_prompt``: for ours alone.
        """
        return Sample(**self._ask("generate", prompt=prompt, max_tokens=max_tokens, **options))

    def first_token_s(self, prompt: str, **options: Any) -> float:
        """Seconds until the first token is here."""
        return self.generate(prompt, 1, **options).first_s

    def together(self, prompts: list[str], max_tokens: int) -> list[Sample]:
        """Generate for all prompts at once; ours alone."""
        answers = self._ask("together", prompts=prompts, max_tokens=max_tokens)["answers"]
        return [Sample(**answer) for answer in answers]

    def memory_mb(self) -> float:
        """Resident memory of the process and its children, in MiB."""
        return resident_mb(self._process.pid)

    def close(self) -> None:
        """End the process."""
        end(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Server:
    """``llama-server`` on a free loopback port.

    Args:
        setup: The model and its shape.
        n_slots: Sequences at once, each with a context of ``setup.n_ctx``.
        n_ctx: In place of the setup's.

    Raises:
        MissingPeer: It cannot run here.
    """

    name = "llama-server"

    def __init__(self, setup: Setup, n_slots: int = 1) -> None:
        program = setup.program(self.name)
        self._port = free_port()
        self._process = subprocess.Popen(
            [
                *(program, *setup.flags(n_slots), "-np", str(n_slots)),
                *("--host", "127.0.0.1", "--port", str(self._port), "--no-webui"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        self.info = {"version": (done.stdout + done.stderr).strip().partition("\n")[0]}

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_S)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if (status := self._process.poll()) is not None:
                raise MissingPeer(f"it ended with status {status} before it was ready")
            with contextlib.suppress(OSError), contextlib.closing(self._connect()) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.05)
        raise MissingPeer(f"it was not ready within {_START_S:.0f} s")

    @staticmethod
    def _request(
        connection: http.client.HTTPConnection, prompt: str, max_tokens: int, **more: Any
    ) -> http.client.HTTPResponse:
        body = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            **more,
        }
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", ujson.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise MissingPeer(f"it answered with HTTP {response.status}: {response.read()[:200]!r}")
        return response

    def generate(self, prompt: str, max_tokens: int, *, reuse: bool = False) -> Sample:
        """Generate greedily over end tokens, in one answer: the server's fastest way.

        Time to first token and decode rate are those of the server's own clock.
        """
        # A connection of its own, made before the clock starts: the server drops idle ones.
        with contextlib.closing(self._connect()) as connection:
            return self._generate(connection, prompt, max_tokens, reuse=reuse)

    def _generate(
        self,
        connection: http.client.HTTPConnection,
        prompt: str,
        max_tokens: int,
        *,
        reuse: bool = False,
    ) -> Sample:
        start = time.perf_counter()
        response = self._request(connection, prompt, max_tokens, cache_prompt=reuse)
        answer = ujson.loads(response.read())
        total = time.perf_counter() - start
        timings = answer["timings"]
        first = timings["prompt_ms"] / 1e3
        # Its clock of the generation starts with the first token.
        last = first + timings["predicted_ms"] / 1e3
        return Sample(
            tokens=answer["tokens_predicted"],
            first_s=first,
            last_s=last,
            total_s=total,
            prompt_tokens=timings["prompt_n"],
            text=answer["content"],
        )

    def first_token_s(self, prompt: str, *, reuse: bool = False) -> float:
        """Seconds until the first token is here, as a streaming client sees it."""
        with contextlib.closing(self._connect()) as connection:
            start = time.perf_counter()
            response = self._request(connection, prompt, 1, stream=True, cache_prompt=reuse)
            first = 0.0
            while line := response.readline():
                if not first and line.startswith(b"data: "):
                    first = time.perf_counter() - start
            return first

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, with those that the model adds."""
        with contextlib.closing(self._connect()) as connection:
            body = ujson.dumps({"content": text, "add_special": True})
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
            return len(ujson.loads(connection.getresponse().read())["tokens"])

    def together(self, prompts: list[str], max_tokens: int) -> float:
        """Generate for all prompts at once.

        Returns:
            Tokens a second, from the first request to the last answer.
        """
        connections = [self._connect() for _ in prompts]
        try:
            with ThreadPoolExecutor(len(prompts)) as pool:
                start = time.perf_counter()
                samples = list(
                    pool.map(
                        lambda pair: self._generate(pair[0], pair[1], max_tokens),
                        zip(connections, prompts, strict=True),
                    )
                )
                seconds = time.perf_counter() - start
        finally:
            for connection in connections:
                connection.close()
        return sum(sample.tokens for sample in samples) / seconds

    def memory_mb(self) -> float:
        """Resident memory, in MiB."""
        return resident_mb(self._process.pid)

    def close(self) -> None:
        """End the process."""
        end(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def llama_bench(setup: Setup, *, prompt: int = 0, decode: int = 0, repetitions: int = 1) -> float:
    """One run of ``llama-bench``.

    Args:
        setup: The model and its shape.
        prompt: Tokens of the prompt, for a prompt test.
        decode: Tokens to decode, for a decode test.
        repetitions: Of the test; the median counts.

    Returns:
        Seconds for all of the tokens.

    Raises:
        MissingPeer: It cannot run here.
    """
    command = [setup.program("llama-bench"), "-m", str(setup.model), "-t", str(setup.threads)]
    command += ["-p", str(prompt), "-n", str(decode), "-r", str(repetitions), "-o", "json"]
    command += ["-b", str(setup.n_batch), "-ub", str(setup.n_ubatch)]
    (row,) = ujson.loads(_output(command))
    nanoseconds = sorted(row["samples_ns"])
    return float(nanoseconds[len(nanoseconds) // 2]) / 1e9


def batched_bench(setup: Setup, *, prompt: int, decode: int, sequences: int) -> float:
    """One run of ``llama-batched-bench``.

    Returns:
        S_TG: tokens a second that all sequences decode together.

    Raises:
        MissingPeer: It cannot run here.
    """
    command = [setup.program("llama-batched-bench"), *setup.flags(sequences)]
    command += ["-npp", str(prompt), "-ntg", str(decode), "-npl", str(sequences)]
    command += ["--output-format", "jsonl"]
    rows = [line for line in _output(command).splitlines() if line.startswith("{")]
    return float(ujson.loads(rows[-1])["speed_tg"])


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_ANSWER_S,
        check=False,
    )
    if done.returncode != 0:
        raise MissingPeer(f"it ended with status {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> Iterator[psutil.Process]:
    """A process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def resident_mb(pid: int) -> float:
    """Resident memory of a process and all that it started, in MiB."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def end(process: subprocess.Popen[Any]) -> None:
    """End a process: at the end of its input, else by signals."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    else:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
