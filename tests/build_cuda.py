"""Build the wheel with the CUDA backend for one architecture, and see what it does here.

The toolkit's nvcc is taken from PATH. What a small toolkit may lack is made up for: cuBLAS by the
wheel ``nvidia-cublas`` (fetched with pip when it is needed), the driver's library by a stub that is
linked against and never run. Then the wheel is installed into a fresh environment and asked, as a
machine without a GPU would: does it start, what does it say, does it compute on the CPU, and does
it refuse when a GPU was promised? On a machine with a GPU the same questions have other answers,
and they are printed as they come.

Usage: python tests/build_cuda.py MODEL.gguf [--architecture 90] [--work DIR] [--jobs N]
Exit status 0 when the build, and everything asked of it, is as it should be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer
import ujson
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024

_DRIVER_CALL = re.compile(r"\b(cu(?:Device|Get|Mem|Ctx|Init|Stream|Module|Launch)\w*)\(")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end; its output ends this script when it fails."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise SystemExit(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{tail}")
    return done


def toolkit() -> tuple[Path, str]:
    """The toolkit's folder and version.

    Raises:
        SystemExit: There is no nvcc.
    """
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("no nvcc on PATH; install the CUDA toolkit, or name nvcc with CUDACXX")
    said = run([nvcc, "--version"]).stdout
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True, check=False
    )
    top = re.search(r"#\$ TOP=(.+)", dry.stderr)
    version = re.search(r"release ([0-9.]+)", said)
    if top is None or version is None:
        raise SystemExit(f"{nvcc} does not say what it is")
    return Path(top[1]).resolve(), version[1]


def cublas(folder: Path, major: str, work: Path) -> dict[str, str]:
    """What to add to the environment and the configuration for cuBLAS: nothing, or a wheel's."""
    if any(folder.glob("lib*/libcublas.so")) and (folder / "include/cublas_v2.h").is_file():
        return {}
    unpacked = work / "cublas"
    if not unpacked.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
        run([*pip, f"nvidia-cublas=={major}.*"])
        (wheel,) = work.glob("nvidia_cublas-*.whl")
        zipfile.ZipFile(wheel).extractall(unpacked)
    (library,) = unpacked.glob("nvidia/*/lib/libcublas.so.*")
    return {"library": str(library), "include": str(library.parents[1] / "include")}


def driver_stub(folder: Path, work: Path) -> str:
    """A library to link against where the toolkit has no stub of the driver's; "" where it has."""
    if any(folder.glob("lib*/stubs/libcuda.so")) or shutil.which("nvidia-smi"):
        return ""
    calls: set[str] = set()
    for source in (ROOT / "vendor/llama.cpp/ggml/src/ggml-cuda").rglob("*.cu*"):
        calls.update(_DRIVER_CALL.findall(source.read_text(encoding="utf-8", errors="replace")))
    stubs = work / "stubs"
    stubs.mkdir(exist_ok=True)
    code = stubs / "stub.c"
    code.write_text("".join(f"int {call}(void) {{ return 34; }}\n" for call in sorted(calls)))
    library = stubs / "libcuda.so"
    run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(code)])
    return str(library)


def build(architecture: str, work: Path, jobs: int) -> tuple[Path, float]:
    """Build the wheel; its path and the seconds it took."""
    folder, version = toolkit()
    defines = {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": architecture}
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    blas = cublas(folder, version.split(".")[0], work)
    if blas:
        defines["CUDA_cublas_LIBRARY"] = blas["library"]
        environment["CPATH"] = os.pathsep.join(
            part for part in (blas["include"], os.environ.get("CPATH")) if part
        )
    if stub := driver_stub(folder, work):
        defines["CUDA_cuda_driver_LIBRARY"] = stub
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(work / "wheels")]
    command += ["-C", f"build-dir={work / 'build'}"]
    for name, value in defines.items():
        command += ["-C", f"cmake.define.{name}={value}"]
    started = time.monotonic()
    run([*command, str(ROOT)], env=environment)
    (wheel,) = (work / "wheels").glob("ai4all_native-*.whl")
    return wheel, time.monotonic() - started


def sizes(wheel: Path) -> dict[str, float]:
    """MiB of the wheel, and of each library in it."""
    result = {"wheel": wheel.stat().st_size / MIB}
    for entry in zipfile.ZipFile(wheel).infolist():
        if ".so" in Path(entry.filename).name:
            result[Path(entry.filename).name] = entry.file_size / MIB
    return {name: round(size, 1) for name, size in result.items()}


def ask(wheel: Path, model: Path, work: Path) -> dict[str, Any]:
    """Install the wheel into an environment of its own, and ask it."""
    home = work / "venv"
    venv.create(home, clear=True, with_pip=True)
    run([str(home / "bin/pip"), "install", "-q", str(wheel)])
    ours = str(home / "bin/ai4all-native")
    clean = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    clean["AI4ALL_DATA_DIR"] = str(work / "data")

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ours, *arguments], text=True, capture_output=True, check=False, env=clean, cwd=work
        )

    version, doctor = said("--version"), said("doctor", "--json")
    report = ujson.loads(doctor.stdout)
    generation = ["generate", "--model", str(model), "--prompt", "The sea", "--max-tokens", "8"]
    computed = said(*generation, "--json")
    return {
        "version": version.stdout.strip(),
        "not_loaded": report["engine"]["not_loaded"],
        "target": next(c for c in report["checks"] if c["name"] == "target cuda"),
        "doctor_status": doctor.returncode,
        "generate_status": computed.returncode,
        "generate": (computed.stdout + computed.stderr).strip(),
    }


@app.command()
def main(
    model: Annotated[Path, typer.Argument(exists=True, help="A GGUF file to compute with.")],
    architecture: Annotated[str, typer.Option(help="As CMake names it.")] = "90",
    work: Annotated[Path, typer.Option(help="Kept, so that a second run goes on.")] = ROOT
    / "build/cuda-check",
    jobs: Annotated[int, typer.Option(help="Compilers at once.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the wheel with the CUDA backend, and ask it what it does here."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status("building; nvcc takes its time"):
        wheel, seconds = build(architecture, work, jobs)
    answers = ask(wheel, model.resolve(), work)
    report = {"seconds": round(seconds), "jobs": jobs, "mib": sizes(wheel), **answers}
    if as_json:
        print(ujson.dumps(report, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.items():
            table.add_row(name, str(value))
        Console().print(table)
    started = "cuda" in report["version"] or "cuda" in report["not_loaded"]
    raise typer.Exit(0 if started and report["generate_status"] == 0 else 1)


if __name__ == "__main__":
    app()
