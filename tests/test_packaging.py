"""The checks of ``packaging.py`` see what they are there to see."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from archives import LICENCES, differences, sdist_faults, wheel_faults

from ai4all import __version__

ROOT = Path(__file__).resolve().parents[1]

TRACKED = ["LICENSE", "ai4all/__init__.py", "ai4all/_engine.pyi", "ai4all/py.typed", "tests/t.py"]
PINNED = [
    "vendor/llama.cpp/LICENSE",
    "vendor/llama.cpp/licenses/LICENSE-jsonhpp",
    "vendor/llama.cpp/src/models/llama.cpp",
    "vendor/llama.cpp/vendor/cpp-httplib/LICENSE",
]
INFO = "ai4all_native-1.2.3.dist-info"
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
WHEEL = [
    *(name for name in TRACKED if name.startswith("ai4all/")),
    "ai4all/_engine.cpython-311-x86_64-linux-gnu.so",
    "ai4all/fixtures/long_prompt.txt",
    *LICENCES,
    *(f"{INFO}/{name}" for name in METADATA),
]
LIBRARIES = [
    "ai4all/libs/libai4all-ggml.so",
    "ai4all/libs/libai4all-ggml-base.so",
    "ai4all/libs/libggml-cpu-haswell.so",
]


def wheel_of(names: list[str], folder: Path, version: str = "1.2.3") -> Path:
    path = folder / f"ai4all_native-{version}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            text = f"Name: x\nVersion: {version}\n" if name.endswith("METADATA") else ""
            archive.writestr(name, text)
    return path


def test_differences_name_each_file() -> None:
    assert differences(["a", "b"], ["b", "c"]) == ["missing: c", "foreign: a"]
    assert differences(["a", "a"], ["a"]) == ["some names are there twice"]


class TestSdist:
    whole = (*TRACKED, *PINNED, "PKG-INFO")

    def test_whole(self) -> None:
        assert sdist_faults(self.whole, TRACKED, PINNED) == []

    @pytest.mark.parametrize(
        "name", ["ai4all/__init__.py", "vendor/llama.cpp/licenses/LICENSE-jsonhpp", "PKG-INFO"]
    )
    def test_something_is_missing(self, name: str) -> None:
        left = [other for other in self.whole if other != name]
        assert f"missing: {name}" in sdist_faults(left, TRACKED, PINNED)

    @pytest.mark.parametrize(
        "name",
        [
            "vendor/llama.cpp/tests/test-sampling.cpp",
            "vendor/llama.cpp/tools/server/server.cpp",
            "vendor/llama.cpp/ggml/test.gguf",
        ],
    )
    def test_more_of_llama_cpp_than_a_build_needs(self, name: str) -> None:
        # Also where the pin itself would have kept it.
        faults = sdist_faults([*self.whole, name], TRACKED, [*PINNED, name])
        assert faults == [f"of llama.cpp, but no build needs it: {name}"]

    def test_left_by_a_build(self) -> None:
        found = [*self.whole, "build/x.o"]
        assert sdist_faults(found, TRACKED, PINNED) == ["foreign: build/x.o"]


class TestWheel:
    def test_whole(self, tmp_path: Path) -> None:
        assert wheel_faults(wheel_of(WHEEL, tmp_path), TRACKED, "1.2.3", libraries=False) == []
        both = wheel_of([*WHEEL, *LIBRARIES], tmp_path)
        assert wheel_faults(both, TRACKED, "1.2.3", libraries=True) == []

    @pytest.mark.parametrize("name", ["ai4all/py.typed", "ai4all/licenses/llama.cpp.txt"])
    def test_something_is_missing(self, tmp_path: Path, name: str) -> None:
        wheel = wheel_of([other for other in WHEEL if other != name], tmp_path)
        assert f"missing: {name}" in wheel_faults(wheel, TRACKED, "1.2.3", libraries=False)

    @pytest.mark.parametrize(
        "name", ["tests/t.py", "include/ggml.h", "lib/libllama.a", "ai4all/_engine.cpp", *LIBRARIES]
    )
    def test_something_is_foreign(self, tmp_path: Path, name: str) -> None:
        wheel = wheel_of([*WHEEL, name], tmp_path)
        assert wheel_faults(wheel, TRACKED, "1.2.3", libraries=False) == [f"foreign: {name}"]

    def test_two_extensions(self, tmp_path: Path) -> None:
        wheel = wheel_of([*WHEEL, "ai4all/_engine.abi3.so"], tmp_path)
        (fault,) = wheel_faults(wheel, TRACKED, "1.2.3", libraries=False)
        assert fault.startswith("one extension expected")

    def test_no_cpu_backend(self, tmp_path: Path) -> None:
        wheel = wheel_of([*WHEEL, *LIBRARIES[:2]], tmp_path)
        (fault,) = wheel_faults(wheel, TRACKED, "1.2.3", libraries=True)
        assert fault == "no CPU backend among the libraries"

    def test_another_version(self, tmp_path: Path) -> None:
        wheel = wheel_of(WHEEL, tmp_path)
        assert wheel_faults(wheel, TRACKED, "9.9.9", libraries=False) != []


def test_the_version_is_written_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["scikit-build"]["metadata"]["version"]["input"] == "ai4all/__init__.py"
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "file(STRINGS ai4all/__init__.py" in cmake
    assert not re.search(rf"\b{re.escape(__version__)}\b", cmake)
