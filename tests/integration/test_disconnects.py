"""The short form of ``tests/disconnects.py``: links that are cut at any byte, in every way."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_links import cut_again_and_again
from chaos_proxy import Blow


@pytest.mark.parametrize("strict_seed", [False, True])
async def test_links_that_are_cut_at_any_byte_lose_and_repeat_nothing(
    tmp_path: Path, strict_seed: bool
) -> None:
    found = await cut_again_and_again(
        tmp_path,
        blocks=40,
        disconnects=20,
        seed=int(strict_seed),
        strict_seed=strict_seed,
        patience=0.2,
    )
    assert found.disconnects >= 20
    assert found.blocks >= 40
    assert (found.lost, found.accepted_twice, found.recomputed) == (0, 0, 0)
    assert found.refused == 0
    assert found.violations == []
    assert found.left == 0


@pytest.mark.parametrize("blow", list(Blow))
async def test_each_blow_by_itself(tmp_path: Path, blow: Blow) -> None:
    found = await cut_again_and_again(
        tmp_path, blocks=6, disconnects=3, seed=7, blows=(blow,), patience=0.2
    )
    assert found.blows[blow] >= 3
    assert (found.lost, found.accepted_twice, found.recomputed, found.left) == (0, 0, 0, 0)
