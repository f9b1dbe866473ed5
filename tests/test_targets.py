"""Hardware targets as far as configuring goes: flags reach ggml, and what is missing is named.

The toolchains are fakes of ``support/toolchains.py``; what is tested is the way from a preset or an
option to the compiler's command lines.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import ujson
from toolchains import fake_rocm, fake_xcode

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake") or "cmake"

# What a developer's machine may set would choose for the tests.
CHOSEN_BY_USERS = ("CC", "CXX", "CUDACXX", "HIPCXX", "ROCM_PATH", "VULKAN_SDK", "CMAKE_PREFIX_PATH")


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USERS}
    return {**kept, **extra}


def configure(
    preset: str, build: Path, *defines: str, env: dict[str, str] | None = None
) -> dict[str, list[str]]:
    """Configure a preset; the compiler's command lines by CMake target."""
    command = [CMAKE, "--preset", preset, "-B", str(build), "-DAI4ALL_BUILD_EXTENSION=OFF"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *defines]
    done = subprocess.run(
        command, cwd=ROOT, env=env or environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = defaultdict(list)
    for entry in ujson.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        target = re.search(r"CMakeFiles/([^/]+)\.dir/", entry["output"])
        assert target is not None
        lines[target[1]].append(entry["command"])
    return dict(lines)


def test_hip_by_cmakes_own_language_support(tmp_path: Path) -> None:
    compiler = fake_rocm(tmp_path / "rocm")
    lines = configure(
        "hip",
        tmp_path / "build",
        f"-DCMAKE_HIP_COMPILER={compiler}",
        "-DCMAKE_HIP_ARCHITECTURES=gfx1100;gfx90a",
        env=environment(ROCM_PATH=str(tmp_path / "rocm")),
    )
    assert len(lines["ggml-hip"]) > 50
    for line in lines["ggml-hip"]:
        assert line.startswith(str(compiler))
        assert "-x hip -c" in line
        for flag in ("-DGGML_USE_HIP", "--offload-arch=gfx1100", "--offload-arch=gfx90a"):
            assert flag in line
    # The driver may be missing where it runs, so it is loaded and not linked; and the CPU beside it
    # is this machine's.
    assert "-DGGML_BACKEND_DL" in lines["ggml-hip"][0]
    assert all(re.search(r"-m(arch|cpu)=native", line) for line in lines["ggml-cpu"])
    assert not any(re.search(r"-m(arch|cpu)=native", line) for line in lines["llama"])


def test_more_than_one_backend_in_one_build(tmp_path: Path) -> None:
    compiler = fake_rocm(tmp_path / "rocm")
    lines = configure(
        "hip",
        tmp_path / "build",
        f"-DCMAKE_HIP_COMPILER={compiler}",
        "-DCMAKE_HIP_ARCHITECTURES=gfx1100",
        "-DAI4ALL_CPU_VARIANTS=ON",
        env=environment(ROCM_PATH=str(tmp_path / "rocm")),
    )
    variants = {
        name for name in lines if name.startswith("ggml-cpu-") and not name.endswith("-feats")
    }
    assert len(variants) > 5
    assert "ggml-hip" in lines
    if platform.machine() == "x86_64":
        # The least of them takes a plain x86-64; a wheel asks for no more.
        assert not any("-mavx" in line or "-msse4" in line for line in lines["ggml-cpu-x64"])
        assert all("-mavx2" in line for line in lines["ggml-cpu-haswell"])
    assert not any("=native" in line for name in lines for line in lines[name])


def test_metal_is_linked_in_with_its_shaders(tmp_path: Path) -> None:
    toolchain = fake_xcode(tmp_path / "xcode")
    path = f"{tmp_path / 'xcode/bin'}{os.pathsep}{os.environ['PATH']}"
    lines = configure(
        "metal",
        tmp_path / "build",
        f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        env=environment(PATH=path),
    )
    assert any("ggml-metal-device.m" in line for line in lines["ggml-metal"])
    assert all("-DGGML_METAL_EMBED_LIBRARY" in line for line in lines["ggml-metal"])
    assert all("-DGGML_USE_METAL" in line for line in lines["ggml"])
    assert not any("-DGGML_BACKEND_DL" in line for line in lines["ggml-metal"])


Complaint = Callable[..., str]


@pytest.fixture
def complaint(tmp_path: Path) -> Complaint:
    """What configuring says with some options, on a machine that lacks what they need."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(targets NONE)\n"
        f'include("{ROOT.as_posix()}/cmake/Targets.cmake")\n',
        encoding="utf-8",
    )

    def run(*defines: str, **env: str) -> str:
        command = [CMAKE, "-S", str(tmp_path), "-B", str(tmp_path / "build"), *defines]
        done = subprocess.run(
            command, env=environment(**env), text=True, capture_output=True, check=False
        )
        assert done.returncode != 0
        errors = done.stderr.count("CMake Error")
        assert errors == 1, done.stderr
        return " ".join(done.stderr.split())

    return run


class TestWhatIsMissingIsNamedWithItsVersion:
    def test_cuda(self, complaint: Complaint) -> None:
        said = complaint("-DGGML_CUDA=ON", CUDACXX="/nonexistent/nvcc")
        assert "NVIDIA CUDA toolkit 11.8 or later" in said
        assert "Not found: nvcc" in said

    def test_hip_compiler(self, complaint: Complaint) -> None:
        said = complaint("-DGGML_HIP=ON", HIPCXX="/nonexistent/clang++")
        assert "ROCm 6.1 or later" in said
        assert "Not found: a HIP compiler" in said

    def test_hip_library(self, complaint: Complaint, tmp_path: Path) -> None:
        compiler = fake_rocm(tmp_path / "rocm", without="hipblas")
        said = complaint(
            "-DGGML_HIP=ON", f"-DCMAKE_HIP_COMPILER={compiler}", ROCM_PATH=str(tmp_path / "rocm")
        )
        assert "Not found: hipblas-config.cmake" in said

    def test_hip_too_old(self, complaint: Complaint, tmp_path: Path) -> None:
        compiler = fake_rocm(tmp_path / "rocm", version="5.7.1")
        said = complaint(
            "-DGGML_HIP=ON", f"-DCMAKE_HIP_COMPILER={compiler}", ROCM_PATH=str(tmp_path / "rocm")
        )
        assert "ROCm 6.1 or later" in said
        assert "Found: HIP 5.7.1" in said

    def test_vulkan(self, complaint: Complaint) -> None:
        said = complaint("-DGGML_VULKAN=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_Vulkan=ON")
        assert "libvulkan-dev spirv-headers glslc" in said

    def test_metal(self, complaint: Complaint) -> None:
        said = complaint("-DGGML_METAL=ON", "-DCMAKE_SYSTEM_NAME=Linux")
        assert "macOS with the Xcode command line tools" in said
