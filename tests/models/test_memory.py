from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.backend import registry
from ai4all.backend.base import Capabilities, EngineOptions, LoadedModel
from ai4all.backend.fake import FakeBackend
from ai4all.errors import DeviceUnavailable, EngineCrashed, OutOfMemory
from ai4all.models import memory
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.memory import (
    MemoryEstimate,
    admit,
    estimate_memory,
    load_model,
    require_memory,
)
from ai4all.models.offload import MARGIN_MIB, Offload
from ai4all.types.model import DeviceInfo, DeviceShare, ModelFile

MIB = 1024 * 1024
OPTIONS = EngineOptions(n_ctx=512, n_ubatch=128)

# A process of its own: its peak is that of one model. Fills the context, so that every buffer is
# used to its end.
PEAK = """
import asyncio, re, resource, sys
from pathlib import Path
from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend
from ai4all.types.model import ModelFile
from pathlib import PosixPath

def kib(name):
    try:
        return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

async def main(path, options, words):
    async with NativeBackend() as backend:
        before = kib("VmRSS")
        await backend.load(ModelFile("m", path, "0" * 64, 1), options)
        request = GenerateRequest(prompt="the sea " * words, max_tokens=8, ignore_eos=True)
        end = await backend.complete(request)
        print(end.usage.prompt_tokens, (kib("VmHWM") - before) * 1024)

asyncio.run(main(Path(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3])))
"""


def capabilities(*devices: DeviceInfo, features: tuple[str, ...] = ()) -> Capabilities:
    cpu = DeviceInfo("CPU", "cpu", "", 1024, 1024)
    return Capabilities("cpu", (*devices, cpu), "build", None, {"cpu_features": list(features)})


def model_file(path: Path) -> ModelFile:
    return ModelFile("tiny", path, "ab" * 32, path.stat().st_size)


def estimated(
    path: Path, options: EngineOptions, features: Collection[str] = (), *, has_gpu: bool = False
) -> MemoryEstimate:
    draft = None if options.draft is None else read_header(options.draft.path)
    header = read_header(path)
    return estimate_memory(header, options, draft=draft, cpu_features=features, has_gpu=has_gpu)


def held_estimate(path: Path, options: EngineOptions, words: int) -> MemoryEstimate:
    """The estimate, after it was held against the measured peak."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, str(path), repr(options), str(words)],
        capture_output=True,
        text=True,
        check=True,
    )
    n_prompt, measured = map(int, done.stdout.split())
    assert n_prompt > options.n_ctx // 2, "the context was not filled"
    estimate = estimated(path, options, registry.build_info()["cpu_features"])
    # Idle pages may be there at the peak, all or some of them, or not at all.
    tolerance = max(16 * MIB, measured // 10)
    assert estimate.needed - tolerance < measured < estimate.peak + tolerance
    return estimate


@pytest.mark.parametrize("options", [OPTIONS, EngineOptions(n_ctx=512, n_slots=2, use_mmap=False)])
def test_the_estimate_is_the_measured_peak(tiny_model: Path, options: EngineOptions) -> None:
    held_estimate(tiny_model, options, 150)


def test_the_estimate_counts_a_draft_model(tiny_model: Path, tmp_path: Path) -> None:
    # Of many layers, so that what it takes is more than what a measurement may be off.
    draft = write_tiny_gguf(tmp_path / "deep.gguf", n_layers=128, n_ctx=1024)
    options = EngineOptions(n_ctx=1024, n_ubatch=128, draft=model_file(draft), draft_tokens=4)
    both = held_estimate(tiny_model, options, 300)
    alone = estimated(tiny_model, dataclasses.replace(options, draft=None))
    # Its weights; 128 layers of 1024 cells, 2 heads of 16 for keys and for values, 2 bytes each.
    least = draft.stat().st_size + 128 * 1024 * 2 * (16 + 16) * 2
    assert both.needed - alone.needed > least > 32 * MIB


def test_the_draft_model_is_part_of_what_must_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tiny_model)
    draft = model_file(write_tiny_gguf(tmp_path / "deep.gguf", n_layers=64))
    with_draft = dataclasses.replace(OPTIONS, draft=draft)
    plain, both = (estimated(tiny_model, each) for each in (OPTIONS, with_draft))
    monkeypatch.setattr(memory, "free_memory", lambda: (plain.needed + both.needed) // 2)
    admit(model, OPTIONS, capabilities())
    with pytest.raises(OutOfMemory):
        admit(model, with_draft, capabilities())
    # What is dropped first made room for both.
    before = LoadedModel(
        model, "", 512, 512, 0, 0.0, "CPU", 1, has_chat_template=False, draft=draft
    )
    admit(model, with_draft, capabilities(), replaces=before)
    # It gives back no more than it had.
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    alone = dataclasses.replace(before, draft=None)
    with pytest.raises(OutOfMemory):
        admit(model, with_draft, capabilities(), replaces=alone)
    absent = dataclasses.replace(draft, path=tmp_path / "absent.gguf")
    options = dataclasses.replace(OPTIONS, draft=absent)
    assert admit(model, options, capabilities()) == (options, None)


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(n_ctx=1024),
        EngineOptions(n_ctx=1024, flash_attention="off"),
        EngineOptions(n_ctx=512, n_slots=4, n_ubatch=128, kv_type="q8_0", use_mmap=False),
    ],
)
def test_the_estimate_of_the_reference_model(reference_model: Path, options: EngineOptions) -> None:
    held_estimate(reference_model, options, options.n_ctx // 2 - 40)


@pytest.fixture(scope="module")
def header(tiny_model: Path) -> GGUFHeader:
    return read_header(tiny_model)


def test_the_cache_is_what_the_engine_allocates(header: GGUFHeader) -> None:
    # 2 layers, 2 heads of 16 for keys and for values, 2 bytes each; contexts come in steps of 256.
    per_token = 2 * 2 * (16 + 16) * 2
    for n_ctx, n_slots, cells in [(512, 1, 512), (500, 1, 512), (300, 3, 3 * 512), (0, 1, 512)]:
        estimate = estimate_memory(header, EngineOptions(n_ctx=n_ctx, n_slots=n_slots))
        assert estimate.kv_cache == cells * per_token
    wide = estimate_memory(header, EngineOptions(n_ctx=512, kv_type="f32"))
    assert wide.kv_cache == 2 * 512 * per_token


def test_attention_without_flash_takes_more_with_the_context(header: GGUFHeader) -> None:
    def compute(flash: str, n_ctx: int) -> int:
        options = EngineOptions(n_ctx=n_ctx, flash_attention=flash)
        return estimate_memory(header, options).compute

    assert compute("off", 4096) > 2 * compute("on", 4096)
    assert compute("off", 8192) - compute("off", 4096) > 4096 * 512 * 4 * 4


def test_repacked_weights_are_counted_twice_while_mapped(tmp_path: Path) -> None:
    header = read_header(write_tiny_gguf(tmp_path / "q8.gguf", weight_type=Q8_0))
    plain = estimate_memory(header, OPTIONS, cpu_features=("AVX2", "REPACK"))
    assert plain.weights_copied == 0
    assert plain.weights_mapped == header.tensor_bytes
    features = ("NEON", "DOTPROD", "REPACK")
    packed = estimate_memory(header, OPTIONS, cpu_features=features)
    matrices = sum(
        tensor.size_bytes
        for tensor in header.tensors
        if tensor.name.startswith("blk.") and len(tensor.dims) == 2
    )
    # Its rows are not a multiple of four: the vocabulary has an odd number of words.
    assert next(t for t in header.tensors if t.name == "output.weight").dims[1] % 4
    assert packed.weights_copied == packed.weights_idle == matrices
    assert packed.peak - packed.needed == matrices
    read = estimate_memory(
        header, dataclasses.replace(OPTIONS, use_mmap=False), cpu_features=features
    )
    assert (read.weights_mapped, read.weights_idle) == (0, 0)
    assert read.weights_copied == header.tensor_bytes


def test_a_gpu_takes_its_share(header: GGUFHeader) -> None:
    host = estimate_memory(header, OPTIONS)
    whole = estimate_memory(header, OPTIONS, has_gpu=True)
    half = estimate_memory(header, dataclasses.replace(OPTIONS, gpu_layers=1), has_gpu=True)
    assert host.device == 0 < half.device < whole.device
    assert whole.kv_cache == 0 < half.kv_cache + 1
    assert whole.needed < half.needed < host.needed


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    estimate = MemoryEstimate(
        100 * MIB, 50 * MIB, 50 * MIB, 30 * MIB, 20 * MIB, 0, 40 * MIB, 0, 0, 0
    )
    require_memory(estimate, free=200 * MIB)
    with pytest.raises(OutOfMemory, match=r"needs 200 MiB .* but 199 MiB are free") as caught:
        require_memory(estimate, free=199 * MIB)
    assert caught.value.details is not None
    assert (caught.value.details["needed"], caught.value.details["free"]) == (200, 199)
    require_memory(estimate, free=1000 * MIB, limit=250 * MIB)
    with pytest.raises(OutOfMemory, match=r"takes 250 MiB .*memory_limit_mb allows: 249 MiB"):
        require_memory(estimate, free=1000 * MIB, limit=249 * MIB)


def test_admission_looks_at_what_is_free_now(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tiny_model)
    needed = estimate_memory(read_header(tiny_model), OPTIONS).needed
    monkeypatch.setattr(memory, "free_memory", lambda: needed + 10 * MIB)
    assert admit(model, OPTIONS, capabilities())[0].prefix_cache_mb == 10
    monkeypatch.setattr(memory, "free_memory", lambda: needed // 2)
    with pytest.raises(OutOfMemory):
        admit(model, OPTIONS, capabilities())
    # The model that is dropped first makes room.
    before = LoadedModel(model, "", 512, 512, 0, 0.0, "CPU", 1, has_chat_template=False)
    left = needed // 2 // MIB
    assert admit(model, OPTIONS, capabilities(), replaces=before)[0].prefix_cache_mb == left


def test_the_owners_cap_bounds_the_kept_prompts(tiny_model: Path) -> None:
    model = model_file(tiny_model)
    capped = dataclasses.replace(OPTIONS, memory_limit_mb=64)
    options, _ = admit(model, capped, capabilities())
    peak = estimate_memory(read_header(tiny_model), capped).peak
    assert 0 < options.prefix_cache_mb <= 64 - peak / MIB
    with pytest.raises(OutOfMemory, match="memory_limit_mb"):
        admit(model, dataclasses.replace(OPTIONS, memory_limit_mb=2), capabilities())


def test_a_full_gpu_is_left_alone_and_one_that_is_named_refuses(tiny_model: Path) -> None:
    gpu = DeviceInfo("CUDA0", "gpu", "", 1024, 0, "cuda")
    options, plan = admit(model_file(tiny_model), OPTIONS, capabilities(gpu))
    assert plan is not None
    assert (plan.label, options.device, options.gpu_layers) == ("CPU", "cpu", 0)
    named = dataclasses.replace(OPTIONS, device="CUDA0")
    with pytest.raises(OutOfMemory, match="not one layer fits on CUDA0"):
        admit(model_file(tiny_model), named, capabilities(gpu))
    admit(model_file(tiny_model), dataclasses.replace(named, gpu_layers=0), capabilities(gpu))


def test_what_the_model_before_held_on_the_gpu_comes_free(tiny_model: Path) -> None:
    model = model_file(tiny_model)
    gpu = DeviceInfo("CUDA0", "gpu", "", 1024, 500, "cuda")
    assert admit(model, OPTIONS, capabilities(gpu))[0].gpu_layers == 0
    share = DeviceShare("CUDA0", 2, 40 * MIB, 30 * MIB, 30 * MIB)
    before = LoadedModel(
        model, "", 512, 512, 0, 0.0, "CUDA0", 1, has_chat_template=False, placement=(share,)
    )
    assert admit(model, OPTIONS, capabilities(gpu), before)[0].gpu_layers == 3


def test_what_the_draft_model_before_held_on_the_gpu_comes_free(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = model_file(tiny_model)
    draft = model_file(write_tiny_gguf(tmp_path / "deep.gguf", n_layers=64))
    both = dataclasses.replace(OPTIONS, draft=draft)
    whole, alone = (estimated(tiny_model, each, has_gpu=True).device for each in (both, OPTIONS))
    assert whole - alone > 8 * MIB
    share = DeviceShare("CUDA0", 2, alone, 0, 0)
    before = LoadedModel(
        model, "", 512, 512, 0, 0.0, "CUDA0", 1, has_chat_template=False, placement=(share,)
    )
    # As much as is missing for the two of them beside the margin, less what the model itself held.
    free = MARGIN_MIB + (whole - alone) // MIB - 4
    gpu = DeviceInfo("CUDA0", "gpu", "", 1024, free, "cuda")
    assert admit(model, both, capabilities(gpu), before)[0].gpu_layers < 3
    before = dataclasses.replace(before, draft=draft)
    assert admit(model, both, capabilities(gpu), before)[0].gpu_layers == 3


def test_an_integrated_gpu_takes_the_machines_own_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tiny_model)
    gpu = DeviceInfo("Vulkan0", "igpu", "", 16_000, 16_000, "vulkan")
    _, plan = admit(model, OPTIONS, capabilities(gpu))
    assert plan is not None
    assert plan.label == "Vulkan0"
    both = plan.estimate.needed + plan.estimate.device
    monkeypatch.setattr(memory, "free_memory", lambda: both)
    admit(model, OPTIONS, capabilities(gpu))
    monkeypatch.setattr(memory, "free_memory", lambda: both - 1)
    with pytest.raises(OutOfMemory):
        admit(model, OPTIONS, capabilities(gpu))


def test_a_file_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path) -> None:
    absent = ModelFile("absent", tmp_path / "absent.gguf", "ab" * 32, 1)
    assert admit(absent, OPTIONS, capabilities()) == (OPTIONS, None)


async def test_a_refused_load_leaves_the_model_that_was_there(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeBackend() as backend:
        first = await load_model(backend, model_file(tiny_model), OPTIONS)
        monkeypatch.setattr(memory, "free_memory", lambda: 0)
        tight = dataclasses.replace(OPTIONS, n_ctx=65_536)
        with pytest.raises(OutOfMemory):
            await load_model(backend, model_file(tiny_model), tight)
        assert backend.loaded is first
        assert backend.calls.loads == 1


async def test_a_plan_is_shown_and_may_be_refused_before_anything_is_loaded(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 20_000, "cuda")
    cpu = DeviceInfo("CPU", "cpu", "", 1024, 1024)
    plans: list[Offload] = []

    def refuse(model: ModelFile, plan: Offload) -> None:
        plans.append(plan)
        raise DeviceUnavailable("not here")

    async with FakeBackend(devices=(gpu, cpu)) as backend:
        with pytest.raises(DeviceUnavailable):
            await load_model(backend, model_file(tiny_model), OPTIONS, approve=refuse)
        assert (backend.calls.loads, plans[0].label) == (0, "CUDA0")
        with caplog.at_level(logging.INFO, "ai4all.models.memory"):
            loaded = await load_model(backend, model_file(tiny_model), OPTIONS)
        assert loaded.device == "CUDA0"
        assert "tiny: 3 of 3 layers on CUDA0: " in caplog.text
        # What is free is looked at each time, not only once at the start.
        backend.device_list = (dataclasses.replace(gpu, memory_free_mb=1), cpu)
        loaded = await load_model(backend, model_file(tiny_model), OPTIONS)
        assert loaded.device == "CPU"
        assert "all on the CPU (too little memory" in caplog.text


async def test_a_driver_that_ends_the_engine_is_asked_once_more(tiny_model: Path) -> None:
    class Fragile(FakeBackend):
        questions = 0

        async def devices(self) -> tuple[DeviceInfo, ...]:
            self.questions += 1
            if self.questions == 1:
                raise EngineCrashed("the engine died of SIGABRT")
            return await super().devices()

    async with Fragile() as backend:
        await load_model(backend, model_file(tiny_model), OPTIONS)
        assert (backend.questions, backend.calls.loads) == (2, 1)
