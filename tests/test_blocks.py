from __future__ import annotations

from pathlib import Path

import pytest

from ai4all.blocks import as_compute_error
from ai4all.errors import (
    Ai4allError,
    DataDirectoryError,
    InvalidModelFile,
    ModelChecksumMismatch,
    ModelSourceError,
)
from ai4all.types.task import ErrorCode

HOME = "/home/planted-owner/models"


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (InvalidModelFile(Path(HOME, "m.gguf"), "is cut short"), "load_failed", "is cut short"),
        (ModelChecksumMismatch(f"{HOME}/m.gguf", "a" * 64, "b" * 64), "load_failed", "b" * 64),
        (ModelSourceError(f"file:{HOME}/m.gguf", "is absent"), "load_failed", "ModelSourceError"),
        (DataDirectoryError(HOME, "the disk is full"), "engine_crashed", "DataDirectoryError"),
        (FileNotFoundError(2, "No such file", HOME), "engine_crashed", "FileNotFoundError"),
    ],
)
def test_no_path_of_the_machine_goes_into_an_answer(
    error: Ai4allError | OSError, code: str, part: str
) -> None:
    answer = as_compute_error(error)
    assert answer.code is ErrorCode(code)
    assert part in answer.info().message
    assert HOME in str(error)
    assert "planted-owner" not in answer.info().model_dump_json()
