from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from ai4all.errors import BadRequest, DataDirectoryError, EngineCrashed, LoadFailed
from ai4all.models import reencode as module
from ai4all.models.gguf import read_header
from ai4all.models.reencode import BITS_PER_WEIGHT, reencode


async def test_the_weights_change_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "q8.gguf"
    await reencode(tiny_model, target, "Q8_0", threads=1)
    before, after = read_header(tiny_model), read_header(target)
    assert after.quantization == "Q8_0"
    assert target.stat().st_size < tiny_model.stat().st_size / 2
    assert {t.name: t.dims for t in after.tensors} == {t.name: t.dims for t in before.tensors}
    assert after.metadata["tokenizer.ggml.tokens"] == before.metadata["tokenizer.ggml.tokens"]


async def test_failures_are_typed_and_leave_no_file(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(BadRequest, match="Q9"):
        await reencode(tiny_model, target, "Q9", threads=1)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"rubbish" * 100)
    with pytest.raises(LoadFailed):
        await reencode(bad, target, "Q8_0", threads=1)
    with pytest.raises(DataDirectoryError, match="are free"):
        await reencode(tiny_model, target, "Q8_0", threads=1, disk_reserve_bytes=1 << 60)
    assert not target.exists()


async def test_the_death_of_the_process_is_not_ours(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mortal.py").write_text("import os\nos.kill(os.getpid(), 6)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_MODULE", "mortal")
    target = tmp_path / "out.gguf"
    target.write_bytes(b"half of it")
    with pytest.raises(EngineCrashed, match="SIGABRT"):
        await reencode(tiny_model, target, "Q8_0", threads=1)
    assert not target.exists()


async def test_cancelling_ends_the_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "endless.py").write_text(
        f"import os, time\nopen({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "_MODULE", "endless")
    work = asyncio.create_task(reencode(tiny_model, tmp_path / "out.gguf", "Q8_0", threads=1))
    while not begun.exists() or not begun.read_text():
        await asyncio.sleep(0.01)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not psutil.pid_exists(int(begun.read_text()))


def test_every_type_that_is_offered_can_be_made() -> None:
    source = (Path(__file__).parents[2] / "ext/engine/quantize.cpp").read_text()
    assert all(f'{{"{name}", LLAMA_FTYPE_' in source for name in BITS_PER_WEIGHT)
