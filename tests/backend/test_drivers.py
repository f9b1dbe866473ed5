from __future__ import annotations

import platform
from pathlib import Path

import pytest
from fake_sysfs import add_card, add_module

from ai4all.backend.drivers import Card, cards, driver_of


def test_cards_are_found_in_their_slots(tmp_path: Path) -> None:
    add_card(tmp_path, "0000:01:00.0", vendor="0x10de", driver="nvidia")
    add_card(tmp_path, "0000:03:00.0", vendor="0x1002", driver="amdgpu")
    add_card(tmp_path, "0000:00:02.0", vendor="0x8086", driver=None)
    # A sound device of the same vendor, and the screen of a virtual machine.
    add_card(tmp_path, "0000:01:00.1", vendor="0x10de", driver=None, kind="0x040300")
    add_card(tmp_path, "0000:00:01.0", vendor="0x1234", driver=None)
    add_module(tmp_path, "nvidia", "550.54.14")
    add_module(tmp_path, "amdgpu", None)
    assert cards(tmp_path) == [
        Card("0000:00:02.0", "Intel", None),
        Card("0000:01:00.0", "NVIDIA", "nvidia 550.54.14"),
        Card("0000:03:00.0", "AMD", f"amdgpu of Linux {platform.release()}"),
    ]
    assert [card.target for card in cards(tmp_path)] == ["vulkan", "cuda", "rocm"]


def test_the_driver_of_a_device_is_the_one_in_its_slot(tmp_path: Path) -> None:
    add_card(tmp_path, "0000:01:00.0", vendor="0x10de", driver="nouveau")
    add_module(tmp_path, "nvidia", "550.54.14")
    add_module(tmp_path, "nouveau", "1.3")
    assert driver_of("vulkan", "0000:01:00.0", tmp_path) == "nouveau 1.3"
    assert driver_of("cuda", "", tmp_path) == "nvidia 550.54.14"
    assert driver_of("cuda", "0000:FF:00.0", tmp_path) == "nvidia 550.54.14"
    assert driver_of("rocm", "", tmp_path) is None
    assert driver_of("cpu", "", tmp_path) is None


def test_a_system_that_tells_nothing_has_no_cards(tmp_path: Path) -> None:
    assert cards(tmp_path / "absent") == []
    assert driver_of("cuda", "0000:01:00.0", tmp_path / "absent") is None


def test_an_apple_gpu_has_the_systems_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    assert driver_of("metal") == "macOS 14.5"
