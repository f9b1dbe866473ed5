"""How well each way to compare labels classifies, on the texts of fixtures/classification.jsonl.

Every way starts from the same scores: log-likelihoods of the labels after the text and after texts
without content. The texts marked ``held_out`` were written after the prompt had been chosen on the
others.

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

from ai4all.backend.base import EngineOptions, InferenceBackend, LabelScores
from ai4all.backend.registry import open_backend
from ai4all.tasks.classification import CONTENT_FREE, gains, score_request
from ai4all.types.model import ModelFile

TEXTS = Path(__file__).resolve().parents[1] / "fixtures" / "classification.jsonl"


@dataclass(frozen=True)
class Scored:
    """A text's labels with their scores."""

    labels: list[str]
    expected: list[str]
    held_out: bool
    several: bool
    after_text: LabelScores
    after_nothing: tuple[LabelScores, ...]

    def by_token(self, values: Sequence[float]) -> list[float]:
        return [v / n for v, n in zip(values, self.after_text.token_counts, strict=True)]

    def over(self, *priors: LabelScores) -> list[float]:
        columns = zip(*(prior.log_likelihoods for prior in priors), strict=True)
        return gains(self.after_text.log_likelihoods, [sum(c) / len(priors) for c in columns])


WAYS: dict[str, Callable[[Scored], Sequence[float]]] = {
    "likelihood": lambda s: s.after_text.log_likelihoods,
    "likelihood by token": lambda s: s.by_token(s.after_text.log_likelihoods),
    f"gain over {CONTENT_FREE[0]!r}": lambda s: s.over(s.after_nothing[0]),
    f"gain over {CONTENT_FREE[1]!r}": lambda s: s.over(s.after_nothing[1]),
    "gain over both (used)": lambda s: s.over(*s.after_nothing),
    "gain over both by token": lambda s: s.by_token(s.over(*s.after_nothing)),
}


async def score(backend: InferenceBackend, rows: list[dict[str, Any]]) -> list[Scored]:
    """Score every text; the texts without content once for each set of labels."""
    priors: dict[tuple[str, ...], tuple[LabelScores, ...]] = {}
    scored = []
    for row in rows:
        labels = tuple(row["labels"])
        if labels not in priors:
            found = [await backend.score_labels(score_request(t, labels)) for t in CONTENT_FREE]
            priors[labels] = tuple(found)
        scored.append(
            Scored(
                labels=list(labels),
                expected=row["expected"],
                held_out=row.get("held_out", False),
                several=row["set"] == "several",
                after_text=await backend.score_labels(score_request(row["text"], labels)),
                after_nothing=priors[labels],
            )
        )
    return scored


def right(way: Callable[[Scored], Sequence[float]], texts: list[Scored]) -> str:
    """Texts whose best label is the right one."""
    hits = 0
    for text in texts:
        values = way(text)
        hits += text.labels[values.index(max(values))] in text.expected
    return f"{hits}/{len(texts)}"


def ranked(way: Callable[[Scored], Sequence[float]], texts: list[Scored]) -> str:
    """Right labels among the best, as many of these as there are right ones."""
    hits = total = 0
    for text in texts:
        values = way(text)
        order = sorted(range(len(values)), key=lambda at: -values[at])[: len(text.expected)]
        hits += sum(text.labels[at] in text.expected for at in order)
        total += len(text.expected)
    return f"{hits}/{total}"


def decided(way: Callable[[Scored], Sequence[float]], texts: list[Scored]) -> str:
    """Labels on the right side of one half, when each is judged by itself."""
    hits = total = 0
    for text in texts:
        for label, value in zip(text.labels, way(text), strict=True):
            hits += (value > 0.0) == (label in text.expected)
            total += 1
    return f"{hits}/{total}"


async def scores_by(file: ModelFile, rows: list[dict[str, Any]]) -> list[Scored]:
    """Score with a model of its own."""
    async with open_backend() as backend:
        await backend.load(file, EngineOptions(n_ctx=1024))
        return await score(backend, rows)


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
    scored = asyncio.run(scores_by(file, rows))

    one = [text for text in scored if not text.several]
    columns = {
        "one label": lambda way: right(way, [text for text in one if not text.held_out]),
        "held out": lambda way: right(way, [text for text in one if text.held_out]),
        "several: ranked": lambda way: ranked(way, [text for text in scored if text.several]),
        "several: decided": lambda way: decided(way, [text for text in scored if text.several]),
    }
    table = Table("compared by", *columns, title=f"{path.name} {digest[:8]}")
    for name, way in WAYS.items():
        table.add_row(name, *(count(way) for count in columns.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
