"""How well each way to score labels classifies, on the texts of fixtures/classification.jsonl.

A way is what the model reads, and what is compared: the log-likelihoods themselves, or their gain
over texts without content, by label or by token. The texts marked ``held_out`` were written after
the way in use had been chosen on the others.

Usage: python bench/label_accuracy.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ujson
from rich.console import Console
from rich.table import Table

from ai4all.backend.base import EngineOptions, InferenceBackend, ScoreRequest
from ai4all.backend.registry import open_backend
from ai4all.tasks.classification import CONTENT_FREE, gains, score_request
from ai4all.types.model import ModelFile

TEXTS = Path(__file__).resolve().parents[1] / "fixtures" / "classification.jsonl"


def listed(text: str, labels: Sequence[str]) -> ScoreRequest:
    """Ask a chat model to choose from a list."""
    names = ", ".join(labels)
    return ScoreRequest(
        system_prompt=f"Classify the text. Answer with one of these labels and no more: {names}.",
        prompt=f"Text: {text}\nLabel:",
        continuations=tuple(labels),
    )


def yes_or_no(text: str, labels: Sequence[str]) -> ScoreRequest:
    """Ask for each label whether it fits."""
    return ScoreRequest(
        prompt=f"Text: {text}\nIs the text about",
        continuations=tuple(f" {label}? {word}" for label in labels for word in ("Yes", "No")),
    )


READINGS: dict[str, Callable[[str, Sequence[str]], ScoreRequest]] = {
    "label after the text": score_request,
    "chosen from a list": listed,
    "yes or no": yes_or_no,
}
COMPARED = ("likelihood", "likelihood by token", "gain", "gain by token")
IN_USE = ("label after the text", "gain")


@dataclass(frozen=True)
class Scored:
    """A text's labels with what each comparison says of them."""

    labels: list[str]
    expected: list[str]
    held_out: bool
    several: bool
    values: dict[str, list[float]]


class Reader:
    """Scores texts in one way; the texts without content once for each set of labels."""

    def __init__(
        self, backend: InferenceBackend, request: Callable[[str, Sequence[str]], ScoreRequest]
    ) -> None:
        self._backend = backend
        self._request = request
        self._priors: dict[tuple[str, ...], list[float]] = {}

    async def read(self, row: dict[str, Any]) -> Scored:
        """Score one text."""
        labels = tuple(row["labels"])
        if labels not in self._priors:
            found = [(await self._scores(text, labels))[0] for text in CONTENT_FREE]
            self._priors[labels] = [sum(column) / len(found) for column in zip(*found, strict=True)]
        likelihoods, tokens = await self._scores(row["text"], labels)
        gained = gains(likelihoods, self._priors[labels])
        return Scored(
            labels=list(labels),
            expected=row["expected"],
            held_out=row.get("held_out", False),
            several=row["set"] == "several",
            values={
                "likelihood": likelihoods,
                "likelihood by token": [v / n for v, n in zip(likelihoods, tokens, strict=True)],
                "gain": gained,
                "gain by token": [v / n for v, n in zip(gained, tokens, strict=True)],
            },
        )

    async def _scores(self, text: str, labels: Sequence[str]) -> tuple[list[float], list[int]]:
        found = await self._backend.score_labels(self._request(text, labels))
        values, counts = list(found.log_likelihoods), list(found.token_counts)
        if len(values) == 2 * len(labels):
            values = [yes - no for yes, no in zip(values[::2], values[1::2], strict=True)]
            counts = counts[::2]
        return values, counts


def right(compared: str, texts: list[Scored]) -> str:
    """Texts whose best label is the right one."""
    hits = 0
    for text in texts:
        values = text.values[compared]
        hits += text.labels[values.index(max(values))] in text.expected
    return f"{hits}/{len(texts)}"


def ranked(compared: str, texts: list[Scored]) -> str:
    """Right labels among the best, as many of these as there are right ones."""
    hits = total = 0
    for text in texts:
        values = text.values[compared]
        order = sorted(range(len(values)), key=lambda at: -values[at])[: len(text.expected)]
        hits += sum(text.labels[at] in text.expected for at in order)
        total += len(text.expected)
    return f"{hits}/{total}"


def decided(compared: str, texts: list[Scored]) -> str:
    """Labels on the right side of one half, when each is judged by itself."""
    hits = total = 0
    for text in texts:
        for label, value in zip(text.labels, text.values[compared], strict=True):
            hits += (value > 0.0) == (label in text.expected)
            total += 1
    return f"{hits}/{total}"


async def read_all(file: ModelFile, rows: list[dict[str, Any]]) -> dict[str, list[Scored]]:
    """Score every text in every way."""
    async with open_backend() as backend:
        await backend.load(file, EngineOptions(n_ctx=1024))
        readers = {name: Reader(backend, request) for name, request in READINGS.items()}
        return {name: [await reader.read(row) for row in rows] for name, reader in readers.items()}


def main() -> None:
    """Score, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    path: Path = parser.parse_args().model
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [ujson.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    file = ModelFile("model", path, digest, path.stat().st_size)

    table = Table("read", "compared", title=f"{path.name} {digest[:8]}")
    for column in ("one label", "held out", "several: ranked", "several: decided"):
        table.add_column(column, justify="right")
    for name, scored in asyncio.run(read_all(file, rows)).items():
        one = [text for text in scored if not text.several]
        several = [text for text in scored if text.several]
        for compared in COMPARED:
            table.add_row(
                name,
                compared,
                right(compared, [text for text in one if not text.held_out]),
                right(compared, [text for text in one if text.held_out]),
                ranked(compared, several),
                decided(compared, several),
                style="bold" if (name, compared) == IN_USE else None,
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
