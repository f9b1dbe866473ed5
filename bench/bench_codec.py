"""Frames to messages and back: what each block and heartbeat pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ujson
from pytest_benchmark.fixture import BenchmarkFixture

from ai4all.errors import RemoteProtocolError
from ai4all.protocol.codec import decode_client_message, decode_server_message, encode
from ai4all.protocol.messages import Message

GOLDEN = Path(__file__).parents[1] / "fixtures" / "wire"


def frame(name: str, **changes: Any) -> str:
    return ujson.dumps(ujson.loads((GOLDEN / f"{name}.json").read_text()) | changes)


@pytest.mark.parametrize("name", ["server-assignment", "server-result-ack", "server-no-work"])
def test_decode_server_frame(benchmark: BenchmarkFixture, name: str) -> None:
    message = benchmark(decode_server_message, frame(name))
    assert isinstance(message, Message)


def test_decode_long_assignment(benchmark: BenchmarkFixture) -> None:
    prompt = 'a "word" with [brackets] {in it} and ünïcode, ' * 5000
    long = frame("server-assignment", input={"prompt": prompt})
    message = benchmark(decode_server_message, long)
    assert isinstance(message, Message)


def test_decode_embeddings(benchmark: BenchmarkFixture) -> None:
    result = ujson.loads(frame("client-submit-result"))
    result["result"]["output"] = {
        "task_type": "EMBEDDINGS",
        "embeddings": [[0.123456] * 384] * 64,
        "dimensions": 384,
        "usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1},
    }
    message = benchmark(decode_client_message, ujson.dumps(result))
    assert isinstance(message, Message)


def test_refuse_nesting(benchmark: BenchmarkFixture) -> None:
    bomb = "[" * 1_000_000

    def refuse() -> str:
        with pytest.raises(RemoteProtocolError) as caught:
            decode_server_message(bomb)
        return caught.value.problem

    assert "nested" in benchmark(refuse)


@pytest.mark.parametrize("name", ["client-submit-result", "client-heartbeat-working"])
def test_encode_client_frame(benchmark: BenchmarkFixture, name: str) -> None:
    message = decode_client_message(frame(name))
    assert isinstance(message, Message)
    text = benchmark(encode, message)
    assert ujson.loads(text) == ujson.loads(frame(name))
