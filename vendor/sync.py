"""Materialise the pinned llama.cpp source in vendor/llama.cpp.

The source distribution named in ``llama.cpp.toml`` is fetched with pip, from whatever index the
user's pip is set to, checked against its sha256, and unpacked into this folder and nowhere else.
Standard library only: it runs inside an isolated build environment. Does nothing when the tree
already is what the pin says.

Usage: python vendor/sync.py [--force] [--archive FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
PIN_FILE = HERE / "llama.cpp.toml"
TREE = HERE / "llama.cpp"
STAMP = ".pin"

# Several times what the pinned tree has.
MAX_FILES = 20_000
MAX_BYTES = 512 << 20
MAX_DEPTH = 64

HOW_TO_FIX = """\
To build without network access, use one of:
  * our source distribution, which carries this tree;
  * a downloaded archive:  python vendor/sync.py --archive {archive}
  * another checkout:      cmake -DAI4ALL_LLAMA_SOURCE_DIR=/path/to/llama.cpp
                           (pip: -C cmake.define.AI4ALL_LLAMA_SOURCE_DIR=/path/to/llama.cpp)"""


class SyncError(Exception):
    """The tree could not be materialised; the message says what to do."""


def read_pin() -> dict[str, Any]:
    """The pin, as written in ``llama.cpp.toml``."""
    return tomllib.loads(PIN_FILE.read_text(encoding="utf-8"))


def stamp_of(pin: dict[str, Any]) -> str:
    """What a tree is known by: the archive, and what was kept of it."""
    return f"{pin['sha256']}\n{' '.join(pin['kept'])}\n"


def is_current(pin: dict[str, Any]) -> bool:
    """Whether the tree on disk is the pinned one."""
    stamp = TREE / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == stamp_of(pin)


def download(pin: dict[str, Any], folder: Path) -> Path:
    """Fetch the pinned source distribution with the user's pip.

    Raises:
        SyncError: pip is missing, or could not get the file.
    """
    requirement = f"{pin['package']}=={pin['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", pin["package"], "--dest", str(folder), requirement]
    output = ""
    # pip prepares metadata even for a plain download. Without isolation that takes seconds, but
    # needs the package's build backend in this environment; with isolation pip fetches it.
    for extra in (["--no-build-isolation"], []):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        found = sorted(folder.glob("*.tar.gz"))
        if done.returncode == 0 and found:
            return found[0]
        output = (done.stderr or done.stdout).strip()
    if "No module named pip" in output:
        raise SyncError(f"{sys.executable} has no pip; install it with: python -m ensurepip")
    tail = "\n".join(output.splitlines()[-8:])
    raise SyncError(f"pip could not download {requirement}:\n{tail}")


def check(archive: Path, expected: str) -> None:
    """Compare the archive with the pin.

    Raises:
        SyncError: The bytes are not the pinned ones.
    """
    digest = hashlib.sha256()
    with archive.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise SyncError(f"{archive.name}: sha256 is {digest.hexdigest()}, the pin says {expected}")


def unpack(archive: Path, pin: dict[str, Any], target: Path) -> None:
    """Write the kept paths of the archive below ``target``.

    Only regular files are written, each once and under a path made of plain components, so that
    nothing in an archive can reach outside; and no more than ``MAX_BYTES`` in ``MAX_FILES``.

    Raises:
        SyncError: A member's path is not plain, there is too much, or nothing was kept.
    """
    kept = set(pin["kept"])
    count = size = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(pin["member_prefix"]):
                continue
            parts = plain_parts(member.name.removeprefix(pin["member_prefix"]))
            if parts is None or member.size < 0:
                raise SyncError(f"{archive.name}: refusing the member {member.name!r}")
            if parts[0] not in kept:
                continue
            count, size = count + 1, size + member.size
            if count > MAX_FILES or size > MAX_BYTES:
                raise SyncError(f"{archive.name}: holds more than a source tree would")
            source = tar.extractfile(member)
            assert source is not None  # a regular file always opens
            path = target.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Anew each time: a file that is there already is one of the same name.
            with source, path.open("xb") as out:
                shutil.copyfileobj(source, out)
            if member.mode & 0o100:
                path.chmod(0o755)
    if not count:
        raise SyncError(f"{archive.name}: holds nothing below {pin['member_prefix']}")


def plain_parts(name: str) -> tuple[str, ...] | None:
    """The components of a relative path, or None when it is anything but one."""
    path = PurePosixPath(name)
    odd = path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable()
    return path.parts if not odd and 0 < len(path.parts) <= MAX_DEPTH else None


def sync(archive: Path | None, *, force: bool) -> bool:
    """Bring the tree to the pin; return whether anything was done.

    Raises:
        SyncError: As above, or the folder cannot be written.
    """
    pin = read_pin()
    if is_current(pin) and not force:
        return False
    with tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=HERE) as temporary:
        folder = Path(temporary)
        source = archive or download(pin, folder)
        check(source, pin["sha256"])
        fresh = folder / "tree"
        unpack(source, pin, fresh)
        (fresh / STAMP).write_text(stamp_of(pin), encoding="utf-8")
        if TREE.exists():
            shutil.rmtree(TREE)
        fresh.rename(TREE)
    return True


def main() -> int:
    """Run from the command line; 0 when the tree is as pinned."""
    parser = argparse.ArgumentParser(description="Materialise the pinned llama.cpp source.")
    parser.add_argument("--archive", type=Path, help="use this file instead of downloading")
    parser.add_argument("--force", action="store_true", help="unpack again even if up to date")
    arguments = parser.parse_args()
    try:
        done = sync(arguments.archive, force=arguments.force)
    except (SyncError, OSError, tarfile.TarError) as error:
        pin = read_pin()
        archive = f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
        print(f"vendor/sync.py: {error}\n{HOW_TO_FIX.format(archive=archive)}", file=sys.stderr)
        return 1
    print(f"vendor/llama.cpp: {'unpacked' if done else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
