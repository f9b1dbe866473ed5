from __future__ import annotations

import io
from itertools import count
from pathlib import Path

import pytest
from compare import Row, Side, alternate, duration, judge, rows_of, slower, table_of
from rich.console import Console

HERE = Path()
SIDES = (Side("main", "a" * 40, HERE, HERE), Side("topic", "b" * 40, HERE, HERE))


def test_only_what_both_have_is_compared() -> None:
    rows = rows_of([({"x": 1.0, "gone": 1.0}, {"x": 2.0, "new": 1.0}), ({"x": 1.0}, {"x": 2.2})])
    assert rows == [Row("x", (1.0, 1.0), (2.0, 2.2))]
    assert rows[0].ratio == pytest.approx(2.1)


def test_one_bad_round_does_not_decide() -> None:
    row = Row("x", (1.0, 1.0, 1.0), (1.0, 9.0, 1.02))
    assert row.ratio == pytest.approx(1.02)
    assert slower([row], 10) == []


def test_the_threshold_is_in_percent_and_lets_its_own_value_pass() -> None:
    rows = [Row("x", (1.0,), (1.25,)), Row("y", (1.0,), (1.26,)), Row("z", (2.0,), (1.0,))]
    assert [row.bench for row in slower(rows, 25)] == ["y"]


def test_rounds_alternate_their_order() -> None:
    order: list[str] = []

    def measured(side: Side) -> dict[str, float]:
        order.append(side.name)
        return {"x": 1.0 if side.name == "main" else 2.0}

    (row,) = alternate(SIDES, 3, measured)
    assert order == ["main", "topic", "topic", "main", "main", "topic"]
    assert (row.base, row.head) == ((1.0,) * 3, (2.0,) * 3)


class TestASecondLook:
    def run(self, *heads: float) -> tuple[list[Row], list[Row], list[list[str]]]:
        """Judge with one round; head's figure is taken from ``heads`` in turn."""
        asked: list[list[str]] = []
        number = count()

        def measured(side: Side, selection: list[str]) -> dict[str, float]:
            if side.name == "main":
                return {"bench/b.py::test_a[1]": 1.0, "bench/b.py::test_b": 1.0}
            asked.append(selection)
            value = heads[min(next(number), len(heads) - 1)]
            return {"bench/b.py::test_a[1]": value, "bench/b.py::test_b": 1.0}

        rows, worse = judge(SIDES, 1, 10, measured, ["-k", "all"])
        return rows, worse, asked

    def test_is_not_taken_without_need(self) -> None:
        rows, worse, asked = self.run(1.05)
        assert (len(rows), worse, asked) == (2, [], [["-k", "all"]])

    def test_clears_what_was_noise(self) -> None:
        rows, worse, asked = self.run(3.0, 1.0)
        assert worse == []
        assert asked == [["-k", "all"], ["-k", "test_a"], ["-k", "test_a"]]
        assert max(row.ratio for row in rows) == 1.0

    def test_confirms_what_is_slower(self) -> None:
        _, worse, _ = self.run(3.0, 2.0)
        assert [(row.bench, row.ratio) for row in worse] == [("bench/b.py::test_a[1]", 2.0)]


def test_what_a_person_sees() -> None:
    rows = [
        Row("bench/b.py::test_fast", (2e-6,), (1e-6,)),
        Row("bench/b.py::test_slow", (0.1,), (0.2,)),
    ]
    out = io.StringIO()
    Console(file=out, width=100).print(table_of(rows, SIDES, 10))
    text = out.getvalue()
    assert "head bbbbbbbbbbbb over base aaaaaaaaaaaa" in text
    assert text.index("test_slow") < text.index("test_fast")
    assert "2.000" in text
    assert "0.500" in text
    assert [duration(value) for value in (2.0, 0.0021, 3.4e-6, 5e-9)] == [
        "2 s",
        "2.1 ms",
        "3.4 µs",
        "5 ns",
    ]
