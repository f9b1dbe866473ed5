"""How much of the machine this process may use: affinity and container limits count."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = [
    "cgroup_cpu_limit",
    "cgroup_memory_available_mb",
    "cgroup_memory_limit_mb",
    "compute_threads",
    "usable_cores",
]

_MIB = 1024 * 1024


def compute_threads() -> int:
    """Threads to compute with: one for each physical core this process may use, at least one.

    A second hardware thread on a core adds nothing to kernels that already fill its vector units.
    """
    usable = usable_cores() or 1
    physical = psutil.cpu_count(logical=False) or usable
    return max(1, math.floor(min(usable, physical)))


def usable_cores() -> float | None:
    """Hardware threads this process may use, a fraction where a quota says so; None if unknown."""
    if hasattr(os, "sched_getaffinity"):
        cores: float | None = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    limit = cgroup_cpu_limit()
    if cores is None or limit is None:
        return cores
    return min(cores, limit)


def cgroup_cpu_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """The tightest CPU quota over this process, in hardware threads; None without one."""
    limits = []
    for folder in _cgroup_folders(root, membership, "cpu"):
        quota, period = "max", "100000"
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
        with contextlib.suppress(OSError):
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        with contextlib.suppress(ValueError, ZeroDivisionError):
            limit = int(quota) / int(period)
            # Version 1 writes -1 for "no quota"; version 2 writes "max", which is no number.
            if limit > 0 and math.isfinite(limit):
                limits.append(limit)
    return min(limits, default=None)


def cgroup_memory_limit_mb(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The tightest memory limit over this process, in MiB; None without one."""
    limits = []
    for folder in _cgroup_folders(root, membership, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()) // _MIB)
    return min(limits, default=None)


def cgroup_memory_available_mb(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the memory limits over this process leave, in MiB; None without one.

    Cached file pages that are not in use count as left: the kernel drops them first.
    """
    left = []
    for folder in _cgroup_folders(root, membership, "memory"):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                left.append(max(0, most - used + _statistic(folder / "memory.stat", cache)))
    return min(left) // _MIB if left else None


def _statistic(file: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _cgroup_folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the folders, innermost first, whose limits bind this process."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        folder = base / path.lstrip("/")
        yield folder
        for parent in folder.parents:
            if not parent.is_relative_to(base):
                break
            yield parent
