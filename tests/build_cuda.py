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
import resource
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

SETTINGS: dict[str, dict[str, str]] = {
    "auto": {},
    "named": {"device": "cuda"},
    "named, and the CPU allowed": {"device": "cuda", "allow_cpu_fallback": "true"},
}
"""What an owner may have configured, as variables of the engine's section."""

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


def build(
    architecture: str, work: Path, jobs: int, more: dict[str, str], *, isolation: bool
) -> tuple[Path, float]:
    """Build the wheel; its path and the seconds of processor time that it took."""
    folder, version = toolkit()
    defines = {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": architecture, **more}
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
    command += [] if isolation else ["--no-build-isolation"]
    for name, value in defines.items():
        command += ["-C", f"cmake.define.{name}={value}"]
    before = processor_seconds()
    run([*command, str(ROOT)], env=environment)
    (wheel,) = (work / "wheels").glob("ai4all_native-*.whl")
    return wheel, processor_seconds() - before


def processor_seconds() -> float:
    """Of all programs that this one has run to their end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LD_LIBRARY_PATH", "PYTHONPATH") and not name.startswith("AI4ALL_")
    }
    clean["AI4ALL_DATA_DIR"] = str(work / "data")
    clean["AI4ALL_MODELS_BENCHMARK_SOURCE"] = f"file:{model}"

    def said(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ours, *arguments],
            text=True,
            capture_output=True,
            check=False,
            env={**clean, **{f"AI4ALL_ENGINE_{name.upper()}": v for name, v in settings.items()}},
            cwd=work,
        )

    generation = ["generate", "--model", str(model), "--prompt", "The sea", "--max-tokens", "8"]
    worker = ["worker", "--coordinator", "ws://127.0.0.1:1", "--model", str(model)]
    answers: dict[str, Any] = {"version": said("--version").stdout.strip()}
    for name, settings in SETTINGS.items():
        doctor = said("doctor", "--json", **settings)
        report = ujson.loads(doctor.stdout)
        checks = {check["name"]: check for check in report["checks"]}
        computed = said(*generation, "--json", **settings)
        answers[name] = {
            "doctor": doctor.returncode,
            "target cuda": checks["target cuda"],
            "device choice": checks["device choice"],
            "devices": report["devices"],
            "not_loaded": report["engine"]["not_loaded"],
            "generate": computed.returncode,
            "computed_on": (
                ujson.loads(computed.stdout)["fingerprint"]["device"] if computed.stdout else None
            ),
            "said": computed.stderr.strip(),
        }
    refused = said(*worker, **SETTINGS["named"])
    answers["worker"] = {"status": refused.returncode, "said": refused.stderr.strip()}
    return answers


def faults_of(answers: dict[str, Any]) -> list[str]:
    """What a machine without a GPU should have answered otherwise."""
    auto, named, allowed = (answers[name] for name in SETTINGS)
    reason = auto["not_loaded"].get("cuda", "the driver shows no device")
    found = {
        "the version names the backend": "cuda" in answers["version"] or bool(auto["not_loaded"]),
        "doctor: nothing is wrong, but it says what is lacking": auto["doctor"] == 0
        and auto["target cuda"]["status"] == auto["device choice"]["status"] == "warning"
        and reason in auto["target cuda"]["detail"],
        "doctor: the CPU is the one device, with its memory": [
            (device["name"], device["used"], device["memory_mb"] > 0) for device in auto["devices"]
        ]
        == [("CPU", True, True)],
        "auto computes on the CPU and says so": (auto["generate"], auto["computed_on"])
        == (0, "CPU")
        and "all on the CPU" in auto["said"],
        "doctor: a device that is named and missing is a problem": named["doctor"] == 1
        and named["device choice"]["status"] == "problem",
        "a device that is named and missing is refused": named["generate"] == 1
        and "engine.device" in named["said"].splitlines()[-1],
        "the worker refuses it, too": answers["worker"]["status"] == 1
        and "engine.device" in answers["worker"]["said"].splitlines()[-1],
        "the CPU stands in where it was allowed": (allowed["doctor"], allowed["generate"]) == (0, 0)
        and allowed["computed_on"] == "CPU"
        and "all on the CPU" in allowed["said"],
    }
    return [what for what, holds in found.items() if not holds]


@app.command()
def main(
    model: Annotated[Path, typer.Argument(exists=True, help="A GGUF file to compute with.")],
    architecture: Annotated[str, typer.Option(help="As CMake names it.")] = "90",
    work: Annotated[Path, typer.Option(help="Kept, so that a second run goes on.")] = ROOT
    / "build/cuda-check",
    jobs: Annotated[int, typer.Option(help="Compilers at once.")] = os.cpu_count() or 1,
    define: Annotated[
        list[str] | None,
        typer.Option(help="More for CMake: GGML_CUDA_FA=OFF halves the time, for one."),
    ] = None,
    isolation: Annotated[
        bool, typer.Option(help="Fetch the build requirements; else they are installed already.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the wheel with the CUDA backend, and ask it what it does here."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status("building; nvcc takes its time"):
        started = time.monotonic()
        more = dict(text.split("=", 1) for text in define or [])
        wheel, processor = build(architecture, work, jobs, more, isolation=isolation)
        seconds = time.monotonic() - started
    answers = ask(wheel, model.resolve(), work)
    has_gpu = any(device["kind"] == "gpu" for device in answers["auto"]["devices"])
    report = {
        "seconds": round(seconds),
        "processor_seconds": round(processor),
        "jobs": jobs,
        "defines": more,
        "mib": sizes(wheel),
        **answers,
        # On a machine with a GPU other answers are right.
        "faults": [] if has_gpu else faults_of(answers),
    }
    if as_json:
        print(ujson.dumps(report, indent=2))
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.items():
            table.add_row(name, str(value))
        Console().print(table)
    raise typer.Exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    app()
