"""``ai4all-native worker``: the worker, from settings to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import ssl
from collections.abc import Callable
from pathlib import Path

from ai4all.backend.base import InferenceBackend
from ai4all.benchmark.store import BenchmarkStore
from ai4all.commands.environment import Environment, read_settings, stderr_console
from ai4all.commands.failure import EXIT_FAILURE, EXIT_SUCCESS
from ai4all.commands.last_resort import LastResort
from ai4all.commands.promises import Promises
from ai4all.commands.reload import LiveSettings
from ai4all.commands.signals import on_hangup, on_stop_signals
from ai4all.commands.station import Station, prepare_station
from ai4all.config import Settings
from ai4all.data_dir_lock import hold_data_dir
from ai4all.delivery.backoff import Attempts, Backoff
from ai4all.delivery.spool import Spool
from ai4all.errors import ConfigError
from ai4all.first_run import prepare_data_dir
from ai4all.logs import configure_logging, hide_secret
from ai4all.protocol.codec import Limits
from ai4all.protocol.connection import LinkOptions, check_url
from ai4all.protocol.pins import parse_pin
from ai4all.protocol.session import SessionOptions
from ai4all.worker import Worker, WorkerOptions

__all__ = ["link_options", "run_worker", "session_options"]

# From the end of the grace to the end of the process, whatever hangs; from the end of the work.
_ENDS_AFTER_GRACE_S = 9.5
_LAST_THREADS_S = 1.0

_SPOOL_FILE = "results.sqlite3"


def run_worker(
    environment: Environment,
    config: Path | None,
    data_dir: Path | None,
    coordinator: str | None,
    model: str | None,
    *,
    device: str | None = None,
    gpu_layers: str | None = None,
    in_process: bool = False,
) -> None:
    """Work until a signal says stop. The first run is done before, if it is still due.

    Raises:
        ConfigError: The settings are wrong, or no coordinator is set.
        DataDirectoryError: The data directory cannot be used, or another process works in it.
        ModelError: A model cannot be had.
        DeviceUnavailable: The device that the settings name is not to be had.
        LinkError: The link failed for good.
        SpoolError: Results cannot be kept.
    """

    def read() -> Settings:
        return read_settings(
            config,
            data_dir,
            coordinator__url=coordinator,
            worker__model=model,
            engine__device=device,
            engine__gpu_layers=gpu_layers,
            isolation__in_process=in_process or None,
        )

    settings = read()
    # All that can be wrong with the settings shows before anything is downloaded.
    link = link_options(settings)
    prepare_data_dir(settings.data_dir)
    with hold_data_dir(settings.data_dir, "worker"):
        configure_logging(settings)
        with LastResort() as last_resort:
            asyncio.run(_run_until_stopped(environment, settings, link, read, last_resort))


async def _run_until_stopped(
    environment: Environment,
    settings: Settings,
    link: LinkOptions,
    read: Callable[[], Settings],
    last_resort: LastResort,
) -> None:
    """Prepare and work; a signal ends either, and ends it well."""
    worker: Worker | None = None
    live: LiveSettings | None = None
    stopped_early = reload_is_due = is_stopping = False
    task = asyncio.current_task()
    assert task is not None

    def light_fuse() -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            grace = (settings if live is None else live.settings).worker.stop_grace_seconds
            reason = "something hangs; ended by force"
            last_resort.light(grace + _ENDS_AFTER_GRACE_S, EXIT_FAILURE, reason)

    def stop() -> None:
        nonlocal stopped_early
        light_fuse()
        if worker is not None:
            worker.stop()
        else:
            stopped_early = True
            task.cancel()

    def reload() -> None:
        nonlocal reload_is_due
        if live is not None:
            live.reload()
        else:
            reload_is_due = True

    with on_stop_signals(stop, at_once=light_fuse, deaf_at_end=True), on_hangup(reload, stop):
        try:
            async with contextlib.AsyncExitStack() as held:
                worker, apply = await _prepare(environment, settings, link, held)
                live = LiveSettings(settings, read, apply)
                if reload_is_due:
                    live.reload()
                # What was made so far stays for good: collections need not look through it again,
                # which stalls the loop for tens of milliseconds.
                gc.freeze()
                await worker.run()
        except asyncio.CancelledError:
            if not stopped_early:
                raise
            # What the first run has done so far is kept, and the next start goes on there.
            task.uncancel()
        # All is closed. What a thread still does, such as to hash a model, is of no use any more.
        last_resort.light(_LAST_THREADS_S, EXIT_SUCCESS)


async def _prepare(
    environment: Environment,
    settings: Settings,
    link: LinkOptions,
    held: contextlib.AsyncExitStack,
) -> tuple[Worker, Callable[[Settings], None]]:
    """A worker that is ready to run, and what has it run with other settings."""
    station = await prepare_station(environment, settings, stderr_console())
    # Not in a thread: nothing else runs yet, and a stop in between would leave it open.
    spool = await held.enter_async_context(Spool.open(settings.data_dir / _SPOOL_FILE))
    backend = await held.enter_async_context(environment.open_backend_for_blocks(settings))
    reconnect = settings.coordinator
    backoff = Backoff(
        reconnect.reconnect_interval_ms,
        jitter=reconnect.reconnect_jitter,
        max_attempts=reconnect.max_reconnect_attempts,
    )
    options = _worker_options(settings, station, backend)
    worker = Worker(backend, station.models, spool, link, Attempts(backoff), options)

    def apply(settings: Settings) -> None:
        changed = link_options(settings)
        options = _worker_options(settings, station, backend)
        configure_logging(settings)
        worker.reconfigure(options, changed)

    return worker, apply


def _worker_options(
    settings: Settings, station: Station, backend: InferenceBackend
) -> WorkerOptions:
    engine = settings.engine_options()
    build = backend.capabilities().engine_build
    promises = Promises(BenchmarkStore(settings.data_dir), station.model.sha256, build)
    return WorkerOptions(
        worker_id=station.worker_id,
        score_for=promises.score_on,
        baseline_for=promises.baseline_of,
        health=promises.health(backend.capabilities(), engine),
        max_concurrent_tasks=settings.worker.max_concurrent_tasks,
        engine=engine,
        engine_for=lambda model: station.options_for(model, engine, backend.capabilities()),
        preload=station.model,
        stop_grace=settings.worker.stop_grace_seconds,
        progress_interval=settings.worker.progress_interval_ms / 1000.0,
        session=session_options(settings),
    )


def link_options(settings: Settings) -> LinkOptions:
    """How to reach the coordinator that the settings name.

    Raises:
        ConfigError: None is set, or it cannot or should not be reached so.
    """
    coordinator = settings.coordinator
    url = settings.coordinator_url()
    origin = settings.origin("coordinator.url")
    check_url(url, allow_insecure=coordinator.allow_insecure, origin=origin)
    # Now, so that what is wrong with it shows at the start; again before each connection.
    settings.coordinator_token()
    return LinkOptions(
        url=url,
        token=lambda: _fresh_token(settings),
        allow_insecure=coordinator.allow_insecure,
        ssl_context=_private_authority(settings),
        pins=_pins(settings),
        open_timeout=coordinator.open_timeout_ms / 1000.0,
        ping_interval=coordinator.ping_interval_ms / 1000.0,
        ping_timeout=coordinator.ping_timeout_ms / 1000.0,
        max_size=coordinator.max_message_bytes,
    )


def _fresh_token(settings: Settings) -> str | None:
    token = settings.coordinator_token()
    if token is not None:
        hide_secret(token)
    return token


def _pins(settings: Settings) -> frozenset[bytes]:
    pins = settings.coordinator.pin_sha256
    if not pins:
        return frozenset()
    key, origin = "coordinator.pin_sha256", settings.origin("coordinator.pin_sha256")
    if not settings.coordinator_url().lower().startswith("wss:"):
        raise ConfigError(key, "needs an address that begins with wss://", origin)
    if importlib.util.find_spec("cryptography") is None:
        problem = "needs a package more; run: pip install 'ai4all-native[pin]'"
        raise ConfigError(key, problem, origin)
    return frozenset(map(parse_pin, pins))


def session_options(settings: Settings) -> SessionOptions:
    """The session's patience and limits."""
    return SessionOptions(
        default_heartbeat=settings.worker.default_heartbeat_interval_ms / 1000.0,
        limits=Limits(max_bytes=settings.coordinator.max_message_bytes),
    )


def _private_authority(settings: Settings) -> ssl.SSLContext | None:
    file = settings.coordinator.ca_file
    if file is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(file))
    except (OSError, ssl.SSLError) as error:
        problem = f"{file} holds no certificates that can be used: {error.strerror or error}"
        origin = settings.origin("coordinator.ca_file")
        raise ConfigError("coordinator.ca_file", problem, origin) from error
