from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import ujson

from ai4all.protocol.codec import encode
from ai4all.protocol.messages import RequestWork, ResultAck
from ai4all.protocol.schema import wire_schema

from .conftest import GOLDEN

NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = wire_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


@pytest.mark.parametrize("name", NAMES)
def test_golden_frames_are_valid(
    name: str,
    golden: Callable[[str], dict[str, Any]],
    validator: jsonschema.Draft202012Validator,
) -> None:
    frame = golden(name)
    validator.validate(frame)
    side = "ClientMessage" if name.startswith("client") else "ServerMessage"
    other = "ServerMessage" if name.startswith("client") else "ClientMessage"
    definitions = validator.schema["$defs"]
    refer = {"$defs": definitions}
    assert jsonschema.Draft202012Validator(refer | definitions[side]).is_valid(frame)
    assert not jsonschema.Draft202012Validator(refer | definitions[other]).is_valid(frame)


@pytest.mark.parametrize("name", NAMES)
def test_golden_frames_without_their_type_are_not(
    name: str,
    golden: Callable[[str], dict[str, Any]],
    validator: jsonschema.Draft202012Validator,
) -> None:
    frame = golden(name)
    assert not validator.is_valid(frame | {"type": "Nonsense"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("server-assignment", {"task_type": "PAINTING"}),
        ("server-assignment", {"input": {"prompt": 7}}),
        ("server-assignment", {"input": {}}),
        ("server-assignment", {"block_id": ""}),
        ("server-no-work", {"retry_after_ms": -1}),
        ("client-heartbeat-idle", {"status": "Sleeping"}),
        ("client-heartbeat-idle", {"status": {"Working": {"block_id": "b", "progress": 2}}}),
    ],
)
def test_faults_are_seen(
    name: str,
    change: dict[str, Any],
    golden: Callable[[str], dict[str, Any]],
    validator: jsonschema.Draft202012Validator,
) -> None:
    assert not validator.is_valid(golden(name) | change)


def test_what_is_encoded_is_valid(validator: jsonschema.Draft202012Validator) -> None:
    for message in (RequestWork(worker_id="w"), ResultAck(block_id="b", accepted=True)):
        validator.validate(ujson.loads(encode(message)))


def test_the_schema_is_json_and_stays_the_same() -> None:
    assert ujson.loads(ujson.dumps(wire_schema())) == wire_schema()
