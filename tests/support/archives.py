"""What must be in our archives, and what was found there: nothing missing, nothing foreign."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

__all__ = ["LICENCES", "differences", "sdist_files", "sdist_faults", "wheel_faults"]

LICENCES = frozenset(
    f"ai4all/licenses/{name}.txt"
    for name in ("cpp-httplib", "llama.cpp", "llamafile", "nlohmann-json", "yarn")
)
"""What is linked into the extension, by the licence that it brings along."""

_SOURCE_LICENCES = frozenset(
    {
        "LICENSE",
        "vendor/llama.cpp/LICENSE",
        "vendor/llama.cpp/licenses/LICENSE-jsonhpp",
        "vendor/llama.cpp/vendor/cpp-httplib/LICENSE",
    }
)

# Programs, tests and built files of llama.cpp: no build of ours needs them.
_FOREIGN = re.compile(
    r"(^|/)(tests?|examples?|tools|models|\.git|\.github|build)/|\.(o|a|so|gguf)$"
)
_CLIENTS = re.compile(r"^vendor/llama\.cpp/(src/models|ggml/src)/")

_EXTENSION = re.compile(r"^ai4all/_engine\.(cpython-\d+-[\w-]+|abi3|cpython-\d+-darwin)\.so$")
_LIBRARY = re.compile(
    r"^ai4all/libs/lib(ai4all-ggml|ai4all-ggml-base|ggml-[a-z0-9_.-]+)\.(so|dylib)$"
)
_METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")


def differences(found: Collection[str], expected: Collection[str]) -> list[str]:
    """One line for each file too many or too few, and for each that is there twice."""
    have, want = set(found), set(expected)
    faults = [f"missing: {name}" for name in sorted(want - have)]
    faults += [f"foreign: {name}" for name in sorted(have - want)]
    if len(found) != len(have):
        faults.append("some names are there twice")
    return faults


def sdist_files(path: Path) -> list[str]:
    """The files of an sdist, without its top folder."""
    with tarfile.open(path) as tar:
        names = [member.name for member in tar.getmembers() if not member.isdir()]
    return [str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names]


def sdist_faults(
    found: Collection[str], tracked: Collection[str], pinned: Collection[str]
) -> list[str]:
    """What is wrong with an sdist's files.

    Args:
        found: The files of the sdist.
        tracked: The files of the repository.
        pinned: The files of the materialised pin, by their path in the repository.
    """
    faults = differences(found, {*tracked, *pinned, "PKG-INFO"})
    faults += [f"no licence: {name}" for name in sorted(_SOURCE_LICENCES - set(found))]
    for name in sorted(found):
        if name.startswith("vendor/llama.cpp/") and not _CLIENTS.match(name):
            inner = name.removeprefix("vendor/llama.cpp/")
            if _FOREIGN.search(inner):
                faults.append(f"of llama.cpp, but no build needs it: {name}")
    return faults


def wheel_faults(
    path: Path, tracked: Collection[str], version: str, *, libraries: bool
) -> list[str]:
    """What is wrong with a wheel.

    Args:
        path: The wheel.
        tracked: The files of the repository.
        version: What it must say it is.
        libraries: Whether backends lie in it as libraries of their own.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        info = f"ai4all_native-{version}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode() if f"{info}/METADATA" in names else ""
    extensions = [name for name in names if _EXTENSION.match(name)]
    shipped = [name for name in names if _LIBRARY.match(name)]
    expected = {name for name in tracked if name.startswith("ai4all/")}
    expected |= {"ai4all/fixtures/long_prompt.txt", *LICENCES, *extensions}
    expected |= {f"{info}/{name}" for name in _METADATA}
    if libraries:
        expected |= {
            "ai4all/libs/libai4all-ggml.so",
            "ai4all/libs/libai4all-ggml-base.so",
            *shipped,
        }
    faults = differences(names, expected)
    if len(extensions) != 1:
        faults.append(f"one extension expected, found {extensions}")
    if libraries and not any("ggml-cpu" in name for name in shipped):
        faults.append("no CPU backend among the libraries")
    for name in ("ai4all/py.typed", "ai4all/_engine.pyi"):
        if name not in names:
            faults.append(f"no {name}: its users are not type-checked")
    if f"\nVersion: {version}\n" not in metadata:
        faults.append(f"the metadata does not say version {version}")
    return faults
