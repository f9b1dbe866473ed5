"""The files of Linux that tell of GPUs and their drivers, in a folder of a test's own."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """A file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def add_module(root: Path, name: str, version: str | None) -> None:
    """A driver that is loaded; one that comes with the kernel has no version of its own."""
    (root / "sys/module" / name).mkdir(parents=True, exist_ok=True)
    if version is not None:
        write(root / "sys/module" / name / "version", version)


def add_card(
    root: Path, address: str, *, vendor: str, driver: str | None, kind: str = "0x030000"
) -> Path:
    """A card in a slot; returns its folder."""
    folder = root / "sys/bus/pci/devices" / address
    write(folder / "vendor", vendor)
    write(folder / "class", kind)
    if driver is not None:
        owner = root / "sys/bus/pci/drivers" / driver
        owner.mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(owner)
    return folder


def add_amd_figures(folder: Path, **changes: str) -> None:
    """What ``amdgpu`` shows of a card: a quarter busy, 2 of 8 GiB, 61.5 degrees, 142 W."""
    figures = {
        "gpu_busy_percent": "25",
        "mem_info_vram_used": str(2 << 30),
        "mem_info_vram_total": str(8 << 30),
        "hwmon/hwmon4/temp1_input": "61500",
        "hwmon/hwmon4/power1_average": "142000000",
    }
    for name, value in (figures | changes).items():
        write(folder / name, value)
