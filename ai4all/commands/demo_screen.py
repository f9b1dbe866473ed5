"""What a demonstration shows while it runs, and the table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ai4all.benchmark.scores import BenchmarkResult
from ai4all.types.task import TaskResult, TextCompletionOutput, Usage
from ai4all.worker_events import (
    BlockAcknowledged,
    BlockFinished,
    BlockStarted,
    BlockText,
    Degraded,
    LinkDown,
    LinkUp,
    WorkerEvent,
)

__all__ = ["DemoScreen"]


@dataclass(slots=True)
class DemoScreen:
    """Shows a worker's events as they come.

    Attributes:
        console: Where to.
        prompts: The prompt of each block, by id.
        finished: Results so far, by block id, in the order in which they came.
        accepted: What the coordinator said to each.
    """

    console: Console
    prompts: Mapping[str, str]
    finished: dict[str, TaskResult] = field(default_factory=dict)
    accepted: dict[str, bool] = field(default_factory=dict)

    def show(self, event: WorkerEvent) -> None:
        """Take one event of the worker."""
        match event:
            case LinkUp(session_id):
                self._say(f"registered with the coordinator, session {session_id}")
            case LinkDown(reason):
                self._say(f"\nlink closed: {reason}")
            case Degraded(reason, _):
                self._say(f"\ndegraded: {reason}", style="yellow")
            case BlockStarted(block_id, task_type, model_id):
                self._say(f"\n{block_id}: {task_type} with model {model_id}", style="bold")
                self._say(self.prompts.get(block_id, ""), style="dim")
            case BlockText(_, text):
                # A model's text is shown as it is: brackets in it are no markup.
                self.console.print(text, end="", markup=False, soft_wrap=True)
            case BlockFinished(block_id, result):
                self.finished[block_id] = result
                self._say("")
                self._say(_figures(result), style="green" if result.success else "red")
            case BlockAcknowledged(block_id, accepted, error):
                self.accepted[block_id] = accepted
                if not accepted:
                    self._say(f"{block_id} was refused: {error}", style="red")

    def print_benchmark(self, benchmark: BenchmarkResult) -> None:
        """Print what this machine registers with."""
        scores = benchmark.scores
        self._say(
            f"benchmark: {scores.tokens_per_second:.1f} tok/s, first token after "
            f"{scores.time_to_first_token_ms:.1f} ms, composite {scores.composite:.2f}"
        )

    def print_table(self) -> None:
        """Print one row for each block."""
        table = Table(title="Blocks, times in ms")
        table.add_column("block")
        table.add_column("accepted")
        for heading in ("in", "out", "queue", "load", "prompt", "first token", "total", "tok/s"):
            table.add_column(heading, justify="right")
        for block_id, result in self.finished.items():
            metrics, usage = result.metrics, _usage(result)
            table.add_row(
                block_id,
                "yes" if self.accepted.get(block_id) else "no",
                "-" if usage is None else str(usage.prompt_tokens),
                "-" if usage is None else str(usage.completion_tokens),
                _figure(metrics.queue_time_ms),
                _figure(metrics.load_time_ms),
                _figure(metrics.prompt_time_ms),
                _figure(metrics.time_to_first_token_ms),
                _figure(metrics.total_time_ms),
                _figure(metrics.tokens_per_second),
            )
        self.console.print(table)

    def _say(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, markup=False, soft_wrap=True)


def _figures(result: TaskResult) -> str:
    if result.error is not None:
        return f"failed: {result.error.code.value}: {result.error.message}"
    parts = []
    usage = _usage(result)
    if usage is not None:
        parts.append(f"{usage.completion_tokens} tokens")
    if result.metrics.time_to_first_token_ms is not None:
        parts.append(f"first token after {result.metrics.time_to_first_token_ms:.1f} ms")
    if result.metrics.tokens_per_second is not None:
        parts.append(f"{result.metrics.tokens_per_second:.1f} tok/s")
    return ", ".join(parts)


def _usage(result: TaskResult) -> Usage | None:
    return result.output.usage if isinstance(result.output, TextCompletionOutput) else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
