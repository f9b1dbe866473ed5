from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import ujson
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from ai4all.errors import BadRequest, LocalProtocolError, RemoteProtocolError, UnsupportedTask
from ai4all.protocol.codec import (
    ForeignVersion,
    Limits,
    UnfitAssignment,
    UnknownMessage,
    decode_client_message,
    decode_server_message,
    describe_invalid,
    encode,
)
from ai4all.protocol.messages import (
    Assignment,
    Heartbeat,
    Message,
    ResultAck,
    SubmitResult,
    WorkingStatus,
)
from ai4all.types.task import TaskType, TextCompletionOutput, ValidationInput

from .conftest import GOLDEN

Decode = Callable[[str | bytes], Any]
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
ASSIGNMENT = {
    "type": "Assignment",
    "block_id": "b-1",
    "task_type": "TEXT_COMPLETION",
    "input": {"prompt": "a secret"},
    "deadline": "2030-01-01T00:00:00Z",
    "model_id": "m",
}


def decoder(name: str) -> Decode:
    return decode_client_message if name.startswith("client") else decode_server_message


def test_every_kind_has_a_golden_frame() -> None:
    kinds = {ujson.loads((GOLDEN / f"{name}.json").read_text())["type"] for name in NAMES}
    assert kinds == {
        *("Register", "Heartbeat", "RequestWork", "SubmitResult"),
        *("Decline", "Goodbye", "Progress", "Reconcile"),
        *("Registered", "Assignment", "NoWork", "ResultAck", "Error", "Cancel", "Drain"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_golden_frames_survive_decoding_and_encoding(
    name: str, golden: Callable[[str], dict[str, Any]]
) -> None:
    frame = golden(name)
    message = decoder(name)(ujson.dumps(frame))
    assert isinstance(message, Message)
    again = ujson.loads(encode(message))
    if "deadline" in frame:
        # A datetime holds microseconds; what is cut must not make the deadline later.
        assert frame.pop("deadline") == "2030-03-17T17:46:40.123456789Z"
        assert again.pop("deadline") == "2030-03-17T17:46:40.123456Z"
    assert again == frame
    for key, value in frame.items():
        assert type(again[key]) is type(value), key


def test_golden_values_arrive_typed(golden: Callable[[str], dict[str, Any]]) -> None:
    assignment = decode_server_message(ujson.dumps(golden("server-assignment")))
    assert isinstance(assignment, Assignment)
    assert assignment.task_type is TaskType.TEXT_COMPLETION
    assert assignment.deadline.microsecond == 123_456
    heartbeat = decode_client_message(ujson.dumps(golden("client-heartbeat-working")))
    assert isinstance(heartbeat, Heartbeat)
    assert isinstance(heartbeat.status, WorkingStatus)
    assert heartbeat.status.Working.progress == 0.5
    result = decode_client_message(ujson.dumps(golden("client-submit-result")))
    assert isinstance(result, SubmitResult)
    assert isinstance(result.result.output, TextCompletionOutput)


def test_a_draft_model_is_named_only_where_it_took_part(
    golden: Callable[[str], dict[str, Any]],
) -> None:
    frame = golden("client-submit-result")
    assert "draft_model_sha256" not in frame["result"]["fingerprint"]
    assert "draft_model_sha256" not in encode(decode_client_message(ujson.dumps(frame)))
    frame["result"]["fingerprint"]["draft_model_sha256"] = "ab" * 32
    again = ujson.loads(encode(decode_client_message(ujson.dumps(frame))))
    assert again["result"] == frame["result"]


def test_the_same_message_gives_the_same_bytes(golden: Callable[[str], dict[str, Any]]) -> None:
    frame = ujson.dumps(golden("client-submit-result"))
    first, second = decode_client_message(frame), decode_client_message(frame)
    assert isinstance(first, SubmitResult)
    assert isinstance(second, SubmitResult)
    assert encode(first) == encode(second) == encode(first)
    # What was read back is written as it was, so a result may pass through here any number of
    # times.
    again = decode_client_message(encode(first))
    assert isinstance(again, SubmitResult)
    assert encode(again) == encode(first)


def test_text_stays_as_it_is() -> None:
    ack = ResultAck(block_id="ünï/☃/\u2028/𝄞", accepted=False, error='"\\\n\x00')
    frame = encode(ack)
    assert "ünï/☃/" in frame
    assert decode_server_message(frame) == ack
    assert decode_server_message(frame.encode()) == ack


@pytest.mark.parametrize(
    "frame",
    [
        "",
        " ",
        "null",
        "[]",
        '"Registered"',
        "17",
        "{",
        '{"type":"NoWork","retry_after_ms":1',
        '{"type":"NoWork","retry_after_ms":1}}',
        '{"type":"NoWork","retry_after_ms":1}{}',
        '{"type":"NoWork","retry_after_ms":1,}',
        "{'type':'NoWork','retry_after_ms':1}",
        '\ufeff{"type":"NoWork","retry_after_ms":1}',
        b'\xef\xbb\xbf{"type":"NoWork","retry_after_ms":1}',
        b'{"type":"Error","code":"\xff","message":""}',
        b'{"type":"Error","code":"\xed\xa0\x80","message":""}',
        b"\x00\x01\x02",
        '{"type":"NoWork","retry_after_ms":' + "1" * 5000 + "}",
        '{"type":"NoWork","retry_after_ms":' + "1" * 400 + "}",
        '{"type":"NoWork","retry_after_ms":NaN}',
        '{"type":"NoWork","retry_after_ms":-Infinity}',
        '{"type":"NoWork","retry_after_ms":1,"x":1e999}',
        '{"type":"NoWork","retry_after_ms":1,"x":{"y":[NaN]}}',
        '{"type":"Error","code":"\\ud800","message":""}',
        '{"type":"Error","code":"x","message":"","\\udfff":1}',
        '{"type":"NoWork","retry_after_ms":-1}',
        '{"type":"NoWork","retry_after_ms":1.5}',
        '{"type":"NoWork","retry_after_ms":true}',
        '{"type":"NoWork","retry_after_ms":"1"}',
        '{"type":"NoWork"}',
        '{"type":7}',
        '{"type":null,"retry_after_ms":1}',
        '{"retry_after_ms":1}',
        '{"type":"ResultAck","block_id":"","accepted":true}',
        '{"type":"ResultAck","block_id":"b","accepted":1}',
        '{"type":"NoWork","retry_after_ms":1,"timestamp":"yesterday"}',
        '{"type":"NoWork","retry_after_ms":1,"version":{"major":1}}',
        '{"type":"Assignment","block_id":7}',
    ],
)
def test_bad_frames_are_remote_faults(frame: str | bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_server_message(frame)


def test_the_path_is_named_and_the_content_is_not() -> None:
    frame = ujson.dumps(
        {
            "type": "Heartbeat",
            "worker_id": "w",
            "status": "Idle",
            "resource_usage": {"cpu_percent": "my secret", "memory_mb": 1, "active_threads": 1},
        }
    )
    with pytest.raises(RemoteProtocolError) as caught:
        decode_client_message(frame)
    assert caught.value.problem.startswith("Heartbeat.resource_usage.cpu_percent: ")
    assert "secret" not in str(caught.value)


def test_a_strange_key_is_content_too() -> None:
    frame = '{"type":"NoWork","retry_after_ms":1,"extra":{"my secret prompt":NaN}}'
    with pytest.raises(RemoteProtocolError) as caught:
        decode_server_message(frame)
    assert caught.value.problem == "frame.extra.?: a number that is not finite"


def test_an_unknown_tag_is_not_quoted() -> None:
    with pytest.raises(ValidationError) as caught:
        ValidationInput.model_validate({"task": {"type": "my secret"}, "expected_hash": ""})
    text = describe_invalid(caught.value, "input")
    assert text == "input.task: Input should be one of the known kinds"


def test_a_second_fault_is_counted() -> None:
    with pytest.raises(RemoteProtocolError, match=r"Error\.code: .* \(and 1 more\)"):
        decode_server_message('{"type":"Error"}')


@pytest.mark.parametrize("ascii_only", [True, False])
def test_size_is_counted_in_bytes(ascii_only: bool) -> None:
    frame = ujson.dumps(
        {"type": "Error", "code": "x", "message": ("x" if ascii_only else "ü") * 50},
        ensure_ascii=False,
    )
    size = len(frame.encode())
    for form in (frame, frame.encode()):
        assert decode_server_message(form, Limits(max_bytes=size))
        with pytest.raises(RemoteProtocolError, match=f"longer than {size - 1} bytes"):
            decode_server_message(form, Limits(max_bytes=size - 1))


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """A frame whose deepest value is ``depth`` levels down, the frame itself included."""
    return (
        '{"type":"NoWork","retry_after_ms":1,"x":'
        + opening * (depth - 1)
        + ("1" if opening != "[" else "")
        + closing * (depth - 1)
        + "}"
    )


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_bounded(opening: str, closing: str) -> None:
    assert decode_server_message(nested(64, opening, closing))
    with pytest.raises(RemoteProtocolError, match="nested deeper than 64"):
        decode_server_message(nested(65, opening, closing))
    with pytest.raises(RemoteProtocolError, match="nested deeper than 64"):
        decode_server_message(nested(100_000, opening, closing))


def test_brackets_in_text_and_in_a_row_are_not_nesting() -> None:
    frame = {
        "type": "Error",
        "code": '[[[["{{{\\"[' * 50,
        "message": "\\" * 99 + "[" * 200,
        "extra": [[]] * 200,
    }
    assert decode_server_message(ujson.dumps(frame))


@pytest.mark.parametrize("unit", ['"', '\\"', "[", "{", '["', "\\"])
def test_a_megabyte_of_anything_ends_quickly(unit: str) -> None:
    # The suite's own timeout is what fails if reading is quadratic.
    frame = '{"type":"Error","code":"' + unit * (900_000 // len(unit))
    with pytest.raises(RemoteProtocolError):
        decode_server_message(frame)


def test_unknown_types_are_no_fault() -> None:
    name = "x" * 100
    assert decode_server_message('{"type":"Lease"}') == UnknownMessage("Lease")
    assert decode_server_message(f'{{"type":"{name}"}}') == UnknownMessage("x" * 64)
    # Each side knows only what the other says.
    assert decode_client_message('{"type":"NoWork","retry_after_ms":1}') == UnknownMessage("NoWork")


def test_unknown_fields_are_ignored() -> None:
    frame = '{"type":"ResultAck","block_id":"b","accepted":true,"error":null,"lease":{"x":[1]}}'
    assert decode_server_message(frame) == ResultAck(block_id="b", accepted=True)


def test_another_major_version_is_seen_before_anything_else() -> None:
    frame = '{"type":7,"version":{"major":2,"minor":1,"patch":"x"}}'
    assert decode_server_message(frame) == ForeignVersion("2.1.?")
    assert decode_client_message(frame) == ForeignVersion("2.1.?")


def test_a_higher_minor_version_is_fine() -> None:
    frame = '{"type":"NoWork","retry_after_ms":1,"version":{"major":1,"minor":9,"patch":9}}'
    message = decode_server_message(frame)
    assert isinstance(message, Message)
    assert str(message.version) == "1.9.9"


@pytest.mark.parametrize(
    ("change", "kind", "path"),
    [
        ({"task_type": "PAINTING"}, UnsupportedTask, "task type"),
        ({"task_type": 7}, BadRequest, "Assignment.task_type: "),
        ({"input": "a secret"}, BadRequest, "Assignment.input: "),
        ({"input": ["a secret"]}, BadRequest, "Assignment.input: "),
        ({"deadline": "tomorrow"}, BadRequest, "Assignment.deadline: "),
        ({"deadline": 7}, BadRequest, "Assignment.deadline: "),
        ({"deadline": None}, BadRequest, "Assignment.deadline: "),
        ({"model_id": None}, BadRequest, "Assignment.model_id: "),
        ({"task_type": "PAINTING", "deadline": "tomorrow"}, BadRequest, "Assignment."),
        ({"input": {"prompt": "a secret \ud800"}}, BadRequest, "frame.input.prompt: "),
        ({"input": {"prompt": "a secret", "x": float("inf")}}, BadRequest, "frame.input.x: "),
    ],
)
def test_an_unreadable_assignment_can_be_answered(
    change: dict[str, Any], kind: type[Exception], path: str
) -> None:
    unfit = decode_server_message(ujson.dumps(ASSIGNMENT | change))
    assert isinstance(unfit, UnfitAssignment)
    assert unfit.block_id == "b-1"
    assert type(unfit.error) is kind
    assert path in str(unfit.error)
    assert "secret" not in str(unfit.error)


def test_known_tasks_that_are_not_offered_are_well_formed() -> None:
    message = decode_server_message(ujson.dumps(ASSIGNMENT | {"task_type": "WEB_CRAWL"}))
    assert isinstance(message, Assignment)


def test_what_json_cannot_hold_is_our_fault() -> None:
    with pytest.raises(LocalProtocolError):
        encode(Assignment.model_validate(ASSIGNMENT | {"input": {"x": "\ud800"}}))
    with pytest.raises(LocalProtocolError):
        encode(Assignment.model_validate(ASSIGNMENT | {"input": {"x": object()}}))


def test_a_number_that_is_not_finite_is_written_as_null() -> None:
    frame = encode(Assignment.model_validate(ASSIGNMENT | {"input": {"x": float("nan")}}))
    assert ujson.loads(frame)["input"] == {"x": None}


def test_describing_never_repeats_a_value() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True)

        count: int

    with pytest.raises(ValidationError) as caught:
        Strict.model_validate({"count": "a secret"})
    assert describe_invalid(caught.value, "x") == "x.count: Input should be a valid integer"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["Assignment", "Registered", "TEXT_COMPLETION", "b-1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "block_id", "version", "major", "input", "status", "Working"])
            | st.text(max_size=4),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(frame=st.text() | st.binary() | JSON.map(ujson.dumps))
def test_nothing_but_a_remote_fault_comes_out(frame: str | bytes) -> None:
    for decode in (decode_client_message, decode_server_message):
        with contextlib.suppress(RemoteProtocolError):
            decode(frame)


@settings(max_examples=300)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_nothing_else_comes_out_of_damaged_golden_frames(name: str, data: st.DataObject) -> None:
    raw = bytearray((GOLDEN / f"{name}.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
    with contextlib.suppress(RemoteProtocolError):
        decoder(name)(bytes(raw))


@given(name=st.sampled_from(NAMES), data=st.data())
def test_nothing_else_comes_out_when_a_field_is_replaced(name: str, data: st.DataObject) -> None:
    frame = ujson.loads((GOLDEN / f"{name}.json").read_text())
    holder: Any = frame
    while True:
        key = data.draw(st.sampled_from(sorted(holder)))
        if isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans()):
            holder = holder[key]
            continue
        break
    holder[key] = data.draw(JSON)
    with contextlib.suppress(RemoteProtocolError):
        decoder(name)(ujson.dumps(frame))
