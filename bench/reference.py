"""llama.cpp's own programs, built from the same pinned source as the engine.

Used by the comparisons; nothing of it is shipped. The archive is fetched and checked by
``vendor/sync.py``, unpacked below ``build/``, and built with the same compiler and the defaults of
a plain CMake build.

Usage: python bench/reference.py [PROGRAM ...]      prints the folder that holds the programs
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "reference-source"
BUILD = ROOT / "build" / "reference"
PROGRAMS = ("llama-completion", "llama-bench", "llama-batched-bench", "llama-server")

# Paths of the archive beyond those that the engine needs.
_MORE_PATHS = ["tools", "app", "scripts"]


def _sync_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ai4all_vendor_sync", ROOT / "vendor/sync.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpack() -> Path:
    """Unpack the pinned source with its programs; return its folder."""
    sync = _sync_module()
    pin = sync.read_pin()
    pin |= {"kept": pin["kept"] + _MORE_PATHS}
    stamp = SOURCE / sync.STAMP
    if stamp.is_file() and stamp.read_text() == sync.stamp_of(pin):
        return SOURCE
    SOURCE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCE.parent) as temporary:
        archive = sync.download(pin, Path(temporary))
        sync.check(archive, pin["sha256"])
        fresh = Path(temporary) / "tree"
        sync.unpack(archive, pin, fresh)
        (fresh / sync.STAMP).write_text(sync.stamp_of(pin))
        shutil.rmtree(SOURCE, ignore_errors=True)
        fresh.rename(SOURCE)
    return SOURCE


def build(programs: tuple[str, ...] = PROGRAMS) -> Path:
    """Build ``programs``; return the folder that holds them. Slow only the first time."""
    source = unpack()
    configure = ["cmake", "-S", str(source), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    configure += ["-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    compile_ = ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, [*compile_, "--target", *programs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return BUILD / "bin"


if __name__ == "__main__":
    print(build(tuple(sys.argv[1:]) or PROGRAMS))
