"""Two builds of one source beside each other: does the wheel for others cost speed here?

Each wheel goes into an environment of its own. Processes of the two take turns (A, B, B, A, ...);
each loads the model, computes once to warm up, and then measures a prompt and a decode by the
engine's own clock. The figure of a build is the median over its processes.

Usage: python bench/builds.py A.whl B.whl MODEL.gguf [--rounds 6] [--allowed 3] [--json]
Exit status 0 when B is slower than A by no more than what is allowed, for prompt and decode.
"""

from __future__ import annotations

import statistics
import subprocess
import venv
from pathlib import Path
from typing import Annotated, Any

import typer
import ujson
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("prompt_tokens_per_second", "decode_tokens_per_second")

# Speculation off: it would make the decode rate depend on what the text happens to say.
_MEASURE = """
import asyncio, json, pathlib, sys
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend, engine_build_line
from ai4all.types.model import ModelFile

WORDS = "the sea is wide and the ship is small but the wind is fair and the night is clear "

async def main():
    path, threads, prompt, tokens = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:5])
    text = (WORDS * prompt)[: 4 * prompt]
    options = EngineOptions(n_ctx=2048, threads=threads)
    async with NativeBackend() as backend:
        await backend.load(ModelFile(path.stem, path, "0" * 64, path.stat().st_size), options)
        rates = []
        for number in range(3):
            done = await backend.complete(GenerateRequest(
                prompt=f"{number} {text}", max_tokens=tokens, temperature=0.0, ignore_eos=True,
                repetition_penalty=1.0, reuse_prefix=False, speculate=False))
            if number:
                rates.append(done.timings.to_dict())
    names = ("prompt_tokens_per_second", "decode_tokens_per_second")
    print(json.dumps({"build": engine_build_line(),
                      **{name: max(rate[name] for rate in rates) for name in names}}))

asyncio.run(main())
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def environment(wheel: Path, home: Path) -> Path:
    """An environment with the wheel in it; its interpreter."""
    python = home / "bin/python"
    if not python.is_file():
        venv.create(home, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps"]
    for command in ([*pip[:5], str(wheel)], [*pip, str(wheel)]):
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{wheel.name} could not be installed:\n{done.stderr[-2000:]}")
    return python


def measure(python: Path, arguments: list[str]) -> dict[str, Any]:
    """One process of one build."""
    done = subprocess.run(
        [str(python), "-c", _MEASURE, *arguments], text=True, capture_output=True, check=False,
        cwd=python.parent,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{python} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = ujson.loads(done.stdout.splitlines()[-1])
    return found


def turns(rounds: int) -> list[int]:
    """Which build runs when: 0 is A, 1 is B."""
    return [side for number in range(rounds) for side in ((0, 1) if number % 2 == 0 else (1, 0))]


def ratios(found: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, float]:
    """B over A by medians, for each figure: below 1 is slower."""
    return {
        name: statistics.median(run[name] for run in found[1])
        / statistics.median(run[name] for run in found[0])
        for name in FIGURES
    }


@app.command()
def main(
    first: Annotated[Path, typer.Argument(exists=True, help="Wheel A, the one to hold up to.")],
    second: Annotated[Path, typer.Argument(exists=True, help="Wheel B.")],
    model: Annotated[Path, typer.Argument(exists=True, help="A GGUF file.")],
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each.")] = 6,
    allowed: Annotated[float, typer.Option(min=0, help="Percent that B may be slower.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="0: one for each physical core.")] = 0,
    prompt: Annotated[int, typer.Option(min=8, help="Tokens of the prompt, about.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    work: Annotated[Path, typer.Option(help="Where the environments are.")] = ROOT / "build/builds",
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure two builds in turn."""
    console = Console(stderr=True)
    arguments = [str(model.resolve()), str(threads), str(prompt), str(tokens)]
    with console.status("installing") as status:
        pythons = [
            environment(wheel.resolve(), work.resolve() / name)
            for wheel, name in ((first, "a"), (second, "b"))
        ]
        found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for number, side in enumerate(turns(rounds), 1):
            status.update(f"process {number} of {2 * rounds}")
            found[side].append(measure(pythons[side], arguments))
    ratio = ratios(found)
    if as_json:
        print(ujson.dumps({"a": found[0], "b": found[1], "ratios": ratio}, indent=2))
    else:
        table = Table(title=f"A {found[0][0]['build']}   B {found[1][0]['build']}")
        for name in ("figure", "A, median", "B, median", "B/A"):
            table.add_column(name, justify="left" if name == "figure" else "right")
        for name in FIGURES:
            medians = [statistics.median(run[name] for run in side) for side in found]
            row = [f"{median:.1f}" for median in medians]
            table.add_row(name.replace("_", " "), *row, f"{ratio[name]:.3f}")
        Console().print(table)
    raise typer.Exit(0 if min(ratio.values()) >= 1 - allowed / 100 else 1)


if __name__ == "__main__":
    app()
