from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ai4all.backend.base import Completion, EngineOptions, GenerateRequest, LoadedModel
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark import tuning
from ai4all.benchmark.tuning import thread_candidates, tune
from ai4all.benchmark.tuning_store import Tuning, TuningKey, TuningStore
from ai4all.errors import DataDirectoryError, EngineCrashed
from ai4all.types.model import ModelFile

MODEL = ModelFile("m", Path("absent.gguf"), "cd" * 32, 1)
OTHER = ModelFile("o", Path("absent.gguf"), "ef" * 32, 1)


@dataclass(frozen=True)
class Speed:
    prompt: float = 100.0
    decode: float = 50.0
    stuck: bool = False


class Machine(FakeBackend):
    """Computes at speeds that follow from the options."""

    def __init__(self, speed: Callable[[EngineOptions], Speed]) -> None:
        self.loads: list[EngineOptions] = []
        self._speed = speed
        super().__init__(self._play_at_speed, time_scale=0.0, n_ctx=2048)

    def _play_at_speed(self, request: GenerateRequest, _: int) -> ScriptedGeneration:
        speed = self._speed(self.loads[-1])
        return ScriptedGeneration(
            prompt_ms=len(request.prompt.split()) / speed.prompt * 1000.0,
            token_ms=1000.0 / speed.decode,
            hang_at=0 if speed.stuck else None,
        )

    async def load(
        self, model: ModelFile, options: EngineOptions, progress: object = None
    ) -> LoadedModel:
        self.loads.append(options)
        return await super().load(model, options, None)

    async def complete(self, request: GenerateRequest) -> Completion:
        assert not request.reuse_prefix
        assert not request.speculate
        return await super().complete(request)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "compute_threads", lambda: 4)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 4.0)
    monkeypatch.setattr(tuning, "_LOAD_SAMPLE_S", 0.001)
    # Trials of a script take no time: however far behind, none is broken off for it.
    monkeypatch.setattr(tuning, "_FAR_BEHIND", 1e6)


@pytest.mark.parametrize(
    ("usable", "physical", "candidates"),
    [
        (1, 1, [1]),
        (2, 2, [1, 2]),
        (2, 1, [1, 2]),
        (4, 4, [1, 2, 3, 4]),
        (16, 8, [2, 4, 6, 8, 16]),
        (3.5, 8, [1, 2, 3]),
    ],
)
def test_candidates_are_shares_of_the_cores(
    usable: float, physical: int, candidates: list[int]
) -> None:
    assert thread_candidates(usable, physical) == candidates


async def test_decode_and_prefill_get_the_threads_that_are_fastest_for_each() -> None:
    decode = {1: 30.0, 2: 60.0, 3: 58.5, 4: 40.0}

    def speed(options: EngineOptions) -> Speed:
        return Speed(100.0 * options.threads_batch, decode[options.threads])

    result = await tune(Machine(speed), MODEL, EngineOptions())
    assert (result.threads, result.threads_batch) == (2, 4)
    assert result.is_complete
    measured = {trial.threads: trial.decode_tokens_per_second for trial in result.trials}
    assert measured[2] == pytest.approx(60.0)
    assert set(measured) == {1, 2, 3, 4}


async def test_a_tie_goes_to_the_fewer_threads() -> None:
    speeds = {1: 50.0, 2: 98.0, 3: 99.0, 4: 100.0}

    def speed(options: EngineOptions) -> Speed:
        return Speed(10 * speeds[options.threads_batch], speeds[options.threads])

    result = await tune(Machine(speed), MODEL, EngineOptions())
    assert (result.threads, result.threads_batch) == (2, 2)


@pytest.mark.parametrize(("off", "chosen"), [(120.0, "off"), (101.0, "auto"), (80.0, "auto")])
async def test_flash_attention_is_left_alone_unless_it_clearly_costs(
    off: float, chosen: str
) -> None:
    def speed(options: EngineOptions) -> Speed:
        return Speed(off if options.flash_attention == "off" else 100.0)

    assert (await tune(Machine(speed), MODEL, EngineOptions())).flash_attention == chosen


@pytest.mark.parametrize(("small", "chosen"), [(600.0, 256), (505.0, 512), (400.0, 512)])
async def test_the_batch_is_chosen_on_a_prompt_that_fills_it(small: float, chosen: int) -> None:
    def speed(options: EngineOptions) -> Speed:
        return Speed(small if options.n_ubatch == 256 else 500.0)

    machine = Machine(speed)
    result = await tune(machine, MODEL, EngineOptions())
    assert result.ubatch == chosen
    longest = max(len(request.prompt.split()) for request in machine.calls.requests)
    assert longest > 512


async def test_a_slow_model_gets_short_prompts() -> None:
    machine = Machine(lambda options: Speed(8.0, 2.0))
    result = await tune(machine, MODEL, EngineOptions())
    words = [len(request.prompt.split()) for request in machine.calls.requests]
    assert max(words[2:]) <= 16
    assert max(request.max_tokens for request in machine.calls.requests[2:]) == 4
    assert result.ubatch == 512


async def test_what_the_owner_set_is_measured_all_the_same() -> None:
    # The result holds for the machine; what is set wins when it is applied.
    machine = Machine(lambda options: Speed(100.0, 10.0 * options.threads))
    pinned = EngineOptions(threads=1, n_ubatch=64, flash_attention="off", kv_type="f16")
    result = await tune(machine, MODEL, pinned)
    assert result.threads == 4
    assert {options.threads for options in machine.loads} == {1, 2, 3, 4}


async def test_a_way_that_is_stuck_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_FAR_BEHIND", 3.0)
    machine = Machine(lambda options: Speed(stuck=options.threads > 1))
    result = await asyncio.wait_for(tune(machine, MODEL, EngineOptions(), budget_s=30.0), 25.0)
    assert (result.threads, result.threads_batch) == (1, 1)
    rates = {trial.threads: trial.decode_tokens_per_second for trial in result.trials}
    assert rates == {1: pytest.approx(50.0), 2: None, 3: None, 4: None}


async def test_the_search_ends_with_its_time() -> None:
    stuck = Machine(lambda options: Speed(stuck=True))
    result = await asyncio.wait_for(tune(stuck, MODEL, EngineOptions(), budget_s=0.2), 10.0)
    assert not result.is_complete
    assert result.trials == []
    assert not result.is_sound
    late = Machine(lambda options: Speed(stuck=options.flash_attention == "off"))
    result = await asyncio.wait_for(tune(late, MODEL, EngineOptions(), budget_s=0.5), 10.0)
    assert not result.is_complete
    assert (result.flash_attention, result.threads) == ("auto", 1)


async def test_a_failure_is_the_callers_to_handle() -> None:
    backend = FakeBackend(ScriptedGeneration(error=EngineCrashed("boom")), time_scale=0.0)
    with pytest.raises(EngineCrashed):
        await tune(backend, MODEL, EngineOptions())


# What is kept, and how it is applied.


async def found(model: ModelFile = MODEL) -> Tuning:
    machine = Machine(lambda options: Speed(100.0 * options.threads_batch, 50.0))
    return await tune(machine, model, EngineOptions())


async def test_a_tuning_is_kept_by_its_key(tmp_path: Path) -> None:
    store = TuningStore(tmp_path)
    first, other = await found(), await found(OTHER)
    store.save(first)
    store.save(other)
    again = first.model_copy(update={"threads": 3})
    store.save(again)
    assert store.get(first.key) == again
    assert [each.key.model_sha256 for each in store.all()] == [OTHER.sha256, MODEL.sha256]
    assert store.get(first.key.model_copy(update={"usable_cores": 64.0})) is None
    assert (store.path.stat().st_mode & 0o077) == 0


async def test_a_damaged_file_counts_as_empty(tmp_path: Path) -> None:
    store = TuningStore(tmp_path)
    store.save(await found())
    store.path.write_text('{"version": 1, "tunings": [{}]}')
    assert store.all() == []
    store.save(await found())
    assert len(store.all()) == 1


async def test_a_disk_that_is_full_says_so(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").write_text("")
    with pytest.raises(DataDirectoryError):
        TuningStore(tmp_path).save(await found())


async def test_options_are_filled_where_they_are_open(tmp_path: Path) -> None:
    store = TuningStore(tmp_path)
    capabilities = FakeBackend().capabilities()
    open_options = EngineOptions(n_ubatch=0, n_ctx=77)
    assert store.options_for(open_options, MODEL.sha256, capabilities) == open_options
    kept = (await found()).model_copy(
        update={"threads": 1, "threads_batch": 4, "ubatch": 256, "flash_attention": "off"}
    )
    store.save(kept)
    filled = replace(open_options, threads=1, threads_batch=4, n_ubatch=256, flash_attention="off")
    assert store.options_for(open_options, MODEL.sha256, capabilities) == filled
    settled = EngineOptions(threads=3, n_ubatch=99, flash_attention="on")
    assert store.options_for(settled, MODEL.sha256, capabilities) == replace(
        settled, threads_batch=3
    )
    quantized = replace(open_options, kv_type="q8_0")
    assert store.options_for(quantized, MODEL.sha256, capabilities).flash_attention == "auto"


async def test_a_model_without_its_own_gets_the_machines_threads(tmp_path: Path) -> None:
    store = TuningStore(tmp_path)
    capabilities = FakeBackend().capabilities()
    kept = (await found()).model_copy(update={"threads": 3, "flash_attention": "off"})
    store.save(kept)
    options = store.options_for(EngineOptions(n_ubatch=0), OTHER.sha256, capabilities)
    assert (options.threads, options.threads_batch) == (3, 4)
    assert (options.flash_attention, options.n_ubatch) == ("auto", 0)
    elsewhere = replace(capabilities, engine_build="another build")
    assert store.options_for(EngineOptions(), OTHER.sha256, elsewhere) == EngineOptions()


def test_the_key_names_the_device_that_computes() -> None:
    capabilities = FakeBackend().capabilities()
    gpu = replace(capabilities.devices[0], name="CUDA0", kind="gpu")
    with_gpu = replace(capabilities, devices=(gpu, *capabilities.devices))
    assert TuningKey.of("ab", with_gpu, EngineOptions()).device == "CUDA0"
    assert TuningKey.of("ab", with_gpu, EngineOptions(gpu_layers=0)).device == "CPU"
