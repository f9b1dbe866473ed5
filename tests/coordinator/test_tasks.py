from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ai4all.coordinator.tasks import TaskSpec, named, read_tasks
from ai4all.errors import ConfigError
from ai4all.types.task import TaskType


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_tasks_are_read_with_their_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl",
        '{"input": {"prompt": "Hello"}}\n'
        "\n"
        '{"block_id": "x", "task_type": "EMBEDDINGS", "input": {"texts": ["a\u2028b"]},'
        ' "model_id": "m", "deadline_ms": 5, "deadline": "2030-03-17T17:46:40.123456789Z"}\n',
    )
    first, second = read_tasks(path)
    assert first.task_type is TaskType.TEXT_COMPLETION
    assert first.model_id == "benchmark"
    assert first.block_id is not None
    assert first.block_id.startswith("b-1-")
    assert second == TaskSpec(
        block_id="x",
        task_type=TaskType.EMBEDDINGS,
        input={"texts": ["a\u2028b"]},
        model_id="m",
        deadline_ms=5,
        deadline=datetime(2030, 3, 17, 17, 46, 40, 123456, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "JSON object"),
        ('{"input": {}}', r"input\.prompt"),
        ('{"input": {"prompt": "x", "max_tokens": 0}}', r"input\.max_tokens"),
        ('{"task_type": "SUMMARIZATION", "input": {"text": "x", "style": "loud"}}', "style"),
        ('{"task_type": "JUGGLING", "input": {}}', "task_type"),
        ('{"input": {"prompt": "x"}, "deadline_ms": -1}', "deadline_ms"),
        ('{"input": {"prompt": "x"}, "deadline": "tomorrow"}', "deadline"),
        ('{"input": {"prompt": "x"}, "colour": 1}', "colour"),
        ('{"input": {"prompt": "x"}, "block_id": ""}', "block_id"),
        ('{"block_id": "a", "input": {"prompt": "x"}}', "same as in line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: str, field: str) -> None:
    path = write(
        tmp_path / "tasks.jsonl", '{"block_id": "a", "input": {"prompt": "x"}}\n' + line + "\n"
    )
    with pytest.raises(ConfigError, match=field) as caught:
        read_tasks(path)
    assert str(caught.value).endswith("tasks.jsonl, line 2)")


def test_a_file_without_tasks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task"):
        read_tasks(write(tmp_path / "empty.jsonl", "\n \n"))
    with pytest.raises(ConfigError, match="No such file"):
        read_tasks(tmp_path / "absent.jsonl")
    (tmp_path / "latin").write_bytes(b'{"input": {"prompt": "\xe9"}}')
    with pytest.raises(ConfigError, match="UTF-8"):
        read_tasks(tmp_path / "latin")


def test_names_are_the_same_every_time_and_change_with_the_content() -> None:
    def name(prompt: str) -> str | None:
        return named([TaskSpec(input={"prompt": prompt})])[0].block_id

    assert name("x") == name("x")
    assert name("x") != name("y")


def test_a_deadline_needs_an_offset() -> None:
    with pytest.raises(ValueError, match="offset"):
        TaskSpec(input={}, deadline=datetime(2030, 1, 1))
