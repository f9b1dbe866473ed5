from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import ujson
from peers_contenders import Hosted, MissingPeer, Sample, Server, Setup, llama_bench
from peers_prompts import EIGHT_PROMPTS, cut, first_token_prompts, prefix_pair
from peers_report import as_json, as_markdown, figure, print_table
from peers_rows import Comparison, Report, Run, eight_at_once, whole_benchmark
from rich.console import Console


def comparison(**changes: object) -> Comparison:
    fields: dict[str, object] = {
        "row": "P1",
        "what": "decode",
        "unit": "tok/s",
        "ours": [100.0, 50.0, 90.0],
        "peer": "llama-server",
        "theirs": [80.0, 100.0, 100.0],
        "goal": 1.0,
        "at_least": True,
    }
    return Comparison(**(fields | changes))  # type: ignore[arg-type]


def run_of(tmp_path: Path, rounds: int = 3) -> Run:
    setup = Setup(model=tmp_path / "absent.gguf", programs=tmp_path, threads=1)
    return Run(setup=setup, fitted=None, rounds=rounds, tokens=4, tell=lambda text: None)


class TestComparison:
    def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians(self) -> None:
        line = comparison(ours=[100.0, 50.0, 90.0], theirs=[80.0, 100.0, 40.0])
        assert line.figures == [1.25, 0.5, 2.25]
        assert line.median == 1.25
        assert statistics.median(line.ours) / statistics.median(line.theirs) == 1.125
        assert comparison().median == 0.9
        assert comparison().met is False

    def test_less_is_better_where_the_goal_says_so(self) -> None:
        line = comparison(at_least=False)
        assert line.met is True

    def test_a_difference_and_a_value(self) -> None:
        line = comparison(how="difference", goal=0.5, at_least=False)
        assert line.figures == [20.0, -50.0, -10.0]
        assert line.met is True
        alone = comparison(how="value", peer="", theirs=[], goal=95.0)
        assert alone.figures == [100.0, 50.0, 90.0]
        assert alone.met is False

    def test_without_a_goal_nothing_is_met_or_missed(self) -> None:
        assert comparison(goal=None).met is None

    def test_rounds_of_different_number_cannot_be_compared(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            _ = comparison(theirs=[1.0]).figures


class TestRun:
    def test_contenders_have_their_turns_round_by_round(self, tmp_path: Path) -> None:
        order: list[tuple[int, str]] = []

        def turn(name: str) -> Callable[[int], float]:
            def measure(number: int) -> float:
                order.append((number, name))
                return float(number)

            return measure

        figures = run_of(tmp_path).take_turns("P1", {name: turn(name) for name in "abc"})
        assert order == [(number, name) for number in range(3) for name in "abc"]
        assert figures == {name: [0.0, 1.0, 2.0] for name in "abc"}

    def test_who_fails_is_out_and_named(self, tmp_path: Path) -> None:
        def fails_late(number: int) -> float:
            if number == 1:
                raise MissingPeer("it ended with status 3")
            return 1.0

        run = run_of(tmp_path)
        figures = run.take_turns("P1", {"a": fails_late, "b": lambda number: 2.0})
        assert figures == {"b": [2.0, 2.0, 2.0]}
        ((row, who, why),) = run.report.missing
        assert (row, who) == ("P1", "a")
        assert "status 3" in why

    def test_a_machine_without_anything_has_rows_of_reasons(self, tmp_path: Path) -> None:
        run = run_of(tmp_path, rounds=1)
        whole_benchmark(run)
        eight_at_once(run)
        assert run.report.comparisons == []
        missing = {(row, who) for row, who, _ in run.report.missing}
        expected = {"ai4all-native", "llama-server", "xllamacpp", "llama-cpp-python"}
        assert {who for row, who in missing if row == "P0"} >= expected
        assert ("P4", "llama-batched-bench") in missing
        assert all(why for _, _, why in run.report.missing)


class TestContenders:
    def test_ours_in_a_process_of_its_own(self, tiny_model: Path, tmp_path: Path) -> None:
        setup = Setup(model=tiny_model, programs=tmp_path, threads=1, n_ctx=256)
        with Hosted("ours", setup, n_slots=8) as ours:
            assert ours.info["device"] == "CPU"
            sample = ours.generate("Hello, world!", 6)
            assert (sample.tokens, len(sample.token_ids)) == (6, 6)
            assert sum(tokens for _, tokens in sample.arrivals) == 6
            # A model this small may be done before anybody looks.
            assert 0.0 < sample.first_s <= sample.last_s <= sample.total_s
            assert sample.decode_rate > 0.0
            together = ours.together(["Hello", "Goodbye"], 5)
            assert [sample.tokens for sample in together] == [5, 5]
            assert ours.memory_mb() > 10.0
            with pytest.raises(MissingPeer, match="TypeError"):
                ours.generate("Hello", 5, no_such_option=1)
            assert ours.generate("Hello, world!", 6).token_ids == sample.token_ids

    def test_what_cannot_start_says_why(self, tmp_path: Path) -> None:
        setup = Setup(model=tmp_path / "absent.gguf", programs=tmp_path, threads=1)
        with pytest.raises(MissingPeer, match=r"absent\.gguf"):
            Hosted("ours", setup)
        with pytest.raises(MissingPeer, match="no llama-server in"):
            Server(setup)
        with pytest.raises(MissingPeer, match="no llama-bench in"):
            llama_bench(setup, decode=1)

    def test_a_server_that_ends_at_once_is_not_waited_for(self, tmp_path: Path) -> None:
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\nexit 7\n")
        program.chmod(0o755)
        setup = Setup(model=tmp_path / "absent.gguf", programs=tmp_path, threads=1)
        with pytest.raises(MissingPeer, match="status 7"):
            Server(setup)

    def test_the_rate_leaves_out_the_first_step(self) -> None:
        sample = Sample(tokens=11, first_s=1.0, last_s=3.0, total_s=4.0)
        assert sample.decode_rate == 5.0


class TestPrompts:
    def test_cut_to_a_number_of_tokens(self) -> None:
        def count(text: str) -> int:
            # Long words take two tokens.
            return sum(1 + (len(word) > 4) for word in text.split())

        for length in (2, 3, 7, 100, 1000):
            assert count(cut("short words and elongated ones", length, count)) == length

    def test_first_token_prompts(self) -> None:
        prompts = first_token_prompts(lambda text: len(text.split()))
        assert [len(prompt.split()) for prompt in prompts] == [4, 9, 1000]
        assert len(first_token_prompts(None)) == 3

    def test_pairs_share_a_prefix_with_each_other_alone(self) -> None:
        pairs = [prefix_pair(number) for number in range(3)]
        for first, second in pairs:
            shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
            assert shared > 0.9 * len(first)
        starts = {first[:12] for first, _ in pairs}
        assert len(starts) == len(pairs)

    def test_eight_tasks(self) -> None:
        assert len(set(EIGHT_PROMPTS)) == 8


class TestReport:
    def report(self) -> Report:
        lines = [comparison(), comparison(how="value", peer="", theirs=[], unit="ms", goal=None)]
        return Report(comparisons=lines, missing=[("P7", "[someone]", "there is no [model]")])

    def test_the_table_has_every_line_and_every_absence(self) -> None:
        output = io.StringIO()
        console = Console(width=160, file=output)
        print_table(console, self.report(), "a title")
        text = output.getvalue()
        assert "a title" in text
        assert "0.900" in text
        assert "no" in text
        assert "P7: [someone] was not measured: there is no [model]" in text

    def test_json_has_all_rounds(self) -> None:
        document = ujson.loads(ujson.dumps(as_json(self.report(), {"threads": 2})))
        assert document["keys"] == {"threads": 2}
        first, second = document["rows"]
        assert first["ours"] == [100.0, 50.0, 90.0]
        assert first["median"] == 0.9
        assert second["peer"] is None
        assert document["missing"] == [
            {"row": "P7", "who": "[someone]", "why": "there is no [model]"}
        ]

    def test_markdown_has_a_line_for_each_comparison(self) -> None:
        heading, rule, *lines = as_markdown(self.report()).splitlines()
        assert heading.count("|") == rule.count("|") == 10
        assert [line.count("|") for line in lines] == [10] * len(self.report().comparisons)
        assert lines[0].endswith("| llama-server | 100 tok/s | 0.900 | 0.5 to 1.25 | ≥ 1 | no |")

    @pytest.mark.parametrize(
        ("value", "text"), [(1234.5, "1234"), (99.4, "99.4"), (0.12345, "0.123"), (2.0, "2")]
    )
    def test_figures(self, value: float, text: str) -> None:
        assert figure(value) == text
