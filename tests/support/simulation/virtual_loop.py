"""An asyncio event loop whose time is somebody else's, and whose thread is the caller's.

It runs nothing by itself. ``run_ready`` runs what is due and returns; ``next_timer`` says when it
wants to be called again. Nothing of it depends on the machine: functions for other threads run in
place and answer after a delay that its owner chooses, and tasks and futures hash by their number,
so that even the order of a set of them is the same in every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

# A loop that runs so many callbacks without the time moving on will never stop.
MOST_CALLBACKS_AT_ONCE = 5_000


class Livelock(Exception):
    """Callbacks make each other ready for ever; virtual time stands still."""


class _Numbered:
    """Hashes by the order of creation instead of by address."""

    def __hash__(self) -> int:
        return self._number  # type: ignore[attr-defined,no-any-return]


class NumberedTask(_Numbered, asyncio.Task):  # type: ignore[type-arg]
    """A task with its number."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        # Before the base class, which puts the task into a set.
        self._number = number
        super().__init__(*args, **kwargs)


class NumberedFuture(_Numbered, asyncio.Future):  # type: ignore[type-arg]
    """A future with its number."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)


@contextlib.contextmanager
def generators_closed_by_their_loop() -> Iterator[None]:
    """Let an asynchronous generator that is dropped end on the loop that runs then, if any."""

    def finalize(generator: AsyncGenerator[Any, Any]) -> None:
        # A process that is dead runs nothing more.
        if (loop := asyncio._get_running_loop()) is not None:
            loop.create_task(generator.aclose())

    before = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=finalize)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*before)


class VirtualLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process.

    Args:
        clock: The process's monotonic clock.
        thread_delay: How long a function takes that is handed to another thread, in seconds.

    Attributes:
        faults: What nobody caught.
        halted: Run nothing any more: the process has just died in the middle of a callback.
    """

    def __init__(self, clock: Callable[[], float], thread_delay: Callable[[], float]) -> None:
        self.faults: list[str] = []
        self.halted = False
        self._clock = clock
        self._thread_delay = thread_delay
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._is_running = False

    # For its owner.

    @property
    def is_idle(self) -> bool:
        """Whether nothing can run before a timer is due."""
        return not self._ready

    @property
    def is_due(self) -> bool:
        """Whether anything can run now."""
        return bool(self._ready or (self._timers and self._timers[0][0] <= self._clock()))

    def next_timer(self) -> float | None:
        """When the next timer is due, on the process's clock."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def run_ready(self) -> None:
        """Run all that is due, and all that becomes ready by that.

        Raises:
            Livelock: It does not end.
        """
        asyncio._set_running_loop(self)
        self._is_running = True
        ready, timers, count = self._ready, self._timers, 0
        try:
            while not self.halted:
                now = self._clock()
                while timers and timers[0][0] <= now:
                    ready.append(heapq.heappop(timers)[2])
                if not ready:
                    return
                # Those that are ready now, as a real loop takes them: in rounds.
                for _ in range(len(ready)):
                    handle = ready.popleft()
                    if not handle.cancelled():
                        handle._run()
                        count += 1
                    if self.halted:
                        return
                if count > MOST_CALLBACKS_AT_ONCE:
                    raise Livelock(f"{count} callbacks at one moment")
        finally:
            self._is_running = False
            asyncio._set_running_loop(None)

    def pending_tasks(self) -> list[asyncio.Task[Any]]:
        """Tasks that are not done, oldest first."""
        return sorted(asyncio.all_tasks(self), key=hash)

    def drop_timers(self) -> None:
        """Forget what is due later, and free what waits for it."""
        self._timers.clear()
        self._ready.clear()

    # What asyncio needs of a loop.

    def time(self) -> float:
        return self._clock()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._is_running

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing to do: a cancelled timer is passed over when it is due."""

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(next(self._numbers), loop=self)

    def create_task(
        self, coro: Any, *, name: object = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        return NumberedTask(next(self._numbers), coro, loop=self, name=name, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, function: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            result, error = function(*args), None
        except Exception as exc:  # noqa: BLE001 - it belongs to whoever waits.
            result, error = None, exc

        def answer() -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._thread_delay(), answer)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def shutdown_asyncgens(self) -> None:
        """Nothing is left: they are closed as they are dropped."""

    def run_until_complete(self, future: Coroutine[Any, Any, Any]) -> Any:  # type: ignore[override]
        raise NotImplementedError("this loop is run from outside")
