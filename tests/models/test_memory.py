from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.backend import registry
from ai4all.backend.base import Capabilities, EngineOptions, LoadedModel
from ai4all.backend.fake import FakeBackend
from ai4all.errors import OutOfMemory
from ai4all.models import memory
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.memory import (
    MemoryEstimate,
    admit,
    estimate_file,
    estimate_memory,
    load_model,
    require_memory,
)
from ai4all.types.model import DeviceInfo, ModelFile

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
    features = registry.build_info()["cpu_features"]
    model = ModelFile("m", path, "0" * 64, 1)
    estimate = estimate_file(model, options, capabilities(features=tuple(features)))
    assert estimate is not None
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
    alone = estimate_file(
        model_file(tiny_model), dataclasses.replace(options, draft=None), capabilities()
    )
    assert alone is not None
    # Its weights; 128 layers of 1024 cells, 2 heads of 16 for keys and for values, 2 bytes each.
    least = draft.stat().st_size + 128 * 1024 * 2 * (16 + 16) * 2
    assert both.needed - alone.needed > least > 32 * MIB


def test_the_draft_model_is_part_of_what_must_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tiny_model)
    draft = model_file(write_tiny_gguf(tmp_path / "deep.gguf", n_layers=64))
    with_draft = dataclasses.replace(OPTIONS, draft=draft)
    plain, both = (estimate_file(model, each, capabilities()) for each in (OPTIONS, with_draft))
    assert plain is not None
    assert both is not None
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
    assert admit(model, options, capabilities()) == options


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
    estimate = MemoryEstimate(100 * MIB, 50 * MIB, 50 * MIB, 30 * MIB, 20 * MIB, 0, 40 * MIB, 0)
    require_memory(estimate, free=200 * MIB)
    with pytest.raises(OutOfMemory, match=r"needs 200 MiB .* but 199 MiB are free") as caught:
        require_memory(estimate, free=199 * MIB)
    assert caught.value.details is not None
    assert (caught.value.details["needed"], caught.value.details["free"]) == (200, 199)
    require_memory(estimate, free=1000 * MIB, limit=250 * MIB)
    with pytest.raises(OutOfMemory, match=r"takes 250 MiB .*memory_limit_mb allows: 249 MiB"):
        require_memory(estimate, free=1000 * MIB, limit=249 * MIB)
    with pytest.raises(OutOfMemory, match="40 MiB on the GPU, but 39 MiB"):
        require_memory(estimate, free=1000 * MIB, device_free=39 * MIB)


def test_admission_looks_at_what_is_free_now(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(tiny_model)
    needed = estimate_memory(read_header(tiny_model), OPTIONS).needed
    monkeypatch.setattr(memory, "free_memory", lambda: needed + 10 * MIB)
    assert admit(model, OPTIONS, capabilities()).prefix_cache_mb == 10
    monkeypatch.setattr(memory, "free_memory", lambda: needed // 2)
    with pytest.raises(OutOfMemory):
        admit(model, OPTIONS, capabilities())
    # The model that is dropped first makes room.
    before = LoadedModel(model, "", 512, 512, 0, 0.0, "CPU", 1, has_chat_template=False)
    left = needed // 2 // MIB
    assert admit(model, OPTIONS, capabilities(), replaces=before).prefix_cache_mb == left


def test_the_owners_cap_bounds_the_kept_prompts(tiny_model: Path) -> None:
    model = model_file(tiny_model)
    capped = dataclasses.replace(OPTIONS, memory_limit_mb=64)
    options = admit(model, capped, capabilities())
    peak = estimate_memory(read_header(tiny_model), capped).peak
    assert 0 < options.prefix_cache_mb <= 64 - peak / MIB
    with pytest.raises(OutOfMemory, match="memory_limit_mb"):
        admit(model, dataclasses.replace(OPTIONS, memory_limit_mb=2), capabilities())


def test_a_small_gpu_refuses(tiny_model: Path) -> None:
    gpu = DeviceInfo("CUDA0", "gpu", "", 1024, 0)
    with pytest.raises(OutOfMemory, match="GPU"):
        admit(model_file(tiny_model), OPTIONS, capabilities(gpu))
    admit(model_file(tiny_model), dataclasses.replace(OPTIONS, gpu_layers=0), capabilities(gpu))


def test_a_file_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path) -> None:
    absent = ModelFile("absent", tmp_path / "absent.gguf", "ab" * 32, 1)
    assert admit(absent, OPTIONS, capabilities()) == OPTIONS


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
