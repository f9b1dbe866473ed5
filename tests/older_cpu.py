"""The wheel for others on processors that this machine does not have, emulated by qemu-user.

For each of them: the wheel starts, the variant of the CPU kernels that it chooses is the one that
fits, and a generation runs to its end. An instruction that the processor lacks would end the
process, so an end of the generation is the proof. The tokens are compared with those of this
machine: other kernels round otherwise, so that they differ is no fault, and it is printed.

Needs qemu-x86_64 (Debian: qemu-user), and the wheel of ``-C cmake.define.AI4ALL_CPU_VARIANTS=ON``.

Usage: python tests/older_cpu.py WHEEL MODEL.gguf [--tokens 16] [--work DIR] [--json]
Exit status 0 when every processor comes to the end with the variant expected.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
import ujson
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]

# What qemu calls a processor, and the variant that fits it. The first is the least that a wheel of
# ours runs on: x86-64-v2, without AVX.
PROCESSORS = {
    "Nehalem": "sse42",
    "SandyBridge": "sandybridge",
    "IvyBridge": "ivybridge",
    "Haswell": "haswell",
}

_GENERATE = """
import asyncio, json, pathlib, sys
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend, engine_build_info, engine_build_line
from ai4all.types.model import ModelFile

async def main():
    path, tokens = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    options = EngineOptions(n_ctx=256, threads=1)
    async with NativeBackend() as backend:
        await backend.load(ModelFile(path.stem, path, "0" * 64, path.stat().st_size), options)
        done = await backend.complete(GenerateRequest(
            prompt="The sea is", max_tokens=tokens, temperature=0.0, repetition_penalty=1.0,
            ignore_eos=True))
    info = engine_build_info()
    print(json.dumps({"build": engine_build_line(), "variant": info["cpu_variant"],
                      "features": info["cpu_features"], "text": done.text,
                      "tokens": done.usage.completion_tokens}))

asyncio.run(main())
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one processor did.

    Attributes:
        processor: As qemu names it; ``this machine`` for none.
        expected: The variant that fits it; empty where any may.
        variant: The one that was chosen.
        tokens: How many were generated.
        text: What they say.
        seconds: From start to end of the process.
        fault: Why it did not come to the end; empty where it did.
    """

    processor: str
    expected: str
    variant: str = ""
    tokens: int = 0
    text: str = ""
    seconds: float = 0.0
    fault: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it came to its end, with the variant that fits."""
        return not self.fault and self.variant == (self.expected or self.variant)


def environment(wheel: Path, work: Path) -> Path:
    """An environment with the wheel in it; its interpreter."""
    home = work / "venv"
    venv.create(home, clear=True, with_pip=True)
    python = home / "bin/python"
    pip = [str(python), "-m", "pip", "install", "-q", str(wheel.resolve())]
    done = subprocess.run(pip, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the wheel could not be installed:\n{done.stderr[-2000:]}")
    return python


def generate(python: Path, model: Path, tokens: int, processor: str, expected: str) -> Seen:
    """One generation on one processor."""
    command = [str(python), "-c", _GENERATE, str(model), str(tokens)]
    if processor:
        command = ["qemu-x86_64", "-cpu", processor, *command]
    started = time.monotonic()
    done = subprocess.run(
        command, text=True, capture_output=True, check=False, cwd=python.parent,
        timeout=3600,
    )  # fmt: skip
    seconds = round(time.monotonic() - started, 1)
    name = processor or "this machine"
    if done.returncode != 0:
        fault = f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        return Seen(name, expected, seconds=seconds, fault=fault)
    said = ujson.loads(done.stdout.splitlines()[-1])
    fault = "" if said["tokens"] == tokens else f"{said['tokens']} tokens of {tokens}"
    return Seen(name, expected, said["variant"], said["tokens"], said["text"], seconds, fault)


def table_of(found: list[Seen]) -> Table:
    """What was seen, for a person."""
    table = Table()
    for name in ("processor", "variant", "tokens", "s", "text as here", ""):
        table.add_column(name, overflow="fold")
    for seen in found:
        same = "yes" if seen.text == found[0].text else "no"
        state = "ok" if seen.is_right else seen.fault or f"expected {seen.expected}"
        table.add_row(
            seen.processor, seen.variant, str(seen.tokens), str(seen.seconds), same, state
        )
    return table


@app.command()
def main(
    wheel: Annotated[Path, typer.Argument(exists=True, help="Built with AI4ALL_CPU_VARIANTS.")],
    model: Annotated[Path, typer.Argument(exists=True, help="A GGUF file; emulation is slow.")],
    tokens: Annotated[int, typer.Option(min=1)] = 16,
    processors: Annotated[str, typer.Option(help="With commas between.")] = ",".join(PROCESSORS),
    work: Annotated[Path, typer.Option(help="Where the environment is made.")] = ROOT
    / "build/older-cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was seen as JSON.")] = False,
) -> None:
    """Run the wheel on emulated processors."""
    if shutil.which("qemu-x86_64") is None:
        raise SystemExit("no qemu-x86_64 on PATH; install qemu-user")
    work.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("installing") as status:
        python = environment(wheel, work.resolve())
        found = []
        for processor in ["", *processors.split(",")]:
            status.update(f"generating on {processor or 'this machine'}")
            expected = PROCESSORS.get(processor, "")
            found.append(generate(python, model.resolve(), tokens, processor, expected))
    if as_json:
        print(ujson.dumps([asdict(seen) for seen in found], indent=2))
    else:
        Console().print(table_of(found))
    sys.exit(0 if all(seen.is_right for seen in found) else 1)


if __name__ == "__main__":
    app()
