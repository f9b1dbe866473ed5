from __future__ import annotations

import io
from pathlib import Path

import pytest
from reproducibility import (
    QUICK_PROMPTS,
    Row,
    Setting,
    document,
    first_difference,
    measure,
    same_prompts,
    settings_of,
    table,
)
from rich.console import Console
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import EngineOptions

BASE = EngineOptions(n_ctx=512, threads=1)


def row(axis: str, *answers: tuple[int, ...]) -> Row:
    return Row(Setting(axis, "x", BASE), answers, 0, 0)


def test_a_row_is_compared_prompt_by_prompt() -> None:
    first = row("baseline", (1, 2, 3), (4, 5, 6))
    other = row("threads", (1, 2, 3), (4, 9, 6))
    assert (same_prompts(first, first), first_difference(first, first)) == (2, None)
    assert (same_prompts(other, first), first_difference(other, first)) == (1, 1)
    assert other.sha256 != first.sha256
    (_, told) = document([first, other])
    assert (told["identical_prompts"], told["prompts"], told["first_difference"]) == (1, 2, 1)
    out = io.StringIO()
    Console(file=out, width=120).print(table([first, other], "title"))
    assert "no, 1 of 2" in out.getvalue()


def test_each_row_changes_one_thing() -> None:
    rows = settings_of(BASE, {"Q8_0": Path("q8.gguf")}, quick=False)
    axes = {row.axis for row in rows}
    assert {"threads", "ubatch", "batch", "neighbours", "prefix reuse", "flash attention"} <= axes
    assert {"format", "deterministic", "speculation"} <= axes
    assert rows[0].options == rows[1].options == BASE
    for setting in rows[2:]:
        if setting.axis in ("threads", "ubatch", "batch", "mmap", "flash attention", "KV cache"):
            assert setting.options != BASE
            assert not setting.neighbours
            assert not setting.reuse_prefix


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("other") / "other.gguf", seed=5)


async def test_the_matrix_is_measured(tiny_model: Path, other: Path) -> None:
    wanted = {"baseline", "again", "neighbours", "prefix reuse", "deterministic", "format"}
    settings = [
        setting
        for setting in settings_of(BASE, {"another model": other}, quick=True)
        if setting.axis in wanted
    ]
    rows = await measure(tiny_model, settings, QUICK_PROMPTS, 8)
    by_axis = {(row.setting.axis, row.setting.value): row for row in rows}
    first = by_axis[settings[0].axis, settings[0].value]
    assert by_axis["again", "the same"].sha256 == first.sha256
    assert by_axis["neighbours", "3"].batched_with == 3
    # The conditions that a row names were really met, and those that switch off did.
    assert by_axis["prefix reuse", "on"].reused > 0 == first.reused
    disturbed = by_axis["deterministic", "3 neighbours, reuse asked for"]
    assert (disturbed.reused, disturbed.batched_with) == (0, 0)
    assert disturbed.sha256 == by_axis["deterministic", "alone"].sha256
    assert by_axis["format", "another model"].sha256 != first.sha256
