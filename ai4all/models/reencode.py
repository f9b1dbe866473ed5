"""Re-encoding a model's weights, in a process of its own: a failed assertion ends that one only.

Run as a module, this file is that process: it writes one JSON line and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Final

import ujson

from ai4all.backend.crash_records import assertion_in, signal_name
from ai4all.backend.engine_process import engine_environment
from ai4all.errors import Ai4allError, EngineCrashed
from ai4all.models.files import check_free_space

__all__ = ["BITS_PER_WEIGHT", "reencode"]

BITS_PER_WEIGHT: Final = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7,
    "Q5_K_S": 5.5, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_K_M": 4.9, "Q4_K_S": 4.6, "Q4_0": 4.5,
    "IQ4_NL": 4.5,
}  # fmt: skip
"""The types that can be made, and about how many bits a weight takes in each."""

_MODULE: Final = "ai4all.models.reencode"
_DONE, _REFUSED = 0, 3
_STDERR_KEPT = 64 * 1024


async def reencode(
    source: Path, target: Path, type_name: str, *, threads: int, disk_reserve_bytes: int = 0
) -> None:
    """Write the model ``source`` to ``target`` with its weights as ``type_name``.

    Weights that have less precision already do not get any back. When it fails or is cancelled,
    there is no ``target``.

    Args:
        source: A GGUF file.
        target: The file to write.
        type_name: A key of ``BITS_PER_WEIGHT``.
        threads: Threads to compute with.
        disk_reserve_bytes: Bytes of the disk to leave free.

    Raises:
        BadRequest: There is no such type.
        LoadFailed: The model cannot be re-encoded.
        EngineCrashed: The process died of it.
        DataDirectoryError: The disk has no room for it.
    """
    check_free_space(target.parent, _largest_size(source, type_name), disk_reserve_bytes)
    # -P: nothing in the current directory can stand in for a module.
    command = [sys.executable, "-P", "-m", _MODULE]
    process = await asyncio.create_subprocess_exec(
        *command,
        source,
        target,
        type_name,
        str(threads),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=engine_environment(os.environ),
    )
    try:
        output, complaints = await process.communicate()
        if process.returncode != _DONE:
            raise _failure(process.returncode or 0, output, complaints[-_STDERR_KEPT:])
    except BaseException:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        _discard(target)
        raise


def _largest_size(source: Path, type_name: str) -> int:
    # Some tensors stay as they are, and a type nobody knows is refused soon enough.
    size = source.stat().st_size
    return int(size * max(1.0, BITS_PER_WEIGHT.get(type_name, 0.0) / 4.5))


def _discard(target: Path) -> None:
    target.unlink(missing_ok=True)


def _failure(status: int, output: bytes, complaints: bytes) -> Ai4allError:
    from ai4all.backend.channel import error_from_wire

    if status == _REFUSED:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return error_from_wire(*ujson.loads(output))
    if status < 0:
        how = assertion_in(complaints.decode(errors="replace")) or f"signal {signal_name(-status)}"
    else:
        how = f"exit status {status}"
    return EngineCrashed(f"the process that re-encodes the model died: {how}")


def main(source: str, target: str, type_name: str, threads: str) -> int:
    """Re-encode in this process; print what went wrong as a JSON line. Returns the exit status."""
    from ai4all.backend.channel import error_to_wire
    from ai4all.backend.native import quantize_file

    try:
        quantize_file(Path(source), Path(target), type_name, int(threads))
    except Ai4allError as error:
        print(ujson.dumps(error_to_wire(error)), flush=True)
        return _REFUSED
    return _DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
