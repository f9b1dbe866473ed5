"""Drivers and cards as the system tells of them, whatever the engine was built for.

Everything is read from small files of the kernel; what is not there is not known.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Card", "PCI_DEVICES", "cards", "driver_of", "read_text"]

_VENDORS: Final = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_TARGET_OF_VENDOR: Final = {"NVIDIA": "cuda", "AMD": "rocm", "Intel": "vulkan"}
_MODULE_OF_BACKEND: Final = {"cuda": "nvidia", "rocm": "amdgpu"}
_DISPLAY_CONTROLLER: Final = "0x03"

PCI_DEVICES: Final = "sys/bus/pci/devices"
"""Where the kernel shows each card in a folder named by its address, below the root."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU in a slot of this machine.

    Attributes:
        address: Its PCI address, as ``DeviceInfo.address``.
        vendor: "NVIDIA", "AMD" or "Intel".
        driver: Its driver and version, or None when no driver has taken it.
    """

    address: str
    vendor: str
    driver: str | None

    @property
    def target(self) -> str:
        """The hardware target that would compute on it."""
        return _TARGET_OF_VENDOR[self.vendor]


def cards(root: Path = Path("/")) -> list[Card]:
    """The GPUs in the slots of this machine, by address; empty where the system does not tell."""
    return list(_cards(root))


def _cards(root: Path) -> Iterator[Card]:
    try:
        folders = sorted((root / PCI_DEVICES).iterdir())
    except OSError:
        return
    for folder in folders:
        vendor = _VENDORS.get(read_text(folder / "vendor") or "")
        kind = read_text(folder / "class") or ""
        if vendor is not None and kind.startswith(_DISPLAY_CONTROLLER):
            module = _module_at(folder)
            yield Card(folder.name, vendor, None if module is None else _version(module, root))


def driver_of(backend: str, address: str = "", root: Path = Path("/")) -> str | None:
    """Name and version of the driver of a device.

    Args:
        backend: As ``DeviceInfo.backend``.
        address: As ``DeviceInfo.address``.
        root: Where the system's files are.
    """
    if backend == "metal" and sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    module = _module_at(root / PCI_DEVICES / address.lower()) if address else None
    module = module or _MODULE_OF_BACKEND.get(backend)
    return None if module is None else _version(module, root)


def _module_at(folder: Path) -> str | None:
    try:
        return (folder / "driver").resolve(strict=True).name
    except OSError:
        return None


def _version(module: str, root: Path) -> str | None:
    version = read_text(root / "sys/module" / module / "version")
    if version is not None:
        return f"{module} {version}"
    if not (root / "sys/module" / module).is_dir():
        return None
    # A module that comes with the kernel has the kernel's version.
    return f"{module} of Linux {platform.release()}"


def read_text(file: Path) -> str | None:
    """What a small file of the kernel says; None where it says nothing, or cannot be read."""
    # A card that sleeps answers some of these with an error.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip() or None
    return None
