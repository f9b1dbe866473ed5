from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.errors import DeviceUnavailable, OutOfMemory
from ai4all.models.estimate import estimate_memory, layers_of
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.offload import Offload, plan_offload
from ai4all.types.model import DeviceInfo

MIB = 1024 * 1024
CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
BUILT = {"backends": ["CPU", "CUDA"], "cpu_features": ["AVX2"]}

# Of a model with 2 layers of its own; sizes that differ by layer are well over a MiB.
OPTIONS = EngineOptions(n_ctx=16_384, n_ubatch=64, kv_type="f32")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> GGUFHeader:
    return read_header(write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


def gpu(free: int, total: int = 1 << 20, number: int = 0, kind: str = "gpu") -> DeviceInfo:
    return DeviceInfo(
        f"CUDA{number}", kind, "a card", total, free, "cuda", f"0000:0{number + 1}:00.0"
    )


def here(*gpus: DeviceInfo) -> Capabilities:
    return Capabilities("cuda", (*gpus, CPU), "build", None, BUILT)


def held(header: GGUFHeader, n_layers: int, options: EngineOptions = OPTIONS) -> float:
    """MiB on the GPU with so many layers there."""
    asked = dataclasses.replace(options, gpu_layers=n_layers)
    return estimate_memory(header, asked, cpu_features=["AVX2"], has_gpu=True).device / MIB


def test_all_layers_go_where_they_fit(header: GGUFHeader) -> None:
    plan = plan_offload(header, OPTIONS, here(gpu(free=20_000)))
    assert (plan.n_layers, plan.n_all, plan.label) == (3, 3, "CUDA0")
    assert plan.limited_by is None
    options = plan.options(OPTIONS)
    assert (options.device, options.gpu_layers) == ("CUDA0", 3)
    text = str(plan)
    assert text.startswith("3 of 3 layers on CUDA0: ")
    assert "of 20,000 free" in text
    assert plan.to_dict()["estimate"]["device"] == plan.estimate.device


def test_as_many_layers_go_as_fit_beside_the_margin(header: GGUFHeader) -> None:
    # Room for the output and one layer of the two, and for half of the other.
    needed = (held(header, 2) + held(header, 3)) / 2
    plan = plan_offload(header, OPTIONS, here(gpu(free=int(needed) + 100)), margin_mib=100)
    assert (plan.n_layers, plan.label) == (2, "CUDA0+CPU")
    assert plan.limited_by is not None
    assert "too little memory: all 3 layers need" in plan.limited_by
    assert plan.limited_by in str(plan)
    assert plan.estimate.kv_cache > 0
    # What the model before held is free as soon as it goes.
    more = plan_offload(
        header, OPTIONS, here(gpu(free=int(needed))), margin_mib=0, freed=int(needed) * MIB
    )
    assert more.n_layers == 3


def test_a_draft_model_takes_its_room_on_the_gpu(header: GGUFHeader, tmp_path: Path) -> None:
    draft = read_header(write_tiny_gguf(tmp_path / "deep.gguf", n_layers=8))

    def plan(free: int, gpu_layers: int = -1) -> Offload:
        options = dataclasses.replace(OPTIONS, gpu_layers=gpu_layers)
        return plan_offload(header, options, here(gpu(free=free)), draft=draft, margin_mib=0)

    both = plan(free=20_000).estimate
    alone = plan_offload(header, OPTIONS, here(gpu(free=20_000))).estimate
    # 8 layers of 16,384 cells, 2 heads of 16 for keys and for values, 4 bytes each.
    assert both.device_kv - alone.device_kv == 8 * 16_384 * 2 * (16 + 16) * 4
    assert plan(free=both.device // MIB + 1).n_layers == 3
    assert plan(free=both.device // MIB - 1).n_layers < 3
    # It goes as a whole where any layer goes, and stays on the CPU where none does.
    its = both.device_kv - alone.device_kv
    assert plan(free=20_000, gpu_layers=2).estimate.device_kv == alone.device_kv // 2 + its
    host = plan(free=20_000, gpu_layers=0).estimate
    assert (host.device, host.kv_cache) == (0, both.device_kv)


def test_where_not_one_layer_fits_auto_computes_on_the_cpu_and_says_why(
    header: GGUFHeader,
) -> None:
    plan = plan_offload(header, OPTIONS, here(gpu(free=8)))
    assert (plan.n_layers, plan.label) == (0, "CPU")
    assert plan.fits_when_empty
    assert plan.options(OPTIONS).device == "cpu"
    assert str(plan).startswith("all on the CPU (too little memory: all 3 layers need")
    assert not plan_offload(header, OPTIONS, here(gpu(free=8, total=9))).fits_when_empty


def test_a_device_that_is_named_and_has_no_room_is_refused(header: GGUFHeader) -> None:
    named = dataclasses.replace(OPTIONS, device="cuda")
    with pytest.raises(OutOfMemory, match=r"not one layer fits on CUDA0; .* 8 are free"):
        plan_offload(header, named, here(gpu(free=8)))
    allowed = dataclasses.replace(named, allow_cpu_fallback=True)
    assert plan_offload(header, allowed, here(gpu(free=8))).label == "CPU"
    with pytest.raises(DeviceUnavailable, match="the driver shows no device"):
        plan_offload(header, named, here())
    assert "the driver shows no device" in str(plan_offload(header, allowed, here()))


def test_a_number_of_layers_is_kept_or_refused(header: GGUFHeader) -> None:
    two = dataclasses.replace(OPTIONS, gpu_layers=2)
    # Who names a number does without the margin.
    enough = int(held(header, 2)) + 1
    plan = plan_offload(header, two, here(gpu(free=enough)))
    assert (plan.n_layers, plan.label, plan.limited_by) == (2, "CUDA0+CPU", None)
    with pytest.raises(OutOfMemory, match=r"2 layers need .* MiB on CUDA0, but .* are free"):
        plan_offload(header, two, here(gpu(free=enough - 2)))
    many = dataclasses.replace(OPTIONS, gpu_layers=999)
    assert plan_offload(header, many, here(gpu(free=20_000))).n_layers == 3
    none = dataclasses.replace(OPTIONS, gpu_layers=0)
    plan = plan_offload(header, none, here(gpu(free=20_000)))
    assert (plan.label, plan.limited_by) == ("CPU", None)


def test_the_output_alone_is_on_no_gpu(header: GGUFHeader) -> None:
    one = dataclasses.replace(OPTIONS, gpu_layers=1)
    assert plan_offload(header, one, here(gpu(free=20_000))).label == "CPU"


def test_a_gpu_build_without_a_device_says_so(header: GGUFHeader) -> None:
    plan = plan_offload(header, OPTIONS, here())
    assert plan.limited_by == "cuda is built in, but the driver shows no device"
    cpu_build = dataclasses.replace(here(), build_info={"backends": ["CPU"]})
    assert plan_offload(header, OPTIONS, cpu_build).limited_by is None


def test_two_gpus_hold_together_what_neither_holds_alone(header: GGUFHeader) -> None:
    def plan(*free: int) -> int:
        gpus = [gpu(free=mib, number=number) for number, mib in enumerate(free)]
        return plan_offload(header, OPTIONS, here(*gpus), margin_mib=0).n_layers

    compute = estimate_memory(header, OPTIONS, has_gpu=True).device_compute / MIB
    # Each has a compute buffer of its own.
    half = int((held(header, 3) - compute) / 2 + compute) + 1
    assert plan(half) < 3
    assert plan(half, half) == 3
    assert plan(half, int(compute) // 2) < 3


def test_the_estimate_follows_the_layers(header: GGUFHeader) -> None:
    def parts(n_layers: int) -> tuple[int, int, int]:
        asked = dataclasses.replace(OPTIONS, gpu_layers=n_layers)
        estimate = estimate_memory(header, asked, has_gpu=True)
        return estimate.device_weights, estimate.device_kv, estimate.device_compute

    assert layers_of(header) == 3
    assert parts(0) == (0, 0, 0)
    by_name = {tensor.name: tensor for tensor in header.tensors}
    output = sum(tensor.size_bytes for name, tensor in by_name.items() if name.startswith("output"))
    assert parts(1)[:2] == (output, 0)
    whole = estimate_memory(header, OPTIONS)
    assert parts(2)[1] * 2 == parts(3)[1] == whole.kv_cache
    # All but the embedding, which is looked up on the CPU.
    assert parts(3)[0] == header.tensor_bytes - by_name["token_embd.weight"].size_bytes


def test_an_embedding_that_is_the_output_too_is_held_twice(tmp_path: Path) -> None:
    header = read_header(write_tiny_gguf(tmp_path / "tied.gguf"))
    tied = dataclasses.replace(
        header, tensors=tuple(t for t in header.tensors if t.name != "output.weight")
    )
    embedding = next(t for t in tied.tensors if t.name == "token_embd.weight").size_bytes
    estimate = estimate_memory(tied, OPTIONS, has_gpu=True)
    assert estimate.device_weights == sum(t.size_bytes for t in tied.tensors)
    assert estimate.weights_mapped == embedding
