from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ai4all.backend.devices import (
    backend_of,
    choose_devices,
    device_label,
    gpus_in,
    target_of,
)
from ai4all.errors import DeviceUnavailable, LoadFailed
from ai4all.types.model import DeviceInfo

CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
CUDA0 = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 23_000, "cuda", "0000:01:00.0")
CUDA1 = dataclasses.replace(CUDA0, name="CUDA1", address="0000:02:00.0")
VULKAN0 = dataclasses.replace(CUDA0, name="Vulkan0", backend="vulkan")
IGPU = DeviceInfo("Vulkan1", "igpu", "on the processor", 16_000, 8_000, "vulkan", "0000:00:02.0")
BUILT = {"backends": ["CPU", "CUDA", "Vulkan"]}
REFUSED = {"backends": ["CPU"], "not_loaded": {"cuda": "libcuda.so.1: cannot open"}}
CPU_BUILD = {"backends": ["CPU"]}


def test_auto_takes_every_card_once_and_leaves_out_the_rest_with_a_reason() -> None:
    choice = choose_devices((VULKAN0, IGPU, CUDA0, CUDA1, CPU), "auto", build=BUILT)
    # The first name that a card has is the one that counts, as the engine lists them.
    assert choice.names == ("Vulkan0", "CUDA1")
    assert choice.unused == {
        "CUDA0": "the same card as Vulkan0",
        "Vulkan1": "integrated, and Vulkan0 is here",
    }
    assert choice.fell_back is None
    assert choice.lacking is None
    assert choose_devices((IGPU, CPU), "auto").names == ("Vulkan1",)


def test_auto_without_a_gpu_is_the_cpu_and_a_gpu_build_says_so() -> None:
    assert choose_devices((CPU,), "auto", build=CPU_BUILD).lacking is None
    choice = choose_devices((CPU,), "auto", build=BUILT)
    assert choice.names == ("CPU",)
    assert choice.lacking is not None
    assert choice.lacking.startswith("cuda is built in, but the driver shows no device and vulkan")
    refused = choose_devices((CPU,), "auto", build=REFUSED).lacking
    assert refused == "cuda is built in, but it could not be loaded: libcuda.so.1: cannot open"


def test_a_card_whose_driver_does_not_answer_is_left_out() -> None:
    lost = dataclasses.replace(CUDA0, memory_mb=0, memory_free_mb=0)
    choice = choose_devices((lost, CPU), "auto", build=BUILT)
    assert choice.names == ("CPU",)
    assert "does not answer" in choice.unused["CUDA0"]
    with pytest.raises(DeviceUnavailable, match="driver does not answer"):
        choose_devices((lost, CPU), "CUDA0", build=BUILT)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("cpu", ("CPU",)),
        ("CPU", ("CPU",)),
        ("cuda", ("CUDA0", "CUDA1")),
        ("cuda1", ("CUDA1",)),
        ("CUDA1, CUDA0", ("CUDA1", "CUDA0")),
        ("vulkan,CUDA1", ("Vulkan0", "CUDA1")),
    ],
)
def test_devices_are_named_one_by_one_or_by_their_backend(
    wanted: str, names: tuple[str, ...]
) -> None:
    choice = choose_devices((CUDA0, CUDA1, VULKAN0, CPU), wanted, build=BUILT)
    assert choice.names == names
    left = {"CUDA0", "CUDA1", "Vulkan0"} - set(names)
    assert choice.unused == dict.fromkeys(left, f"excluded by engine.device = {wanted}")


@pytest.mark.parametrize(
    ("wanted", "build", "problem"),
    [
        ("cuda", CPU_BUILD, "cuda is not in this build; rebuild with `pip install . -C cmake"),
        ("rocm", BUILT, "cmake.define.GGML_HIP=ON"),
        ("cuda", BUILT, "cuda is built in, but the driver shows no device"),
        ("CUDA0", BUILT, "CUDA0: cuda is built in, but the driver shows no device"),
        ("cuda", REFUSED, "built in, but it could not be loaded: libcuda.so.1: cannot open"),
        ("cuad", BUILT, "there is no device 'cuad'; here are: CPU"),
        ("auto,cpu", BUILT, "there is no device 'auto'"),
    ],
)
def test_what_is_not_to_be_had_is_refused_with_the_way_out(
    wanted: str, build: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        choose_devices((CPU,), wanted, build=build)
    assert str(caught.value).startswith("engine.device: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    # For a coordinator it is a load that failed here and may succeed elsewhere.
    assert isinstance(caught.value, LoadFailed)
    assert caught.value.info().retryable


def test_a_number_that_is_not_here_among_others_that_are() -> None:
    with pytest.raises(DeviceUnavailable, match="no device 'CUDA7'; here are: CPU, CUDA0"):
        choose_devices((CUDA0, CPU), "CUDA7", build=BUILT)


def test_the_cpu_stands_in_where_the_owner_allows_it() -> None:
    choice = choose_devices((CUDA0, CPU), "rocm", build=BUILT, allow_cpu_fallback=True)
    assert choice.names == ("CPU",)
    assert choice.fell_back is not None
    assert "rocm is not in this build" in choice.fell_back
    assert choice.unused == {"CUDA0": "excluded by engine.device = rocm"}


def test_labels_name_what_holds_layers() -> None:
    assert device_label(("CUDA0", "CUDA1"), whole=True) == "CUDA0+CUDA1"
    assert device_label(("CUDA0",), whole=False) == "CUDA0+CPU"
    assert device_label((), whole=True) == "CPU"
    assert gpus_in("CUDA0+CUDA1+CPU") == ("CUDA0", "CUDA1")
    assert gpus_in("CPU") == ()
    labels = ("CPU", "CUDA0+CPU", "ROCm1", "Vulkan0", "MTL0", "Metal", "Shadow0")
    backends = ["cpu", "cuda", "rocm", "vulkan", "metal", "metal", "cpu"]
    assert [backend_of(label) for label in labels] == backends
    assert target_of("CUDAx") is None
