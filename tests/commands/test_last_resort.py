from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import pytest

from ai4all.coordinator import EmbeddedCoordinator, Event, EventKind


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_hangs_is_left_and_said() -> None:
    done = run(
        """
        import threading
        from ai4all.commands.last_resort import LastResort

        with LastResort() as last_resort:
            last_resort.light(60.0, 4, "too late")
            last_resort.light(0.05, 3, "it hangs")
            threading.Event().wait()
        """
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "ai4all-native: it hangs\n"


def test_what_ends_by_itself_is_let_alone() -> None:
    done = run(
        """
        import time
        from ai4all.commands.last_resort import LastResort

        with LastResort() as last_resort:
            last_resort.light(0.2, 3, "it hangs")
        time.sleep(0.5)
        print("alive")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


SLEEPY_MAIN = """
    import asyncio, sys, time
    from ai4all.backend.fake import FakeBackend, ScriptedGeneration
    from ai4all.cli import main
    from ai4all.commands.environment import Environment

    def open_backend():
        # A thread that nobody can interrupt, as one that hashes a large model.
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 300)
        return FakeBackend(ScriptedGeneration(token_ms=1.0), time_scale=0.0)

    sys.exit(main(sys.argv[1:], Environment(open_backend)))
"""


@pytest.mark.usefixtures("data_dir")
async def test_a_thread_that_goes_on_does_not_keep_a_worker_that_has_ended() -> None:
    registered = asyncio.Event()

    def watch(event: Event) -> None:
        if event.kind is EventKind.REGISTERED:
            registered.set()

    async with EmbeddedCoordinator([], on_event=watch) as coordinator:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", textwrap.dedent(SLEEPY_MAIN)),
            *("worker", "--coordinator", coordinator.url),
            stderr=asyncio.subprocess.PIPE,
        )
        await registered.wait()
        process.terminate()
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err
