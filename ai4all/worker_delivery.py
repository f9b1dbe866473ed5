"""From a block's result to its acknowledgement: kept first, sent then, forgotten last.

The rules:

- A result is committed to the spool before it is sent, and its bytes are the same each time.
- One that cannot be kept (a full disk) is sent from memory, and no new work is taken until it and
  everything else that waits can be kept again. That is tried every few seconds.
- A block that an earlier process left running is handed back as a failed result, so that every
  coordinator hears of it and not only one that speaks ``reconcile``. The spool forgets that it
  ran when the result of it is kept or an end of it is acknowledged, so a success that was kept is
  never followed by such a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Final

import structlog

from ai4all.delivery.spool import ResultConflict, ResultSpool
from ai4all.errors import BadRequest, ComputeError, EngineCrashed, SpoolError
from ai4all.protocol.session import Session
from ai4all.types.task import BlockMetrics, ErrorCode, TaskResult

__all__ = ["Delivery", "never_begun"]

_log = structlog.get_logger(__name__)

# How often it is tried to keep what could not be kept.
_RETRY_S: Final = 5.0

# What is acknowledged is forgotten this much later: not while the next block is begun.
_FORGET_AFTER_S: Final = 0.01

# What hands a block back is no result of it: the block may come to us again.
_HANDED_BACK: Final = frozenset({ErrorCode.SHUTTING_DOWN, ErrorCode.PREEMPTED})


class Delivery:
    """The results of one worker, on their way to its coordinator.

    Args:
        spool: What keeps them.
        session: What sends them.
        max_frame: Longest message that the coordinator takes, in bytes.
        sent: Called when the session has a result to send.
        recovered: Called when results can be kept again.
    """

    def __init__(
        self,
        spool: ResultSpool,
        session: Session,
        max_frame: int,
        *,
        sent: Callable[[], None],
        recovered: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._session = session
        self._max_frame = max_frame
        self._sent = sent
        self._recovered = recovered
        self._problem: str | None = None
        # What waits for room, oldest first: results to keep, and results to forget.
        self._unkept: dict[str, bytes] = {}
        self._unforgotten: dict[str, None] = {}
        # Acknowledged results, and what will have them forgotten.
        self._acknowledged: dict[str, None] = {}
        self._forgetting_soon: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._retrying: asyncio.Task[None] | None = None
        self._forgetting: set[asyncio.Future[None]] = set()

    @property
    def problem(self) -> str | None:
        """Why no new work should be taken, in words; None while results can be kept."""
        return self._problem

    def take_over(self) -> None:
        """Take over what an earlier process left, before the first connection."""
        pending = [
            (block_id, payload.decode("utf-8")) for block_id, payload in self._spool.pending()
        ]
        if pending:
            _log.info("results_pending", count=len(pending))
        handed_back = [(block_id, self._hand_back(block_id)) for block_id in self._interrupted()]
        self._session.restore_results([*pending, *handed_back])

    def _interrupted(self) -> list[str]:
        return [b for b in self._spool.interrupted if not self._spool.has(b)]

    def _hand_back(self, block_id: str) -> str:
        _log.warning("block_lost_in_restart", block_id=block_id, handed_back=True)
        ended = EngineCrashed("the worker's process ended while it had this block")
        return self._session.result_frame(block_id, never_begun(ended))

    async def submit(self, block_id: str, result: TaskResult) -> None:
        """Keep a result and send it.

        Raises:
            LocalProtocolError: It holds something that JSON cannot.
        """
        frame = self._session.result_frame(block_id, result)
        payload = frame.encode("utf-8")
        if len(payload) > self._max_frame:
            # The coordinator would close the link on it, again after every reconnect.
            too_long = BadRequest(
                f"the result has {len(payload)} bytes, a message at most {self._max_frame}; "
                "ask for less"
            )
            frame = self._session.result_frame(block_id, never_begun(too_long))
            payload = frame.encode("utf-8")
        if result.error is not None and result.error.code in _HANDED_BACK:
            # Until somebody knows of it, the spool has what ran as running, and the next process
            # hands it back again.
            self._send(block_id, frame)
            return
        try:
            await self._make_way(block_id)
            await self._spool.commit(
                block_id, payload, functools.partial(self._send, block_id, frame)
            )
        except ResultConflict:
            # One block, one result: the first one that was kept is the one that counts.
            self._unforgotten.pop(block_id, None)
            self._send(block_id, dict(self._spool.pending())[block_id].decode("utf-8"))
        except SpoolError as exc:
            _log.error("result_not_kept", block_id=block_id, error=str(exc))
            self._unkept[block_id] = payload
            self._wait_for_room(exc)
            self._send(block_id, frame)

    def _send(self, block_id: str, frame: str) -> None:
        self._session.send_result(block_id, frame)
        self._sent()

    async def _make_way(self, block_id: str) -> None:
        """Let go of an earlier, acknowledged result of a block that was given to us again."""
        self._unkept.pop(block_id, None)
        for ids in (self._acknowledged, self._unforgotten):
            if block_id in ids:
                # Whatever comes of it: from now on the block has a result that is to be kept.
                del ids[block_id]
                with contextlib.suppress(SpoolError):
                    await self._spool.forget(block_id)

    def acknowledged(self, block_id: str) -> None:
        """The coordinator has a result: the spool need not."""
        if block_id in self._unkept:
            # Kept as soon as there is room, and forgotten then: this is how room is found out.
            self._unforgotten[block_id] = None
        elif self._spool.has(block_id):
            self._acknowledged[block_id] = None
            if self._forgetting_soon is None:
                loop = asyncio.get_running_loop()
                self._forgetting_soon = loop.call_later(_FORGET_AFTER_S, self._forget)
        else:
            self._spool.ended(block_id)

    def _forget(self) -> None:
        """Forget what is acknowledged."""
        self._forgetting_soon = None
        for block_id in self._acknowledged:
            forgetting = asyncio.ensure_future(self._spool.forget(block_id))
            self._forgetting.add(forgetting)
            forgetting.add_done_callback(functools.partial(self._forgot, block_id))
        self._acknowledged.clear()

    def declined(self, block_id: str) -> None:
        """A block was refused in so many words, and left no result."""
        self._spool.ended(block_id)

    async def close(self) -> None:
        """Finish what is under way; try once more to keep what is not kept."""
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.wait({self._retrying})
        if self._forgetting_soon is not None:
            self._forgetting_soon.cancel()
            self._forget()
        if self._forgetting:
            await asyncio.wait(set(self._forgetting))
        with contextlib.suppress(SpoolError):
            await self._catch_up()
        for block_id in self._unkept.keys() & set(self._session.unacknowledged):
            _log.error("result_lost", block_id=block_id, error=self._problem)

    def _forgot(self, block_id: str, forgetting: asyncio.Future[None]) -> None:
        self._forgetting.discard(forgetting)
        if forgetting.cancelled():
            return
        match forgetting.exception():
            case None:
                self._room.set()
            case SpoolError() as exc:
                # At worst it is sent once more after a restart, and the coordinator drops repeats.
                _log.warning("result_not_forgotten", block_id=block_id, error=str(exc))
                self._unforgotten[block_id] = None
                self._wait_for_room(exc)
            case exc:
                raise exc

    def _wait_for_room(self, error: SpoolError) -> None:
        # Heartbeats carry it: without the path that the whole text names.
        self._problem = f"results cannot be kept: {error.problem}"
        if self._retrying is None:
            self._retrying = asyncio.ensure_future(self._retry())

    async def _retry(self) -> None:
        while self._problem is not None:
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await self._room.wait()
            try:
                await self._catch_up()
            except SpoolError as exc:
                self._wait_for_room(exc)
            else:
                # Else one came meanwhile, and has no other retry than this.
                if not self._unkept and not self._unforgotten:
                    self._problem = None
        self._retrying = None
        _log.info("results_kept_again")
        self._recovered()

    async def _catch_up(self) -> None:
        """Keep and forget what waits for it.

        Raises:
            SpoolError: There is still no room.
        """
        # What is forgotten makes room for what is to be kept.
        for block_id in [b for b in self._unforgotten if b not in self._unkept]:
            # Meanwhile the block may have been given again, and have a new result.
            if block_id in self._unforgotten:
                await self._spool.forget(block_id)
                self._unforgotten.pop(block_id, None)
        for block_id, payload in list(self._unkept.items()):
            with contextlib.suppress(ResultConflict):
                await self._spool.commit(block_id, payload)
            self._unkept.pop(block_id, None)
            if block_id in self._unforgotten:
                await self._spool.forget(block_id)
                self._unforgotten.pop(block_id, None)


def never_begun(error: ComputeError) -> TaskResult:
    """The result of a block that was not computed here."""
    return TaskResult(
        success=False,
        output=None,
        error=error.info(),
        metrics=BlockMetrics(queue_time_ms=0.0, execution_time_ms=0.0, total_time_ms=0.0),
    )
