"""Toolchains that are not here, faked as far as configuring a build looks at them.

Each is a folder of small scripts and CMake packages. Compilers hand on to the real one, so that
CMake's own checks of them run; nothing is ever built with them.
"""

from __future__ import annotations

import stat
from pathlib import Path

__all__ = ["fake_rocm", "fake_xcode"]

_HIP_CLANG = """#!/bin/sh
# Says what ROCm's clang++ says, and compiles plain C++ in its place.
case " $* " in
  *" --version "*) echo "clang version 19.0.0 (a fake)"; exit 0 ;;
  *" -print-targets "*) echo "Found HIP installation: {root}, version 6.3" >&2; exit 0 ;;
esac
set -- "$@" --end--
while [ "$1" != --end-- ]; do
  case "$1" in
    --cuda-host-only|--hip-link|--offload-arch=*|--rtlib=*|-unwindlib=*) ;;
    -x) shift ;;
    *.hip|*.cu) set -- "$@" -x c++ "$1" -x none ;;
    *) set -- "$@" "$1" ;;
  esac
  shift
done
shift
exec c++ -D__HIP__ -D__clang__=1 -D__clang_major__=19 -D__clang_minor__=0 \
  -D__clang_patchlevel__=0 "$@"
"""

_PACKAGE = """if(NOT TARGET {target})
  add_library({target} INTERFACE IMPORTED)
endif()
"""

_VERSION = """set(PACKAGE_VERSION "{version}")
set(PACKAGE_VERSION_COMPATIBLE TRUE)
"""


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _package(
    root: Path, name: str, targets: tuple[str, ...], version: str, extra: str = ""
) -> None:
    folder = root / "lib/cmake" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = "".join(_PACKAGE.format(target=target) for target in targets) + extra
    (folder / f"{name}-config.cmake").write_text(config, encoding="utf-8")
    (folder / f"{name}-config-version.cmake").write_text(
        _VERSION.format(version=version), encoding="utf-8"
    )


def fake_rocm(root: Path, version: str = "6.3.0", without: str = "") -> Path:
    """ROCm below ``root``; returns its compiler.

    Args:
        root: An empty folder.
        version: What HIP says it is.
        without: A package to leave out.
    """
    runtime = 'set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET "hip-lang::device")\n'
    packages: dict[str, tuple[tuple[str, ...], str]] = {
        "hip-lang": (("hip-lang::device",), runtime),
        "hip": (("hip::host", "hip::device"), ""),
        "hipblas": (("roc::hipblas",), ""),
        "rocblas": (("roc::rocblas",), ""),
    }
    for name, (targets, extra) in packages.items():
        if name != without:
            _package(root, name, targets, version, extra)
    compiler = root / "llvm/bin/clang++"
    _script(compiler, _HIP_CLANG.format(root=root))
    return compiler


def fake_xcode(root: Path) -> Path:
    """A Mac's command line tools and frameworks below ``root``; returns a CMake toolchain file."""
    tools = root / "bin"
    sdk = root / "MacOSX.sdk"
    for name in ("Foundation", "Metal", "MetalKit"):
        (sdk / "System/Library/Frameworks" / f"{name}.framework").mkdir(parents=True)
    _script(tools / "xcode-select", f"#!/bin/sh\necho {root}\n")
    _script(tools / "xcrun", f"#!/bin/sh\necho {sdk}\n")
    _script(tools / "sw_vers", "#!/bin/sh\necho 14.0\n")
    for name in ("install_name_tool", "otool"):
        _script(tools / name, "#!/bin/sh\nexit 0\n")
    toolchain = root / "mac.cmake"
    toolchain.write_text(
        f"""set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_VERSION 23.0)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_SYSROOT "{sdk}")
set(CMAKE_OSX_ARCHITECTURES "")
set(CMAKE_OSX_DEPLOYMENT_TARGET "")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_INSTALL_NAME_TOOL "{tools}/install_name_tool")
set(CMAKE_FRAMEWORK_PATH "{sdk}/System/Library/Frameworks")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
""",
        encoding="utf-8",
    )
    return toolchain
