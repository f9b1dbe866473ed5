"""What ``doctor`` says about devices: what there is, what computes, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.backend.devices import TARGETS, Choice, choose_devices
from ai4all.backend.drivers import Card, cards
from ai4all.commands.check import Check
from ai4all.errors import DeviceUnavailable
from ai4all.types.model import DeviceInfo

__all__ = ["DeviceReport"]

_LOUD: Final = ("NVIDIA", "AMD")


class DeviceReport:
    """The devices of this machine under the owner's settings.

    Args:
        capabilities: What the engine sees.
        engine: What the owner asks for; the defaults where the settings cannot be read.
        in_slots: The GPUs that are plugged in; by default, those of this machine.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        engine: EngineOptions,
        in_slots: Sequence[Card] | None = None,
    ) -> None:
        self._devices = capabilities.devices
        self._build = capabilities.build_info
        self._engine = engine
        self._cards = cards() if in_slots is None else list(in_slots)
        self._problem: str | None = None
        self._choice = Choice(())
        try:
            self._choice = choose_devices(
                self._devices,
                engine.device,
                build=self._build,
                allow_cpu_fallback=engine.allow_cpu_fallback,
            )
        except DeviceUnavailable as error:
            self._problem = str(error)

    def checks(self) -> Iterator[Check]:
        """A line for each device, one for each card that is no device, one for the choice."""
        for device in self._devices:
            why = self._why_unused(device)
            status = "warning" if why is not None and device.memory_mb == 0 else "ok"
            yield Check(f"device {device.name}", status, _described(device, why))
        for card in self._strangers():
            status = "warning" if card.vendor in _LOUD else "ok"
            driver = card.driver or "no driver"
            detail = f"{card.vendor}, {driver}; not used: {self._why_stranger(card)}"
            yield Check(f"card {card.address}", status, detail)
        yield self._chosen()

    def to_list(self) -> list[dict[str, Any]]:
        """The devices as ``--json`` prints them, cards that are none among them."""
        found = [
            {**asdict(device), "used": self._is_used(device), "unused": self._why_unused(device)}
            for device in self._devices
        ]
        strangers = [
            {
                "name": None,
                "kind": "gpu",
                "description": card.vendor,
                "memory_mb": None,
                "memory_free_mb": None,
                "backend": None,
                "address": card.address,
                "driver": card.driver,
                "used": False,
                "unused": self._why_stranger(card),
            }
            for card in self._strangers()
        ]
        return found + strangers

    def _chosen(self) -> Check:
        asked = self._engine.device
        if self._problem is not None:
            return Check("device choice", "problem", self._problem)
        names = " and ".join(self._choice.names)
        if self._choice.fell_back is not None:
            return Check("device choice", "warning", f"{self._choice.fell_back}; {names} computes")
        if self._choice.lacking is not None:
            return Check("device choice", "warning", f"{self._choice.lacking}; {names} computes")
        if self._choice.gpus and self._engine.gpu_layers == 0:
            return Check("device choice", "ok", "CPU computes: engine.gpu_layers is 0")
        return Check("device choice", "ok", f"{names} computes (engine.device = {asked})")

    def _is_used(self, device: DeviceInfo) -> bool:
        if self._problem is not None:
            return False
        return not device.is_gpu or (device in self._choice.gpus and self._engine.gpu_layers != 0)

    def _why_unused(self, device: DeviceInfo) -> str | None:
        if self._is_used(device) or self._problem is not None:
            return None if self._problem is None or not device.is_gpu else self._problem
        if device in self._choice.gpus:
            return "engine.gpu_layers is 0"
        return self._choice.unused.get(device.name)

    def _strangers(self) -> list[Card]:
        known = {device.address.lower() for device in self._devices if device.address}
        return [card for card in self._cards if card.address.lower() not in known]

    def _why_stranger(self, card: Card) -> str:
        target = next(target for target in TARGETS if target.name == card.target)
        if not target.is_loaded(self._build):
            return target.missing(self._build)
        if card.driver is None:
            return "no driver has taken it; install the vendor's"
        return f"{target.name} is built in, but its driver does not show the card"


def _described(device: DeviceInfo, unused: str | None) -> str:
    parts = [device.description] if device.description else []
    if device.memory_mb:
        parts.append(f"{device.memory_free_mb:,} of {device.memory_mb:,} MiB free")
    if device.driver:
        parts.append(device.driver)
    text = ", ".join(parts)
    return f"{text}; not used: {unused}" if unused is not None else text
