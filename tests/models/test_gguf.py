from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import (
    F32,
    Q8_0,
    Tensor,
    encode_gguf,
    string,
    tiny_metadata,
    tiny_tensors,
    value,
    write_tiny_gguf,
)

from ai4all.errors import InvalidModelFile
from ai4all.models import gguf, gguf_format
from ai4all.models.gguf import ArrayInfo, read_header

INT64_MAX = (1 << 63) - 1


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """Writes bytes, sees them refused, and returns the reason."""

    def check(content: bytes) -> str:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(InvalidModelFile) as caught:
            read_header(path)
        assert str(path) in str(caught.value)
        return caught.value.problem

    return check


def with_metadata(**changes: Any) -> bytes:
    """The tiny model with some keys changed, or dropped where the change is None."""
    metadata: dict[str, Any] = dict(tiny_metadata())
    for name, change in changes.items():
        key = name.replace("__", ".")
        if change is None:
            del metadata[key]
        else:
            metadata[key] = change
    return encode_gguf(metadata, tiny_tensors())


def with_tensor(**changes: Any) -> bytes:
    tensor = {"name": "t", "dims": (32, 2), "type": F32, "data": bytes(256), **changes}
    return encode_gguf(tiny_metadata(), [Tensor(**tensor)])


def test_the_tiny_model_reads_back_as_written(tiny_model: Path) -> None:
    header = read_header(tiny_model)
    tensors = tiny_tensors()
    assert (header.architecture, header.name) == ("llama", "Tiny random llama")
    assert (header.block_count, header.context_length, header.embedding_length) == (2, 512, 64)
    assert header.quantization == "F32"
    assert header.has_chat_template
    assert header.size_bytes == tiny_model.stat().st_size
    assert [(t.name, t.dims) for t in header.tensors] == [(t.name, t.dims) for t in tensors]
    assert header.tensor_bytes == sum(len(t.data) for t in tensors)
    assert header.n_params * 4 == header.tensor_bytes
    content = tiny_model.read_bytes()
    for read, written in zip(header.tensors, tensors, strict=True):
        assert content[read.offset : read.offset + read.size_bytes] == written.data


def test_large_arrays_are_described_and_come_when_asked_for(tiny_model: Path) -> None:
    tokens = tiny_metadata()["tokenizer.ggml.tokens"][1]
    described = read_header(tiny_model)
    assert described.metadata["tokenizer.ggml.tokens"] == ArrayInfo("str", len(tokens))
    assert described.vocabulary_size == len(tokens)
    asked = read_header(tiny_model, arrays=True)
    assert asked.metadata["tokenizer.ggml.tokens"] == tuple(tokens)
    assert asked.vocabulary_size == len(tokens)


def test_quantised_tensors_and_absent_template(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "q8.gguf", weight_type=Q8_0, chat_template=False)
    header = read_header(path)
    assert header.quantization == "Q8_0"
    assert not header.has_chat_template
    f32 = read_header(write_tiny_gguf(tmp_path / "f32.gguf"))
    assert header.n_params == f32.n_params
    assert header.tensor_bytes < f32.tensor_bytes / 3


def test_quantisation_without_a_file_type_is_that_of_most_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = dict(tiny_metadata())
    del metadata["general.file_type"]
    path.write_bytes(encode_gguf(metadata, tiny_tensors(weight_type=Q8_0)))
    assert read_header(path).quantization == "Q8_0"


def test_the_writer_is_deterministic(tmp_path: Path) -> None:
    first, second, other = (
        write_tiny_gguf(tmp_path / name, seed=seed).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert first != other


def test_metadata_that_spans_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    whole = read_header(path, arrays=True)
    monkeypatch.setattr(gguf, "WINDOW", 7)
    assert read_header(path, arrays=True) == whole
    assert read_header(path).tensors == whole.tensors


HEADER = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "magic number"),
        (b"GGU", "magic number"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(60), "version 4"),
        (b"GGUF" + struct.pack("<I", 0) + bytes(60), "version 0"),
        (HEADER, "counts"),
        (HEADER + struct.pack("<qq", -1, 1) + bytes(60), "tensors"),
        (HEADER + struct.pack("<qq", 1, -1) + bytes(60), "keys"),
        (HEADER + struct.pack("<qq", 1 << 40, 1) + bytes(60), "tensors"),
        (HEADER + struct.pack("<qq", 60_000, 1) + bytes(60), "can hold"),
        (HEADER + struct.pack("<qq", 1, 4000) + bytes(60), "can hold"),
        (HEADER + struct.pack("<qq", 0, 1) + bytes(60), "declares 0 tensors"),
        # An empty key; the shape that once met an assertion.
        (HEADER + struct.pack("<qq", 1, 1) + string("") + bytes(60), "is empty"),
        # A key, and a string, longer than the file and longer than memory.
        (HEADER + struct.pack("<qqQ", 1, 1, INT64_MAX) + bytes(60), "bytes long"),
        (HEADER + struct.pack("<qqQ", 1, 1, 200) + bytes(60), "the file has"),
        (
            HEADER + struct.pack("<qq", 1, 1) + string("k") + struct.pack("<iQ", 8, 1 << 62),
            "can hold",
        ),
    ],
)
def test_broken_beginnings(refused: Callable[[bytes], str], content: bytes, reason: str) -> None:
    assert reason in refused(content)


def test_an_endless_array_in_a_file_of_some_bytes(refused: Callable[[bytes], str]) -> None:
    for item_type in (0, 4, 8, 12):
        head = HEADER + struct.pack("<qq", 1, 1) + string("k")
        content = head + struct.pack("<iiQ", 9, item_type, 1 << 63) + bytes(40)
        tracemalloc.start()
        reason = refused(content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert "are accepted" in reason
        assert peak < 4 << 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general__architecture": None}, "no general.architecture"),
        ({"general__architecture": ("u32", 1)}, "expected str"),
        ({"general__architecture": ("str", "../llama")}, "not a name"),
        ({"general__architecture": ("str", "gpt2")}, "no gpt2.block_count"),
        ({"general__type": ("str", "adapter")}, "not a model by itself"),
        ({"split__count": ("u16", 3)}, "part of 3"),
        ({"general__alignment": ("u32", 0)}, "general.alignment"),
        ({"general__alignment": ("u32", 48)}, "general.alignment"),
        ({"general__alignment": ("u32", 1 << 31)}, "general.alignment"),
        ({"general__alignment": ("u64", 32)}, "expected u32"),
        ({"llama__block_count": None}, "no llama.block_count"),
        ({"llama__block_count": ("u32", 0)}, "llama.block_count = 0"),
        ({"llama__block_count": ("u32", 513)}, "llama.block_count = 513"),
        ({"llama__block_count": ("i32", -1)}, "expected u32"),
        ({"llama__context_length": ("u32", 0)}, "llama.context_length = 0"),
        ({"llama__embedding_length": ("u32", (1 << 32) - 1)}, "llama.embedding_length"),
        ({"llama__embedding_length": ("array:u32", [64, 64])}, "expected u32"),
        ({"llama__attention__head_count": ("array:u32", [4])}, "one for each block"),
        ({"llama__attention__head_count": ("array:f32", [4.0, 4.0])}, "expected u32"),
        ({"tokenizer__ggml__model": None}, "no tokenizer.ggml.model"),
        ({"tokenizer__ggml__tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": ("array:str", [])}, "empty vocabulary"),
        ({"tokenizer__ggml__tokens": ("array:u32", [1, 2])}, "expected array:str"),
        ({"tokenizer__ggml__tokens": ("str", "a")}, "expected array:str"),
        ({"tokenizer__ggml__scores": ("array:f32", [0.0])}, "1 items for"),
        ({"tokenizer__ggml__scores": ("array:u8", [0])}, "expected array:f32"),
        ({"tokenizer__ggml__token_type": ("array:i32", [1])}, "1 items for"),
        ({"tokenizer__ggml__token_type": ("array:u8", [1])}, "expected array:i32"),
        ({"tokenizer__ggml__merges": ("array:i32", [1])}, "expected array:str"),
        ({"tokenizer__ggml__precompiled_charsmap": ("array:u32", [1])}, "expected array:u8"),
        ({"tokenizer__ggml__bos_token_id": ("str", "1")}, "expected an integer"),
        ({"tokenizer__ggml__add_bos_token": ("u8", 1)}, "expected bool"),
        ({"tokenizer__ggml__add_bos_token": struct.pack("<iB", 7, 2)}, "boolean"),
        ({"tokenizer__chat_template": ("u32", 1)}, "expected str"),
        ({"tokenizer__chat_template": ("str", "x" * 65_537)}, "65537 bytes long"),
        ({"general__odd": struct.pack("<i", 99)}, "unknown type 99"),
        ({"general__odd": struct.pack("<iiQ", 9, 9, 0)}, "unknown type 9"),
        ({"general__odd": struct.pack("<iiQ", 9, 99, 1)}, "unknown type 99"),
        ({"general__odd": ("str", "x" * ((1 << 20) + 1))}, "bytes long"),
        ({"k" * 257: ("u32", 1)}, "257 bytes long"),
        ({"general__\n": ("u32", 1)}, "control characters"),
    ],
)
def test_wrong_metadata(
    refused: Callable[[bytes], str], changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(with_metadata(**changes))


def test_a_key_that_is_not_utf8(refused: Callable[[bytes], str]) -> None:
    pairs = [*tiny_metadata().items(), (b"\xff\xfe", ("u32", 1))]
    assert "not UTF-8" in refused(encode_gguf(pairs, tiny_tensors()))


def test_a_key_that_comes_twice(refused: Callable[[bytes], str]) -> None:
    pairs = [*tiny_metadata().items(), ("general.name", ("str", "again"))]
    assert "general.name twice" in refused(encode_gguf(pairs, tiny_tensors()))


@pytest.mark.parametrize("text", ["<0x-1>", "<0xG0>", "<0x>", "x", "<0x000>", ""])
def test_a_byte_token_that_names_no_byte(refused: Callable[[bytes], str], text: str) -> None:
    tokens = list(tiny_metadata()["tokenizer.ggml.tokens"][1])
    tokens[10] = text
    reason = refused(with_metadata(tokenizer__ggml__tokens=("array:str", tokens)))
    assert "token 10 is a byte token" in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dims": ()}, "0 dimensions"),
        ({"dims": (1, 1, 1, 1, 1)}, "5 dimensions"),
        ({"dims": (0, 2)}, "dimension of 0"),
        ({"dims": (32, -1)}, "elements"),
        # Products that wrap to something small in 64 bits.
        ({"dims": ((1 << 42) + 1, 1 << 22)}, "elements"),
        ({"dims": (1 << 32, 1 << 32)}, "elements"),
        ({"dims": (1 << 31, 1 << 31, 4)}, "elements"),
        # Bytes that would wrap although the elements do not.
        ({"dims": (1 << 61, 2)}, "bytes, but the file has"),
        ({"dims": (1 << 20, 1 << 10)}, "bytes, but the file has"),
        ({"dims": (33, 1), "type": Q8_0}, "not a multiple"),
        ({"type": 4}, "unknown type 4"),
        ({"type": 43}, "unknown type 43"),
        ({"type": -1}, "unknown type"),
        ({"offset": 1}, "not aligned"),
        ({"offset": 32}, "leaves a gap"),
        ({"offset": (1 << 64) - 32}, "leaves a gap"),
        ({"name": ""}, "is empty"),
        ({"name": "n" * 64}, "64 bytes long"),
        ({"data": bytes(128)}, "cut short"),
    ],
)
def test_wrong_tensors(
    refused: Callable[[bytes], str], changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(with_tensor(**changes))


def test_tensors_that_share_a_name_or_bytes(refused: Callable[[bytes], str]) -> None:
    one = Tensor("a", (32, 2), F32, bytes(256))
    assert "twice" in refused(encode_gguf(tiny_metadata(), [one, one]))
    overlapping = Tensor("b", (32, 2), F32, bytes(256), offset=0)
    assert "overlaps" in refused(encode_gguf(tiny_metadata(), [one, overlapping]))


def test_offsets_follow_the_declared_alignment(tmp_path: Path) -> None:
    metadata = {**tiny_metadata(), "general.alignment": ("u32", 64)}
    tensors = [Tensor("a", (9,), F32, bytes(36)), Tensor("b", (1,), F32, b"wxyz")]
    path = tmp_path / "m.gguf"
    path.write_bytes(encode_gguf(metadata, tensors, alignment=64))
    last = read_header(path).tensors[-1]
    assert last.offset % 64 == 0
    assert path.read_bytes()[last.offset : last.offset + 4] == b"wxyz"


def test_every_cut_of_the_header_is_refused(
    refused: Callable[[bytes], str], tmp_path: Path
) -> None:
    content = encode_gguf(
        {
            **tiny_metadata(chat_template=False),
            "tokenizer.ggml.tokens": ("array:str", ["a", "b"]),
            "tokenizer.ggml.scores": ("array:f32", [0.0, 0.0]),
            "tokenizer.ggml.token_type": ("array:i32", [1, 1]),
        },
        [Tensor("t", (8,), F32, bytes(32))],
    )
    (tmp_path / "whole.gguf").write_bytes(content)
    read_header(tmp_path / "whole.gguf")
    for length in range(len(content)):
        refused(content[:length])


def test_more_strings_than_are_accepted(
    refused: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "MAX_STRINGS", 1000)
    reason = refused(with_metadata(general__a=("array:str", ["x"] * 300)))
    assert "more than 1000 strings" in reason


def test_a_header_longer_than_is_accepted(
    refused: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 4096)
    assert "longer than 4096" in refused(with_metadata())


def test_a_vocabulary_larger_than_is_accepted(
    refused: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "MAX_VOCABULARY", 100)
    assert "at most 100" in refused(with_metadata())


def test_what_is_no_file_at_all(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, tmp_path / "absent", tmp_path / "a\0b", Path("/dev/zero")):
        with pytest.raises(InvalidModelFile):
            read_header(path)


def test_block_sizes_agree_with_a_known_layout() -> None:
    # K-quants: 256 weights; scales and quants as in their published layout.
    assert gguf_format.TENSOR_TYPES[12] == ("Q4_K", 256, 2 * 2 + 12 + 256 // 2)
    assert gguf_format.TENSOR_TYPES[14] == ("Q6_K", 256, 2 + 256 // 16 + 3 * 256 // 4)
    for name, block, block_bytes in gguf_format.TENSOR_TYPES.values():
        assert 0.1 < block_bytes / block <= 8, name


def survives(path: Path, content: bytes) -> None:
    """Reads, or refuses with the one error it may raise."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except InvalidModelFile:
        return
    for tensor in header.tensors:
        assert 0 < tensor.offset <= tensor.offset + tensor.size_bytes <= len(content)


def test_mutants_of_the_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    content = tiny_model.read_bytes()
    header_end = read_header(tiny_model).data_offset
    chance = random.Random(7)
    path = tmp_path / "mutant.gguf"
    # The weights are of no interest here, and cutting them off makes each mutant cheap.
    body = content[:header_end]
    for _ in range(600):
        mutant = bytearray(body)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(mutant))
            kind = chance.randrange(4)
            if kind == 0:
                mutant[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                extreme = chance.choice((0, 1, 1 << 31, 1 << 62, INT64_MAX, (1 << 64) - 1))
                mutant[at : at + 8] = struct.pack("<Q", extreme)
            elif kind == 2:
                del mutant[at : at + chance.randrange(64)]
            else:
                mutant[at:at] = chance.randbytes(chance.randrange(16))
            if not mutant:
                break
        survives(path, bytes(mutant))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=st.lists(
        st.tuples(
            st.binary(max_size=12),
            st.one_of(
                st.binary(max_size=24),
                st.builds(lambda n: value("u64", n), st.integers(0, (1 << 64) - 1)),
                st.builds(lambda t: value("array:str", t), st.lists(st.binary(max_size=4))),
            ),
        ),
        max_size=6,
    ),
    dims=st.lists(st.integers(-(1 << 63), INT64_MAX), max_size=5),
    tensor_type=st.integers(-2, 50),
    offset=st.integers(0, (1 << 64) - 1),
    n_kv=st.none() | st.integers(-(1 << 63), INT64_MAX),
)
def test_arbitrary_structures(
    tmp_path: Path,
    pairs: list[tuple[bytes, bytes]],
    dims: list[int],
    tensor_type: int,
    offset: int,
    n_kv: int | None,
) -> None:
    tensor = Tensor("t", tuple(dims), tensor_type, bytes(64), offset)
    whole = [*pairs, *tiny_metadata(chat_template=False).items()]
    survives(tmp_path / "m.gguf", encode_gguf(whole, [tensor], n_kv=n_kv))


@pytest.mark.model
def test_the_reference_model(reference_model: Path) -> None:
    header = read_header(reference_model)
    assert header.architecture == "llama"
    assert header.n_params == 134_515_008
    assert header.quantization == "Q4_1"
    assert header.vocabulary_size == 49_152
    assert (header.block_count, header.embedding_length) == (30, 576)
