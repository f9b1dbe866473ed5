"""Base against head: both built and measured on one machine, in turn, and compared by medians.

Each revision gets a checkout and a virtual environment of its own below ``--work``, kept for the
next time. Its own benches run with its own build; what both have is compared. The rounds alternate
(base, head, head, base, ...), so that a machine that gets warmer or busier does so for both. A
bench's figure is the median over the rounds of its medians.

A ratio over the threshold in one run can be noise: such benches alone are run once more, with twice
the rounds, and only what is slower again counts.

Usage: python bench/compare.py BASE [HEAD] [--threshold 10] [--rounds 3] [-k EXPRESSION] [--json]
HEAD may be left out for the working tree as it is, committed or not.
Exit status 0 when nothing got slower by more than the threshold, 1 when something did, 2 when a
revision cannot be built or measured.
"""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import ujson
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORKING_TREE = "working tree"

EXIT_SLOWER = 1
EXIT_UNUSABLE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Side:
    """One revision, built.

    Attributes:
        name: As the user named it.
        commit: Its commit, or ``working tree``.
        source: Its checkout.
        python: The interpreter of its environment.
    """

    name: str
    commit: str
    source: Path
    python: Path


@dataclass(frozen=True, slots=True)
class Row:
    """One bench on both sides, in seconds.

    Attributes:
        bench: Its full name.
        base: Its median at base, of each round.
        head: The same at head.
    """

    bench: str
    base: tuple[float, ...]
    head: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Head over base: above 1 is slower."""
        return statistics.median(self.head) / statistics.median(self.base)


def run(command: list[str], **options: object) -> str:
    """Run to the end.

    Raises:
        typer.Exit: It failed; its last lines were printed.
    """
    done = subprocess.run(  # type: ignore[call-overload]
        command, text=True, capture_output=True, check=False, **options
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        Console(stderr=True).print(
            f"{shlex.join(command)} ended with {done.returncode}:\n{tail}", markup=False
        )
        raise typer.Exit(EXIT_UNUSABLE)
    return str(done.stdout)


def build_environment() -> dict[str, str]:
    """What the builds see: ccache, where it is installed, for what both revisions share."""
    environment = dict(os.environ)
    if shutil.which("ccache"):
        for language in ("C", "CXX", "CUDA"):
            environment.setdefault(f"CMAKE_{language}_COMPILER_LAUNCHER", "ccache")
        # The two checkouts differ in their folder alone.
        environment.setdefault("CCACHE_NOHASHDIR", "1")
    return environment


def prepare(name: str | None, work: Path) -> Side:
    """Check out, build and install one revision; quick when that was done before.

    Args:
        name: A revision, or None for the working tree.
        work: Below it everything is kept.
    """
    if name is None:
        commit, source, home = WORKING_TREE, ROOT, work / "working-tree"
    else:
        commit = run(["git", "rev-parse", "--verify", f"{name}^{{commit}}"], cwd=ROOT).strip()
        source, home = work / commit / "source", work / commit
        if not source.is_dir():
            source.parent.mkdir(parents=True, exist_ok=True)
            run(["git", "clone", "-q", "--shared", "--no-checkout", str(ROOT), str(source)])
            run(["git", "checkout", "-q", "--detach", commit], cwd=source)
            # The pin, where it is materialised already; another one is replaced by the build.
            pinned = ROOT / "vendor/llama.cpp"
            if pinned.is_dir():
                shutil.copytree(pinned, source / "vendor/llama.cpp")
    python = home / "venv/bin/python"
    done = home / "installed"
    if name is None or not done.is_file():
        if not python.is_file():
            venv.create(home / "venv", with_pip=True)
        environment = build_environment()
        environment.setdefault("CCACHE_BASEDIR", str(source))
        pip = [str(python), "-m", "pip", "install", "-q"]
        run([*pip, "--upgrade", "pip>=24.1"])
        run([*pip, f"{source}[test]"], env=environment)
        done.touch()
    return Side(name or WORKING_TREE, commit, source, python)


def measure(side: Side, selection: list[str]) -> dict[str, float]:
    """Run the benches of one side once; the median of each, in seconds."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        report = Path(folder) / "report.json"
        command = [str(side.python.parent / "pytest"), "bench", "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-enable", "--benchmark-only", f"--benchmark-json={report}"]
        run([*command, *selection], cwd=side.source)
        found = ujson.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    return {bench["fullname"]: float(bench["stats"]["median"]) for bench in found}


def rows_of(rounds: Iterable[tuple[dict[str, float], dict[str, float]]]) -> list[Row]:
    """Put the rounds together: one row for each bench that every one of them has."""
    pairs = list(rounds)
    common = set.intersection(*(set(side) for pair in pairs for side in pair))
    return [
        Row(name, tuple(base[name] for base, _ in pairs), tuple(head[name] for _, head in pairs))
        for name in sorted(common)
    ]


def alternate(
    sides: tuple[Side, Side],
    n_rounds: int,
    measure_side: Callable[[Side], dict[str, float]],
) -> list[Row]:
    """Measure both sides in turn; each round begins with the side that ended the one before."""
    rounds = []
    for number in range(n_rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        found = {side.name: measure_side(side) for side in order}
        rounds.append((found[sides[0].name], found[sides[1].name]))
    return rows_of(rounds)


def slower(rows: Iterable[Row], threshold: float) -> list[Row]:
    """The rows whose ratio is over the threshold, in percent."""
    return [row for row in rows if row.ratio > 1 + threshold / 100]


def judge(
    sides: tuple[Side, Side],
    n_rounds: int,
    threshold: float,
    measure_side: Callable[[Side, list[str]], dict[str, float]],
    selection: list[str],
) -> tuple[list[Row], list[Row]]:
    """All rows, and those that are slower, confirmed by a second look at them alone."""
    rows = alternate(sides, n_rounds, lambda side: measure_side(side, selection))
    suspects = slower(rows, threshold)
    if not suspects:
        return rows, []
    names = {row.bench for row in suspects}
    # The expression of -k takes words; a bench's own name, without its parameters, is one.
    words = sorted({name.rpartition("::")[2].partition("[")[0] for name in names})
    again = alternate(
        sides, 2 * n_rounds, lambda side: measure_side(side, ["-k", " or ".join(words)])
    )
    second = {row.bench: row for row in again if row.bench in names}
    return [second.get(row.bench, row) for row in rows], slower(second.values(), threshold)


def table_of(rows: list[Row], sides: tuple[Side, Side], threshold: float) -> Table:
    """The rows for a person, the slowest first."""
    table = Table(title=f"head {sides[1].commit[:12]} over base {sides[0].commit[:12]}")
    for name in ("bench", "base", "head", "head/base"):
        table.add_column(name, justify="left" if name == "bench" else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: -row.ratio):
        mark = "red" if slower([row], threshold) else "default"
        table.add_row(
            row.bench.removeprefix("bench/"),
            duration(statistics.median(row.base)),
            duration(statistics.median(row.head)),
            f"[{mark}]{row.ratio:.3f}[/]",
        )
    return table


def duration(seconds: float) -> str:
    """Seconds with a unit that a person reads."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


@app.command()
def main(
    base: Annotated[str, typer.Argument(help="The revision to compare with.")],
    head: Annotated[str | None, typer.Argument(help="Default: the working tree.")] = None,
    threshold: Annotated[float, typer.Option(min=0, help="Percent slower that is let pass.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 3,
    expression: Annotated[str, typer.Option("-k", help="As pytest's.")] = "",
    work: Annotated[Path, typer.Option(help="Kept, so that a second time is quick.")] = ROOT
    / "build/compare",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare the benches of two revisions."""
    work = work.resolve()
    console = Console(stderr=True)
    with console.status("building base") as status:
        first = prepare(base, work)
        status.update("building head")
        second = prepare(head, work)
        if first.commit == second.commit:
            console.print(f"base and head are one commit, {first.commit}")
            raise typer.Exit(EXIT_UNUSABLE)
        status.update("measuring both in turn")
        selection = ["-k", expression] if expression else []
        sides = (first, second)
        rows, worse = judge(sides, rounds, threshold, measure, selection)
    if not rows:
        console.print("the two have no bench in common")
        raise typer.Exit(EXIT_UNUSABLE)
    if as_json:
        listed = [
            {"bench": row.bench, "base_s": row.base, "head_s": row.head, "ratio": row.ratio}
            for row in rows
        ]
        keys = {"base": first.commit, "head": second.commit, "threshold_percent": threshold}
        print(ujson.dumps({**keys, "rows": listed, "slower": [r.bench for r in worse]}, indent=2))
    else:
        out = Console()
        out.print(table_of(rows, sides, threshold))
        out.print(f"{len(worse)} of {len(rows)} slower by more than {threshold:g} %")
    raise typer.Exit(EXIT_SLOWER if worse else 0)


if __name__ == "__main__":
    app()
