"""A run of the comparison as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from peers_rows import Comparison, Report
from rich.console import Console
from rich.table import Table

_SAYS = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}


def figure(value: float) -> str:
    """A number with as many digits as it deserves."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(console: Console, report: Report, title: str) -> None:
    """Print what was measured, and what was not."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("what", min_width=24)
    table.add_column("ours", justify="right")
    table.add_column("against")
    for name in ("theirs", "ratio", "of the rounds", "goal"):
        table.add_column(name, justify="right")
    table.add_column("met")
    for line in report.comparisons:
        unit = f" {line.unit}" if line.unit else ""
        table.add_row(
            line.row,
            line.what,
            figure(statistics.median(line.ours)) + unit,
            line.peer,
            figure(statistics.median(line.theirs)) + unit if line.theirs else "",
            _median(line),
            _spread(line),
            _goal(line),
            _SAYS[line.met],
        )
    console.print(table)
    for row, who, why in report.missing:
        console.print(f"{row}: {who} was not measured: {why}", markup=False, highlight=False)


def _median(line: Comparison) -> str:
    match line.how:
        case "value":
            return ""
        case "difference":
            return f"{line.median:+.2f} {line.unit}"
        case _:
            return f"{line.median:.3f}"


def _spread(line: Comparison) -> str:
    figures = line.figures
    if len(figures) < 2:
        return ""
    return f"{figure(min(figures))} to {figure(max(figures))}"


def _goal(line: Comparison) -> str:
    if line.goal is None:
        return ""
    return f"{'≥' if line.at_least else '≤'} {line.goal:g}"


def as_markdown(report: Report) -> str:
    """The table for a document."""
    names = ("row", "what", "ours", "against", "theirs", "median", "of the rounds", "goal", "met")
    lines = [" | ".join(names), "|".join("---" for _ in names)]
    for line in report.comparisons:
        unit = f" {line.unit}" if line.unit else ""
        cells = (
            line.row,
            line.what,
            figure(statistics.median(line.ours)) + unit,
            line.peer,
            figure(statistics.median(line.theirs)) + unit if line.theirs else "",
            _median(line),
            _spread(line),
            _goal(line),
            {True: "yes", False: "no", None: ""}[line.met],
        )
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def as_json(report: Report, keys: dict[str, Any]) -> dict[str, Any]:
    """All figures of all rounds, under the keys that they are only comparable with."""
    return {
        "keys": keys,
        "contenders": report.contenders,
        "rows": [
            {
                "row": line.row,
                "what": line.what,
                "unit": line.unit,
                "ours": line.ours,
                "peer": line.peer or None,
                "theirs": line.theirs or None,
                "how": line.how,
                "median": line.median,
                "goal": line.goal,
                "at_least": line.at_least,
                "met": line.met,
            }
            for line in report.comparisons
        ],
        "missing": [{"row": row, "who": who, "why": why} for row, who, why in report.missing],
    }


def draw(report: Report, path: Path, title: str) -> None:
    """Draw the ratios, each turned so that more is better for us, into a PNG file.

    Raises:
        ImportError: matplotlib is not here (extra ``bench``).
        OSError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in report.comparisons if line.how == "ratio"]
    axes_height = 0.32 * max(1, len(lines)) + 1.6
    picture, axes = pyplot.subplots(figsize=(11, axes_height), layout="constrained")
    try:
        for place, line in enumerate(lines):
            ratios = [_advantage(line, ratio) for ratio in line.figures]
            middle = statistics.median(ratios)
            colour = {True: "#2f855a", False: "#c05621", None: "#718096"}[line.met]
            axes.barh(place, middle, color=colour, height=0.6)
            axes.plot([min(ratios), max(ratios)], [place, place], color="#1a202c", linewidth=1)
            axes.text(max(ratios), place, f"  {middle:.2f}", va="center", fontsize=8)
            if line.goal is not None:
                goal = _advantage(line, line.goal)
                axes.plot([goal, goal], [place - 0.4, place + 0.4], color="#1a202c", linewidth=2)
        axes.axvline(1.0, color="#1a202c", linewidth=0.8, linestyle=":")
        names = [f"{line.row}  {line.what}, against {line.peer}" for line in lines]
        axes.set_yticks(range(len(lines)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        # Room for the figure beside the longest bar.
        axes.set_xlim(right=axes.get_xlim()[1] * 1.5)
        picture.supxlabel(
            "times as good as the other (thick mark: the goal; thin line: all rounds)", fontsize=9
        )
        picture.suptitle(title, fontsize=9)
        picture.savefig(path, dpi=150, format="png")
    finally:
        pyplot.close(picture)


def _advantage(line: Comparison, ratio: float) -> float:
    return ratio if line.at_least else 1.0 / ratio
