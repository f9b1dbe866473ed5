"""Frames as a broken or hostile coordinator might send them, and a session that takes them.

``Mutator`` makes endless variations of the golden frames. ``Target`` is what a frame meets on its
way in, all but the socket: the session, the check of an assignment's input, and the request that
would go to the engine. Nothing of it may raise anything but the errors it promises.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ujson

from ai4all.backend.base import GenerateRequest
from ai4all.blocks import Block
from ai4all.errors import ComputeError
from ai4all.protocol.events import AssignmentUnfit, BadFrame, CloseLink, SessionEvent, WorkAssigned
from ai4all.protocol.messages import WorkerCapabilities, envelope
from ai4all.protocol.session import Session, SessionOptions
from ai4all.protocol.states import State
from ai4all.tasks import OFFERED, parse_input
from ai4all.tasks.generation import request_for
from ai4all.types.task import BlockMetrics, GenerationParameters, TaskResult

__all__ = ["CANARY", "Mutator", "Target", "golden_frames"]

CANARY = "c4nary-prompt-71f0"
"""Stands in every text of the frames; what a session says of a frame must not repeat it."""

_GOLDEN = Path(__file__).parents[2] / "fixtures" / "wire"

_INPUTS: dict[str, dict[str, Any]] = {
    "TEXT_COMPLETION": {
        "prompt": CANARY, "system_prompt": CANARY, "max_tokens": 16, "temperature": 0.5,
        "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7,
        "stop_sequences": [CANARY], "logprobs": 2, "ignore_eos": False, "deterministic": False,
    },
    "EMBEDDINGS": {"texts": [CANARY, "b"], "normalize": True},
    "CLASSIFICATION": {"text": CANARY, "labels": ["a", "b"], "multi_label": False},
    "QUESTION_ANSWERING": {"question": CANARY, "context": CANARY, "grammar": "root ::= \"a\""},
    "SUMMARIZATION": {"text": CANARY, "target_length": 10, "style": "tldr",
                      "json_schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
    "VALIDATION": {
        "task": {"type": "TextCompletion", "prompt": CANARY, "max_tokens": 3},
        "expected_hash": "0" * 64,
    },
    "TRAINING_BATCH": {"x": CANARY},
}  # fmt: skip

# Text that stands where a value did: what JSON readers disagree on, and what costs most.
_RAW_VALUES: tuple[Callable[[random.Random], str], ...] = (
    lambda chance: "9" * chance.choice((1, 19, 20, 21, 400, 4300, 4301, 100_000)),
    lambda chance: "-" + "9" * chance.choice((1, 19, 400)),
    lambda chance: chance.choice(("NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e400", "1E+999")),
    lambda chance: f"{chance.random()}e{chance.randrange(-400, 400)}",
    lambda chance: "0." + "1" * chance.choice((1, 20, 5000)),
    lambda chance: chance.choice(("tru", "nul", "None", "01", "+1", ".5", "0x10", "''")),
    lambda chance: '"' + "\\ud800" * chance.choice((1, 3)) + '"',
    lambda chance: '"\\u0000' + chance.choice(("", "x", "\\u0000")) + '"',
    lambda chance: '"' + "y" * chance.choice((0, 64, 1024, 1025, 65_536)) + '"',
    lambda chance: '"' + chance.choice(("../../etc/passwd", "/etc", "a\\\\b", "\\u202e")) + '"',
    lambda chance: "[" * (n := chance.choice((1, 63, 64, 65, 2000))) + "]" * n,
    lambda chance: '{"a":' * (n := chance.choice((1, 63, 64, 65, 2000))) + "1" + "}" * n,
    lambda chance: "[" + ",".join(["1"] * chance.choice((0, 1, 4097))) + "]",
    lambda chance: '{"' + '":1,"'.join(f"k{n}" for n in range(chance.choice((1, 300)))) + '":1}',
    lambda chance: "true",
    lambda chance: "false",
    lambda chance: "null",
    lambda chance: '{"__class__":1,"__proto__":{}}',
    lambda chance: '"2030-02-31T00:00:00Z"',
    lambda chance: '"' + "9" * chance.choice((4, 9)) + '-12-31T23:59:60.999999999999Z"',
)  # fmt: skip

# Each stands for a raw value until the text is made; no frame has such characters otherwise.
_MARK = "\u2402{}\u2403"


def golden_frames() -> list[dict[str, Any]]:
    """What a coordinator says when all is well, one of each kind and one of each task."""
    frames = [ujson.loads(path.read_text()) for path in sorted(_GOLDEN.glob("server-*.json"))]
    assert len(frames) >= 8, f"no golden frames in {_GOLDEN}"
    assignment = next(frame for frame in frames if frame["type"] == "Assignment")
    frames += [
        {**assignment, "task_type": kind, "input": task_input}
        for kind, task_input in _INPUTS.items()
    ]
    envelope = {
        "id": "6f1c6f5e-5f0e-4f8e-9c39-0d4b7a2a1b11",
        "timestamp": "2030-01-01T00:00:00Z",
        "version": {"major": 1, "minor": 0, "patch": 0},
    }
    return [*frames, *({**frame, **envelope} for frame in frames)]


class Mutator:
    """Endless frames, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._frames = golden_frames()
        self._texts = [ujson.dumps(frame, escape_forward_slashes=False) for frame in self._frames]
        self._serial = 0

    def frame(self) -> str | bytes:
        """The next frame: most are text, some are binary, a few are sound."""
        chance = self._chance
        roll = chance.random()
        if roll < 0.05:
            text = self._sound()
        elif roll < 0.65:
            text = self._with_wrong_structure()
        else:
            text = self._with_wrong_bytes()
        return text if chance.random() < 0.98 else text.encode("utf-8", "surrogatepass")

    def _sound(self) -> str:
        frame = dict(self._chance.choice(self._frames))
        if "block_id" in frame and self._chance.random() < 0.7:
            self._serial += 1
            frame["block_id"] = f"b-{self._serial}"
        return ujson.dumps(frame, escape_forward_slashes=False)

    # Structure: a frame that is still JSON, or nearly.

    def _with_wrong_structure(self) -> str:
        chance = self._chance
        frame = ujson.loads(chance.choice(self._texts))
        raw: list[str] = []
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            self._spoil(frame, raw)
        text = ujson.dumps(frame, ensure_ascii=False, escape_forward_slashes=False)
        for index, value in enumerate(raw):
            mark = _MARK.format(index)
            # As a whole value or key; a value that is no string loses the quotes.
            text = text.replace(f'"{mark}"', value).replace(mark, value.strip('"'))
        return text

    def _spoil(self, frame: dict[str, Any], raw: list[str]) -> None:
        chance = self._chance
        holder: Any = frame
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                return
            key = chance.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and chance.random() < 0.6:
                holder = inner
                continue
            break
        roll = chance.random()
        if roll < 0.7:
            raw.append(chance.choice(_RAW_VALUES)(chance))
            holder[key] = _MARK.format(len(raw) - 1)
        elif roll < 0.8 and isinstance(holder, dict):
            del holder[key]
        elif roll < 0.9 and isinstance(holder, dict):
            raw.append(chance.choice(_RAW_VALUES)(chance))
            name = _MARK.format(len(raw) - 1)
            holder[name] = holder.pop(key)
        else:
            holder[key] = chance.choice((None, True, 0, -1, 1.5, "", [], {}, [inner], {"x": inner}))

    # Bytes: what a broken program or a broken link makes of a frame.

    def _with_wrong_bytes(self) -> str:
        chance = self._chance
        data = bytearray(chance.choice(self._texts).encode())
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(7):
                case 0 if data:
                    data[at % len(data)] ^= 1 << chance.randrange(8)
                case 1:
                    del data[at : at + chance.choice((1, 4, 64))]
                case 2:
                    data[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
                case 3:
                    data[at:at] = chance.choice((b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":"))
                case 4:
                    start = chance.randrange(len(data) + 1)
                    data[at:at] = data[start : start + chance.choice((8, 64, 512))]
                case 5:
                    other = chance.choice(self._texts).encode()
                    data = data[:at] + other[chance.randrange(len(other)) :]
                case _:
                    del data[at:]
        # A WebSocket library hands on nothing but UTF-8.
        return data.decode("utf-8", "replace")


@dataclass
class Target:
    """A session that is fed, and what came of it.

    Attributes:
        frames: Frames that went in.
        outcomes: What they led to, by name.
        slowest_s: Processor time of the slowest frame in seconds, and that frame.
        links: Times that the link was made again because a frame had ended it.
    """

    frames: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    links: int = 0

    def __post_init__(self) -> None:
        capabilities = WorkerCapabilities(
            backend="cpu",
            supported_tasks=list(OFFERED),
            supports_training=False,
            memory_mb=1024,
            compute_score=0.5,
        )
        under = envelope("e", datetime(2030, 1, 1, tzinfo=UTC))
        options = SessionOptions(max_bad_frames=20)
        self.session = Session("w", capabilities, 0.5, envelope=lambda: under, options=options)
        self._now = 0.0

    def feed(self, frame: str | bytes) -> None:
        """Take a frame as a worker would.

        Raises:
            AssertionError: Something was said or let through that must not be.
            Exception: Anything else is a fault that a coordinator could cause.
        """
        session = self.session
        if session.state is State.DISCONNECTED:
            self._connect()
        self._now += 0.001
        self.frames += 1
        started = time.thread_time()
        session.receive(frame, self._now)
        events = session.events()
        for event in events:
            self._take(event)
        took = time.thread_time() - started
        if took > self.slowest_s:
            self.slowest_s, self.slowest = took, repr(frame[:200])
        due = session.next_deadline()
        if due is not None and due <= self._now:
            session.receive_timeout(self._now)
            session.events()
        session.frames_to_send()
        if not events:
            self.outcomes["taken without an event"] += 1

    def _connect(self) -> None:
        self.links += 1
        self.session.connecting()
        self.session.connected(self._now)
        if self.links % 4:
            # Every fourth link is left before its ``Registered``: that is a state, too.
            hello = '{"type":"Registered","session_id":"s","heartbeat_interval_ms":1000,'
            hello += '"extensions":["cancel","progress","reconcile","decline","goodbye","drain"]}'
            self.session.receive(hello, self._now)
        self.session.events()
        self.session.frames_to_send()

    def _take(self, event: SessionEvent) -> None:
        name = type(event).__name__
        match event:
            case BadFrame(problem):
                assert CANARY not in problem, f"a complaint repeats the frame: {problem}"
                assert len(problem) < 1000, "a complaint as long as a frame"
            case AssignmentUnfit(block_id, error):
                name = self._answered_with(error)
                self._answer(block_id)
            case WorkAssigned(assignment):
                name = self._admit(event)
                self._answer(assignment.block_id)
            case CloseLink():
                pass
        self.outcomes[name] += 1

    def _admit(self, event: WorkAssigned) -> str:
        """Take a block as far as the engine."""
        block = Block.received(event.assignment)
        try:
            parsed = parse_input(event.assignment.task_type, event.assignment.input)
        except ComputeError as refusal:
            return self._answered_with(refusal)
        if isinstance(parsed, GenerationParameters):
            check_native_ranges(request_for(parsed, "p", None, block.deadline))
        return "block taken"

    def _answered_with(self, error: ComputeError) -> str:
        assert CANARY not in str(error), f"an answer repeats the frame: {error}"
        return f"answered with {error.code.value}"

    def _answer(self, block_id: str) -> None:
        """End the block, so that blocks do not pile up; its acknowledgement is a golden frame."""
        metrics = BlockMetrics(queue_time_ms=0.0, execution_time_ms=0.0, total_time_ms=0.0)
        result = TaskResult(success=False, output=None, error=None, metrics=metrics)
        if block_id not in self.session.running:
            return
        self.session.send_result(block_id, self.session.result_frame(block_id, result))
        # As many as a worker would leave unacknowledged; then the coordinator makes good.
        for waiting in self.session.unacknowledged[:-32]:
            ack = {"type": "ResultAck", "block_id": waiting, "accepted": True, "error": None}
            self.session.receive(ujson.dumps(ack), self._now)


def check_native_ranges(request: GenerateRequest) -> None:
    """What native code casts to its own types must fit them, and mean there what it means here."""
    assert 1 <= request.max_tokens < 1 << 31
    assert 0 <= request.top_k < 1 << 31
    assert 0.0 <= request.temperature <= 100.0
    assert 0.0 <= request.top_p <= 1.0
    assert 0.0 <= request.min_p <= 1.0
    assert 0.0 < request.repetition_penalty <= 100.0
    assert request.seed is None or 0 <= request.seed < 1 << 64
    assert request.logprobs is None or 0 <= request.logprobs <= 100
    assert len(request.stop) <= 64
    assert all(0 < len(text) <= 1024 for text in request.stop)
    assert request.deadline is None or abs(request.deadline) < 1e9
    assert not (request.grammar and request.json_schema)
