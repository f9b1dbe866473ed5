"""What is left of the handlers of signals when the work has ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from ai4all.commands.signals import on_stop_signals


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


async def test_a_signal_that_comes_after_the_end_changes_nothing() -> None:
    stopped = asyncio.Event()
    with on_stop_signals(stopped.set, deaf_at_end=True):
        os.kill(os.getpid(), signal.SIGTERM)
        await stopped.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


async def test_an_end_of_its_own_leaves_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_stop_signals(lambda: None, deaf_at_end=True):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loop_that_is_held_up_does_not_hold_up_the_signals() -> None:
    code = """
        import asyncio, os, time
        from ai4all.commands.signals import on_stop_signals

        async def main():
            with on_stop_signals(lambda: None, at_once=lambda: print("at once", flush=True)):
                print("ready", flush=True)
                reading, _ = os.pipe()
                os.read(reading, 1)

        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "at once\n"
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGTERM
