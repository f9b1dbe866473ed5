"""Waiting for something to happen, without polling and without a guess at how long it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Watch(Generic[T]):
    """A callback that keeps what it is called with."""

    def __init__(self) -> None:
        self.seen: list[T] = []
        self._changed = asyncio.Event()

    def __call__(self, event: T) -> None:
        self.seen.append(event)
        self._changed.set()

    async def until(self, wanted: Callable[[T], bool], *, count: int = 1) -> T:
        """Wait until ``count`` events are as wanted; returns the last of them."""
        while True:
            matching = [event for event in self.seen if wanted(event)]
            if len(matching) >= count:
                return matching[count - 1]
            self._changed.clear()
            await self._changed.wait()
