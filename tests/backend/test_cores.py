from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ai4all.backend import cores
from ai4all.backend.cores import (
    cgroup_cpu_limit,
    cgroup_memory_available_mb,
    cgroup_memory_limit_mb,
    compute_threads,
    usable_cores,
)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_version_2_takes_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/system/app\n")
    write(root, cpu__max="max 100000")
    write(root / "system", cpu__max="150000 100000", memory__max=str(512 << 20))
    write(root / "system" / "app", cpu__max="max 100000", memory__max="max")
    assert cgroup_cpu_limit(root, membership) == 1.5
    assert cgroup_memory_limit_mb(root, membership) == 512


def test_cgroup_version_1(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n")
    write(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(root / "cpu" / "docker" / "abc", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(root / "memory" / "docker" / "abc", memory__limit_in_bytes=str(64 << 20))
    assert cgroup_cpu_limit(root, membership) == 0.5
    assert cgroup_memory_limit_mb(root, membership) == 64


def test_memory_in_use_is_not_left_but_idle_pages_are(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/app\n")
    write(root, memory__max="max", memory__current="1")
    app = root / "app"
    write(app, memory__max=str(100 << 20), memory__current=str(90 << 20))
    assert cgroup_memory_available_mb(root, membership) == 10
    write(app, memory__stat=f"anon 5\ninactive_file {30 << 20}\nactive_file 7\n")
    assert cgroup_memory_available_mb(root, membership) == 40
    write(app, memory__current=str(500 << 20))
    assert cgroup_memory_available_mb(root, membership) == 0
    assert cgroup_memory_available_mb(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize("quota", ["max 100000", "rubbish", "", "100000 0"])
def test_no_usable_quota_is_no_limit(tmp_path: Path, quota: str) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    write(tmp_path / "cgroup", cpu__max=quota)
    assert cgroup_cpu_limit(tmp_path / "cgroup", tmp_path / "membership") is None


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_cpu_limit(tmp_path, tmp_path / "absent") is None
    assert cgroup_memory_limit_mb(tmp_path, tmp_path / "absent") is None


def test_a_quota_lowers_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cgroup_cpu_limit", lambda: 0.25)
    assert usable_cores() == 0.25


@pytest.mark.parametrize(
    ("usable", "physical", "threads"),
    [(8, 4, 4), (2, 4, 2), (2.5, 4, 2), (0.25, 4, 1), (None, 4, 1), (4, None, 4)],
)
def test_threads_are_physical_cores_within_what_is_usable(
    monkeypatch: pytest.MonkeyPatch, usable: float | None, physical: int | None, threads: int
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    assert compute_threads() == threads
