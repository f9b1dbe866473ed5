"""What a worker has promised, and whether it still holds: the device, and the speed of it.

A device is promised when the worker registers with it. When it goes, or has no room any more, the
engine could still compute on the CPU, ten or a hundred times slower. That is never done silently:
the worker says that it is degraded, and takes no work unless its owner allowed it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import structlog

from ai4all.backend.base import Capabilities, Completion, EngineOptions, LoadedModel
from ai4all.backend.devices import CPU, choose_devices, device_label, gpus_in
from ai4all.benchmark.speed_watch import SpeedBaseline, SpeedWatch, fair_rate
from ai4all.clock import SYSTEM_CLOCK, Clock
from ai4all.errors import DeviceUnavailable, OutOfMemory
from ai4all.models.offload import Offload
from ai4all.types.model import ModelFile

__all__ = ["WorkerHealth"]

_log = structlog.get_logger(__name__)

_DEVICE: Final = "device"
_SPEED: Final = "speed"


class WorkerHealth:
    """Follows what the worker runs on. Belongs to the loop's thread.

    Args:
        capabilities: Of the backend, when the worker starts.
        engine: What the owner asked for.
        whole: Digests of models that are known to have run with every layer on the device.
        clock: What tells the time.

    Raises:
        DeviceUnavailable: The device that the owner named is not to be had, and nothing else
            is allowed.

    Attributes:
        promised: The label of the device that the worker registers with.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        engine: EngineOptions,
        *,
        whole: Collection[str] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._may_fall_back = engine.allow_cpu_fallback
        self._clock = clock
        self._reasons: dict[str, str] = {}
        self._whole = set(whole)
        self._watch: SpeedWatch | None = None
        choice = choose_devices(
            capabilities.devices,
            engine.device,
            build=capabilities.build_info,
            allow_cpu_fallback=engine.allow_cpu_fallback,
        )
        gpus = choice.gpus if engine.gpu_layers else ()
        self._gpus = tuple(gpu.name for gpu in gpus)
        self.promised = device_label(self._gpus, whole=True)
        if choice.fell_back is not None:
            self._note(_DEVICE, f"{choice.fell_back}; computing on the CPU")

    # What is known.

    @property
    def degraded(self) -> str | None:
        """Why the worker is not what it was promised to be; None while it is."""
        return "; ".join(self._reasons.values()) or None

    @property
    def is_refusing(self) -> bool:
        """Whether work is refused until the device is back."""
        return _DEVICE in self._reasons and not self._may_fall_back

    @property
    def misses_device(self) -> bool:
        """Whether a device that was there once is not what computes."""
        return _DEVICE in self._reasons and bool(self._gpus)

    @property
    def is_watching(self) -> bool:
        """Whether the speed is compared with anything."""
        return self._watch is not None

    def refusal(self) -> DeviceUnavailable:
        """What a block is answered with meanwhile."""
        return DeviceUnavailable(f"the worker is degraded: {self.degraded}")

    def sees_device(self, capabilities: Capabilities) -> bool:
        """Whether the engine sees all that was promised."""
        return not self._gone(capabilities)

    # What happens.

    def look(self, capabilities: Capabilities, loaded: LoadedModel | None) -> None:
        """Compare what was promised with what the engine sees, and with what it runs on."""
        gone = self._gone(capabilities)
        if gone:
            names = " and ".join(gone)
            self._note(_DEVICE, f"{names} was promised, but the engine does not see it any more")
        elif loaded is not None:
            self._judge(loaded)

    def approve(self, model: ModelFile, plan: Offload) -> None:
        """Refuse a load that would not be what was promised, before anything is loaded.

        Raises:
            DeviceUnavailable: It would run elsewhere than promised.
            OutOfMemory: The model is too large for the device even when that is empty.
        """
        missing = self._missing(model.sha256, plan.label)
        if missing is None:
            return
        why = plan.limited_by or "the engine does not see it any more"
        if plan.choice.gpus and not plan.fits_when_empty:
            # The model's fault: others may still run as promised.
            if not self._may_fall_back:
                raise OutOfMemory(f"{missing}: {why}; engine.allow_cpu_fallback permits the CPU")
            return
        self._note(_DEVICE, f"{missing}: {why}")
        if not self._may_fall_back:
            raise self.refusal()

    def could_not_load(self, model: ModelFile, error: Exception) -> None:
        """Take the failure of a load. One that succeeded here before is no fault of the model."""
        if model.sha256 in self._whole and not isinstance(error, DeviceUnavailable):
            # The error itself may name a file, which is no coordinator's business.
            _log.warning("device_takes_no_load", model_id=model.model_id, error=str(error))
            self._note(_DEVICE, f"{self.promised} does not take {model.model_id} any more")

    def confirm(self, loaded: LoadedModel) -> None:
        """Look at what a model really runs on.

        Raises:
            DeviceUnavailable: It is not what was promised, and nothing else is allowed.
        """
        self._judge(loaded)
        if self.is_refusing:
            raise self.refusal()

    def expect(self, baseline: SpeedBaseline | None) -> None:
        """Compare the speed with ``baseline`` from now on; None: with nothing."""
        self._clear(_SPEED)
        self._watch = None if baseline is None else SpeedWatch(baseline, self._clock.monotonic)

    def saw(self, completion: Completion) -> None:
        """Take the speed of a generation that ran undisturbed."""
        fair = fair_rate(completion)
        if self._watch is None or fair is None:
            return
        self._watch.saw(*fair)
        share = self._watch.share
        if not self._watch.is_slow:
            self._clear(_SPEED)
        elif share is not None:
            self._note(_SPEED, f"computes at {share:.0%} of the speed that its benchmark measured")

    # Behind it.

    def _gone(self, capabilities: Capabilities) -> list[str]:
        here = {device.name for device in capabilities.devices if device.memory_mb > 0}
        return [name for name in self._gpus if name not in here]

    def _judge(self, loaded: LoadedModel) -> None:
        missing = self._missing(loaded.file.sha256, loaded.device)
        if missing is not None:
            self._note(_DEVICE, missing)
        elif self._gpus:
            self._clear(_DEVICE)
            if CPU not in loaded.device.split("+"):
                self._whole.add(loaded.file.sha256)

    def _missing(self, sha256: str, label: str) -> str | None:
        """What is wrong with running a model on ``label``; None when nothing is."""
        if not self._gpus:
            return None
        if not set(self._gpus) & set(gpus_in(label)):
            return f"runs on {label}, promised was {self.promised}"
        if sha256 in self._whole and CPU in label.split("+"):
            return f"runs in part on the CPU, promised was {self.promised}"
        return None

    def _note(self, kind: str, reason: str) -> None:
        if kind not in self._reasons:
            hint = "`ai4all-native benchmark` measures anew, `doctor` looks at the devices"
            _log.warning("degraded", reason=reason, refusing=not self._may_fall_back, hint=hint)
        self._reasons[kind] = reason

    def _clear(self, kind: str) -> None:
        if self._reasons.pop(kind, None) is not None:
            _log.info("recovered", what=kind)
