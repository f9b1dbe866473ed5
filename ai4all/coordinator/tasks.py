"""What there is to do: one JSON object a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

import ujson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ai4all.errors import ConfigError
from ai4all.protocol.codec import describe_invalid
from ai4all.protocol.messages import parse_timestamp
from ai4all.types.task import INPUT_MODELS, TaskType

__all__ = ["TaskSpec", "name", "named", "read_tasks"]


def _task_type(value: object) -> object:
    return TaskType(value) if isinstance(value, str) and value in set(TaskType) else value


def _instant(value: object) -> object:
    return parse_timestamp(value) if isinstance(value, str) else value


class TaskSpec(BaseModel):
    """One task.

    Attributes:
        block_id: Its name; made from its place and content when it has none.
        task_type: What to do.
        input: What to do it with. A worker checks it.
        model_id: Which model to use.
        deadline_ms: Time that a worker gets for it, from its assignment.
        deadline: When nobody wants the result any more, whoever works on it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    block_id: str | None = Field(None, min_length=1, max_length=1024)
    task_type: Annotated[TaskType, BeforeValidator(_task_type)] = TaskType.TEXT_COMPLETION
    input: dict[str, Any]
    model_id: str = Field("benchmark", max_length=1024)
    deadline_ms: int | None = Field(None, ge=1, le=30 * 86_400_000)
    deadline: Annotated[datetime, BeforeValidator(_instant)] | None = None

    @model_validator(mode="after")
    def _aware(self) -> Self:
        if self.deadline is not None and self.deadline.tzinfo is None:
            raise ValueError("the deadline has no offset from UTC")
        return self


def name(spec: TaskSpec, number: int) -> TaskSpec:
    """Give a task without a ``block_id`` one, the same every time.

    It holds a digest of the content, so that a result kept from an earlier run is never taken for
    the result of another task.
    """
    if spec.block_id is not None:
        return spec
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:8]
    return spec.model_copy(update={"block_id": f"b-{number}-{digest}"})


def named(specs: Iterable[TaskSpec]) -> list[TaskSpec]:
    """Name all tasks by their places, counted from 1."""
    return [name(spec, number) for number, spec in enumerate(specs, 1)]


def read_tasks(path: Path) -> list[TaskSpec]:
    """Read a JSON Lines file of tasks. Empty lines do not count.

    Raises:
        ConfigError: The file cannot be read, or a line is not a task; it names line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError("tasks", exc.strerror or str(exc), str(path)) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("tasks", "it is not UTF-8", str(path)) from exc
    tasks: list[TaskSpec] = []
    lines: dict[str, int] = {}
    # Not splitlines: JSON strings may hold separators that are no end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        spec = _read_line(line, f"{path}, line {number}")
        if spec.block_id is not None:
            first = lines.setdefault(spec.block_id, number)
            if first != number:
                raise ConfigError(
                    "block_id", f"the same as in line {first}", f"{path}, line {number}"
                )
        tasks.append(spec)
    if not tasks:
        raise ConfigError("tasks", "there is no task in it", str(path))
    return named(tasks)


def _read_line(line: str, origin: str) -> TaskSpec:
    try:
        data = ujson.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError("", "this is not JSON", origin) from None
    if not isinstance(data, dict):
        raise ConfigError("", "a task must be a JSON object", origin)
    try:
        spec = TaskSpec.model_validate(data)
    except ValidationError as exc:
        raise _bad_field(exc, "task", origin) from None
    model = INPUT_MODELS.get(spec.task_type)
    if model is not None:
        try:
            model.model_validate(spec.input)
        except ValidationError as exc:
            raise _bad_field(exc, "input", origin) from None
    return spec


def _bad_field(exc: ValidationError, root: str, origin: str) -> ConfigError:
    field, _, text = describe_invalid(exc, root).partition(": ")
    return ConfigError(field.removeprefix("task."), text, origin)
