from __future__ import annotations

import pytest
from builds import ratios, turns


def test_the_two_take_turns() -> None:
    assert turns(3) == [0, 1, 1, 0, 0, 1]


def test_ratios_are_of_medians_and_below_one_is_slower() -> None:
    def runs(*rates: float) -> list[dict[str, float]]:
        return [{"prompt_tokens_per_second": 10 * r, "decode_tokens_per_second": r} for r in rates]

    found = ratios((runs(100, 1, 100), runs(97, 97, 500)))
    assert found["decode_tokens_per_second"] == pytest.approx(0.97)
    assert found["prompt_tokens_per_second"] == pytest.approx(0.97)
