"""An engine process whose engine is scripted: ``scripted_host.py SCRIPT`` and the host's arguments.

SCRIPT is a JSON object: the arguments of ``FakeBackend`` and, below ``generation``, those of
``ScriptedGeneration``. ``pulse`` true: the pulse moves although nothing else does. ``say``: a raw
text to write to the socket in answer to the first command; ``answer``: the same to each generation,
which then never ends. ``unavailable``: why no engine can run.
``exit``: end at once with that status. ``sleep``: do nothing for so many seconds. ``devices``:
fields of each device; ``devices_file``: a file with them, which may change between two starts.
``die_of_devices``: die when asked for them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ujson

from ai4all.backend import host
from ai4all.backend.base import GenerateRequest, GenerationEvent, InferenceBackend
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import EngineUnavailable
from ai4all.types.model import DeviceInfo


def command(**script: Any) -> list[str]:
    """The command line of such a process."""
    return [sys.executable, "-P", __file__, ujson.dumps(script)]


class _ScriptedBackend(FakeBackend):
    def __init__(self, script: dict[str, Any], descriptor: int) -> None:
        self._pulses = itertools.count(1) if script.pop("pulse", False) else itertools.repeat(0)
        self._say = script.pop("say", None)
        self._answer = script.pop("answer", None)
        self._descriptor = descriptor
        if "devices_file" in script:
            script["devices"] = ujson.loads(Path(script.pop("devices_file")).read_text())
        if "devices" in script:
            script["devices"] = [DeviceInfo(**fields) for fields in script["devices"]]
        self._dies = script.pop("die_of_devices", False)
        super().__init__(ScriptedGeneration(**script.pop("generation", {})), **script)

    async def load(self, *arguments: Any, **more: Any) -> Any:
        if self._say is not None:
            self._write(self._say)
        return await super().load(*arguments, **more)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        if self._answer is not None:
            self._write(self._answer)
            await asyncio.Event().wait()
        async for event in super().generate(request):
            yield event

    def _write(self, text: str) -> None:
        payload = text.encode()
        os.write(self._descriptor, struct.pack("!I", len(payload)) + payload)

    async def devices(self) -> tuple[DeviceInfo, ...]:
        if self._dies:
            os.abort()
        return await super().devices()

    def pulse(self) -> int:
        return next(self._pulses)


def main() -> None:
    script = ujson.loads(sys.argv[1])
    if "exit" in script:
        sys.exit(script["exit"])
    time.sleep(script.pop("sleep", 0))

    def opener() -> InferenceBackend:
        if "unavailable" in script:
            raise EngineUnavailable(script["unavailable"])
        return _ScriptedBackend(script, int(sys.argv[2]))

    host.main(sys.argv[2:], opener)


if __name__ == "__main__":
    main()
