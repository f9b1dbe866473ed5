from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import ujson

from ai4all.backend.crash_records import (
    CrashRecord,
    CrashRecords,
    assertion_in,
    fault_in,
    signal_name,
)

RECORD = CrashRecord(
    time="2026-01-02T03:04:05.678901+00:00",
    kind="crashed",
    state="decode",
    signal="SIGABRT",
    exit_status=None,
    assertion="ggml.c:12: GGML_ASSERT(x) failed",
    fault=None,
    problem=None,
    model_sha256="a" * 64,
    engine_build="llama.cpp 0 cpu",
    options={"n_ctx": 512},
    seconds=None,
    process_id=77,
)


def test_a_record_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "crashes"
    name = CrashRecords(folder).add(RECORD)
    assert name == "crash-20260102T030405678901-77.json"
    file = folder / name
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    content = ujson.loads(file.read_text())
    assert content["assertion"] == RECORD.assertion
    assert content["options"] == {"n_ctx": 512}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    records = CrashRecords(tmp_path, keep=3)
    names = [
        records.add(replace(RECORD, time=f"2026-01-02T03:04:{second:02d}+00:00"))
        for second in range(10)
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == names[-3:]


def test_without_a_folder_nothing_is_kept() -> None:
    assert CrashRecords(None).add(RECORD) is None


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        CrashRecords(tmp_path / "file" / "crashes").add(RECORD)


def test_the_last_assertion_is_found_among_other_lines() -> None:
    stderr = (
        "parse: error parsing grammar: SECRET PROMPT\n"
        "ai4all engine aborted: a.cpp:1: GGML_ASSERT(one) failed\n"
        "ai4all engine aborted: b.cpp:2: GGML_ASSERT(two) failed\n"
        "Fatal Python error: Aborted\n\n"
        "Current thread 0x00007f (most recent call first):\n"
    )
    assert assertion_in(stderr) == "b.cpp:2: GGML_ASSERT(two) failed"
    assert fault_in(stderr) == "Fatal Python error: Aborted"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("/home/x y/build/ggml/src/ggml.c:12: fatal error", "ggml.c:12: fatal error"),
        (
            "/x/ggml.c:12: GGML_ASSERT(a / b == 1) failed",
            "ggml.c:12: GGML_ASSERT(a / b == 1) failed",
        ),
        ("../src/models/llama.cpp:7: f(a/b.c:1: x)", "llama.cpp:7: f(a/b.c:1: x)"),
        ("fatal error in /dev/null", "fatal error in /dev/null"),
    ],
)
def test_an_assertion_does_not_tell_where_the_engine_was_built(written: str, kept: str) -> None:
    assert assertion_in(f"ai4all engine aborted: {written}\n") == kept


@pytest.mark.parametrize(
    "line",
    [
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "free(): invalid pointer",
        "double free or corruption (out)",
        "*** stack smashing detected ***: terminated",
        "==12==ERROR: AddressSanitizer: heap-buffer-overflow",
    ],
)
def test_the_last_words_of_run_time_libraries_are_found(line: str) -> None:
    assert fault_in(f"something else\n{line}\n") == line


def test_other_lines_are_not_taken() -> None:
    stderr = "ValueError: the prompt was: SECRET\nsomebody said: aborted\n"
    assert assertion_in(stderr) is None
    assert fault_in(stderr) is None


def test_signal_names() -> None:
    assert signal_name(11) == "SIGSEGV"
    assert signal_name(200) == "signal 200"
