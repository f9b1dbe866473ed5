from __future__ import annotations

import io
from pathlib import Path

from drafting import file_of, measure, row_of, table, ways_of
from peers_prompts import Prompt
from rich.console import Console
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.backend.base import EngineOptions

PROMPTS = [Prompt("Hello, world!", "Be brief."), Prompt("They have", "Be brief.")]


async def test_the_ways_are_compared_with_plain_decoding(tiny_model: Path, tmp_path: Path) -> None:
    target = file_of(write_tiny_gguf(tmp_path / "target.gguf", weight_type=Q8_0))
    ways = ways_of(EngineOptions(n_ctx=512, threads=1), file_of(tiny_model), fixed=4)
    assert [way.name for way in ways] == ["plain", "lookup", "draft model", "draft model, always 4"]
    steps: list[None] = []
    answers = await measure(
        target,
        ways,
        PROMPTS,
        tokens=24,
        rounds=2,
        advance=lambda: steps.append(None),
    )
    assert len(steps) == 2 * 4 * 2
    # Each prompt in each round, and medians count.
    assert all(len(answer.rates) == 2 for its_answers in answers for answer in its_answers)
    answers[0][0].rates = answers[0][1].rates = [10.0, 30.0, 20.0]
    answers[1][0].rates = answers[1][1].rates = [10.0, 99.0, 30.0]
    rows = [row_of("all", way, its, answers[0]) for way, its in zip(ways, answers, strict=True)]
    plain, lookup, _, always = rows
    assert (plain.ratio, plain.drafted, plain.identical) == (1.0, 0, 2)
    assert (lookup.tokens_per_second, lookup.ratio, lookup.by_model) == (30.0, 1.5, 0)
    assert always.by_model > 20
    assert 0 < always.accepted <= always.drafted
    assert all(row.identical == row.prompts == 2 for row in rows)
    out = io.StringIO()
    Console(file=out, width=120).print(table(rows, "title"))
    assert "2 of 2" in out.getvalue()
