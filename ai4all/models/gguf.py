"""Reads the header of a GGUF file, and refuses every file that is not safe to hand on.

This runs before any other parser sees a model. All sizes are Python integers, so nothing wraps;
each count is compared with a limit and with the bytes that are really there before anything is
read for it; the reader holds one small window of the file, so a hostile file costs neither memory
nor time. What passes is what the format, and the loader behind it, mean by a model: one whole
file, its tensors back to back, its tokenizer complete.

The format is described in ``docs/gguf.md`` of the ggml repository.
"""

from __future__ import annotations

import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from ai4all.errors import InvalidModelFile
from ai4all.models.gguf_format import (
    ALIGNMENTS,
    ARRAY,
    BOOL,
    BYTE_TOKEN,
    FILE_TYPES,
    INT64_MAX,
    MAX_ARRAY_ITEMS,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME_BYTES,
    MAX_STRING_BYTES,
    MAX_STRINGS,
    MAX_TEMPLATE_BYTES,
    MAX_TENSORS,
    MAX_VOCABULARY,
    SCALARS,
    SMALL_ARRAY,
    STRING,
    TENSOR_TYPES,
    VECTOR_TYPES,
    WEIGHTLESS_TYPES,
    WINDOW,
    ArrayInfo,
    Value,
)
from ai4all.models.gguf_meaning import Vocabulary, length_of, problems

__all__ = ["ArrayInfo", "GGUFHeader", "TensorInfo", "read_header"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor.

    Attributes:
        name: As the file names it.
        dims: Its shape, the fastest dimension first.
        type_name: "F32", "Q4_K", ...
        offset: Where its data starts, in bytes from the start of the file.
        size_bytes: Length of its data.
    """

    name: str
    dims: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        count = 1
        for dim in self.dims:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a checked GGUF file says about itself.

    Attributes:
        path: The file.
        size_bytes: Size of the file.
        version: Version of the format, 2 or 3.
        metadata: Keys and values. Large arrays are an ``ArrayInfo`` unless they were asked for.
        tensors: In the order of the file.
        data_offset: Where tensor data starts, in bytes from the start of the file.
    """

    path: Path
    size_bytes: int
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def architecture(self) -> str:
        """Such as "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def name(self) -> str | None:
        """The model's own name for itself."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) else None

    @property
    def block_count(self) -> int:
        """Number of transformer blocks."""
        return self._count("block_count")

    @property
    def context_length(self) -> int:
        """Context the model was trained with, in tokens."""
        return self._count("context_length")

    @property
    def embedding_length(self) -> int:
        """Width of the hidden state."""
        return self._count("embedding_length")

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return length_of(self.metadata["tokenizer.ggml.tokens"])

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings a chat template."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Size of all weights."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """The name of the file's type, or of the type that holds most of its bytes."""
        file_type = self.metadata.get("general.file_type")
        if isinstance(file_type, int) and file_type in FILE_TYPES:
            return FILE_TYPES[file_type]
        by_type: Counter[str] = Counter()
        for tensor in self.tensors:
            by_type[tensor.type_name] += tensor.size_bytes
        return by_type.most_common(1)[0][0]

    def _count(self, key: str) -> int:
        value = self.metadata[f"{self.architecture}.{key}"]
        assert isinstance(value, int)
        return value


def read_header(path: Path | str, *, arrays: bool = False) -> GGUFHeader:
    """Check a GGUF file and read its header. Tensor data is not read.

    Args:
        path: The file.
        arrays: Keep large arrays, such as the vocabulary, in the metadata.

    Raises:
        InvalidModelFile: It is not a model that is safe to load; says why. Also when it cannot
            be read at all.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise InvalidModelFile(path, _reason(error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModelFile(path, "is not a regular file")
        return _Reader(path, descriptor, status.st_size, arrays).read()
    except OSError as error:
        raise InvalidModelFile(path, _reason(error)) from error
    finally:
        os.close(descriptor)


class _Reader:
    """One pass over one file, through a window that moves forward only."""

    def __init__(self, path: Path, descriptor: int, size: int, arrays: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._limit = min(size, MAX_HEADER_BYTES)
        self._arrays = arrays
        self._window = b""
        self._base = 0  # offset in the file of the window's first byte
        self._at = 0  # position in the window
        self._n_strings = 0
        # Filled while the arrays pass by, for the check of the tokenizer as a whole.
        self._vocabulary = Vocabulary()

    def read(self) -> GGUFHeader:
        magic = self._take(4, "the magic number")
        if magic != b"GGUF":
            self._fail(f"is not a GGUF file: it begins with {magic!r}")
        (version,) = self._unpack("<I", "the version")
        if version and version & 0xFFFF == 0:
            self._fail("is a big-endian GGUF file")
        if version not in (2, 3):
            self._fail(f"has GGUF version {version}; versions 2 and 3 are supported")
        n_tensors, n_keys = self._unpack("<QQ", "the counts")
        # The shortest key and the shortest tensor take 14 and 33 bytes.
        self._check_count("keys", n_keys, 1, MAX_KEYS, 14)
        self._check_count("tensors", n_tensors, 1, MAX_TENSORS, 33)
        metadata, types = self._read_metadata(n_keys)
        alignment = self._check_metadata(metadata, types)
        tensors, data_offset = self._read_tensors(n_tensors, alignment)
        return GGUFHeader(
            self._path, self._size, version, MappingProxyType(metadata), tensors, data_offset
        )

    # The window.

    @property
    def _position(self) -> int:
        return self._base + self._at

    def _fail(self, problem: str) -> NoReturn:
        raise InvalidModelFile(self._path, problem)

    def _need(self, n_bytes: int, what: str) -> None:
        """Have ``n_bytes`` at the position, or fail. Never reads for bytes that are not there."""
        if len(self._window) - self._at >= n_bytes:
            return
        position = self._position
        if position + n_bytes > self._limit:
            if position + n_bytes > self._size:
                self._fail(
                    f"{what} needs {n_bytes} bytes at offset {position}, "
                    f"but the file has {self._size}"
                )
            self._fail(f"the header is longer than {MAX_HEADER_BYTES} bytes")
        wanted = min(max(n_bytes, WINDOW), self._limit - position)
        window = os.pread(self._descriptor, wanted, position)
        if len(window) < n_bytes:
            self._fail(f"{what} could not be read; the file changed meanwhile")
        self._window, self._base, self._at = window, position, 0

    def _take(self, n_bytes: int, what: str) -> bytes:
        self._need(n_bytes, what)
        start = self._at
        self._at += n_bytes
        return self._window[start : self._at]

    def _skip(self, n_bytes: int, what: str) -> None:
        end = self._position + n_bytes
        if end > self._limit:
            self._need(n_bytes, what)
        if end <= self._base + len(self._window):
            self._at += n_bytes
        else:
            self._window, self._base, self._at = b"", end, 0

    def _unpack(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form), what))

    def _check_count(self, what: str, count: int, least: int, most: int, min_bytes: int) -> None:
        if not least <= count <= most:
            self._fail(f"declares {count} {what}; {least} to {most} are accepted")
        if count * min_bytes > self._size - self._position:
            self._fail(f"declares {count} {what}, more than its {self._size} bytes can hold")

    # Metadata.

    def _string(self, most: int, what: str) -> bytes:
        (length,) = self._unpack("<Q", what)
        if length > most:
            self._fail(f"{what} is {length} bytes long; at most {most} are accepted")
        return self._take(length, what)

    def _text(self, most: int, what: str) -> str:
        raw = self._string(most, what)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")
        if not text:
            self._fail(f"{what} is empty")
        if not text.isprintable():
            self._fail(f"{what} has control characters")
        return text

    def _read_metadata(self, n_keys: int) -> tuple[dict[str, Value], dict[str, str]]:
        metadata: dict[str, Value] = {}
        types: dict[str, str] = {}
        for index in range(n_keys):
            key = self._text(MAX_KEY_BYTES, f"the name of key {index}")
            if key in metadata:
                self._fail(f"has the key {key} twice")
            what = f"the value of {key}"
            (number,) = self._unpack("<I", what)
            if number == STRING:
                most = MAX_TEMPLATE_BYTES if "chat_template" in key else MAX_STRING_BYTES
                metadata[key] = self._string(most, what).decode(errors="replace")
                types[key] = "str"
            elif number == ARRAY:
                metadata[key], types[key] = self._read_array(key, what)
            elif number in SCALARS:
                types[key], code = SCALARS[number]
                (scalar,) = self._unpack(f"<{code}", what)
                metadata[key] = self._bool(scalar, what) if number == BOOL else scalar
            else:
                self._fail(f"{what} has the unknown type {number}")
        return metadata, types

    def _bool(self, byte: int, what: str) -> bool:
        if byte > 1:
            self._fail(f"{what} is a boolean with the value {byte}")
        return byte == 1

    def _read_array(self, key: str, what: str) -> tuple[Value, str]:
        (number,) = self._unpack("<I", what)
        (length,) = self._unpack("<Q", what)
        if number == STRING:
            self._check_count(f"strings in {key}", length, 0, MAX_ARRAY_ITEMS, 8)
            return self._read_strings(key, length, what), "array:str"
        if number not in SCALARS:
            self._fail(f"{what} is an array of the unknown type {number}")
        name, code = SCALARS[number]
        item_bytes = struct.calcsize(code)
        self._check_count(f"items in {key}", length, 0, MAX_ARRAY_ITEMS, item_bytes)
        is_token_type = key == "tokenizer.ggml.token_type" and name == "i32"
        if not (self._arrays or is_token_type or length <= SMALL_ARRAY):
            self._skip(length * item_bytes, what)
            return ArrayInfo(name, length), f"array:{name}"
        items = self._unpack(f"<{length}{code}", what)
        if is_token_type:
            self._vocabulary.token_types = items
        if number == BOOL:
            items = tuple(self._bool(item, what) for item in items)
        keep = self._arrays or length <= SMALL_ARRAY
        return (items if keep else ArrayInfo(name, length)), f"array:{name}"

    def _read_strings(self, key: str, count: int, what: str) -> Value:
        self._n_strings += count
        if self._n_strings > MAX_STRINGS:
            self._fail(f"declares more than {MAX_STRINGS} strings")
        most = MAX_TEMPLATE_BYTES if "chat_template" in key else MAX_STRING_BYTES
        is_tokens = key == "tokenizer.ggml.tokens"
        if is_tokens and count > MAX_VOCABULARY:
            self._fail(f"has {count} tokens; at most {MAX_VOCABULARY} are accepted")
        kept: list[str] = []
        texts: set[bytes] = set()
        length_at = struct.Struct("<Q").unpack_from
        # The window is in local names: a vocabulary has hundreds of thousands of strings.
        window, at = self._window, self._at
        end = len(window)
        for index in range(count):
            if end - at < 8:
                self._at = at
                self._need(8, what)
                window, at, end = self._window, 0, len(self._window)
            length = length_at(window, at)[0]
            at += 8
            if length > most:
                self._fail(
                    f"string {index} of {key} is {length} bytes long; at most {most} are accepted"
                )
            if end - at < length:
                self._at = at
                self._need(length, what)
                window, at, end = self._window, 0, len(self._window)
            if self._arrays:
                kept.append(window[at : at + length].decode(errors="replace"))
            if is_tokens:
                self._note_token(index, window[at : at + length], texts)
            at += length
        self._at = at
        return tuple(kept) if self._arrays else ArrayInfo("str", count)

    def _note_token(self, index: int, text: bytes, texts: set[bytes]) -> None:
        seen = self._vocabulary
        # Loaders read texts up to the first zero byte, and give names of their own to empty ones.
        text = text.partition(b"\0")[0] if b"\0" in text else text
        if len(text) == 6 and BYTE_TOKEN.match(text):
            seen.byte_tokens.add(index)
        elif text == b"\\n":
            seen.has_newline = True
        if text in texts and text and seen.twins is None:
            seen.twins = index
        texts.add(text)

    # What the keys mean.

    def _check_metadata(self, metadata: dict[str, Value], types: dict[str, str]) -> int:
        """Check what the keys say; return the alignment of tensor data."""
        for problem in problems(metadata, types, self._vocabulary):
            self._fail(problem)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in ALIGNMENTS:
            self._fail(
                f"has general.alignment = {alignment}; powers of two from 8 to 4096 are accepted"
            )
        return alignment

    # Tensors.

    def _read_tensors(self, n_tensors: int, alignment: int) -> tuple[tuple[TensorInfo, ...], int]:
        infos: list[tuple[str, tuple[int, ...], str, int, int]] = []
        names: set[str] = set()
        next_offset = 0
        for index in range(n_tensors):
            name = self._text(MAX_NAME_BYTES, f"the name of tensor {index}")
            if name in names:
                self._fail(f"has the tensor {name} twice")
            names.add(name)
            dims, type_name, size = self._read_shape(name)
            (offset,) = self._unpack("<Q", f"the offset of tensor {name}")
            if offset % alignment:
                self._fail(f"tensor {name} is at offset {offset}, not aligned to {alignment}")
            if offset != next_offset:
                fault = "overlaps the one before" if offset < next_offset else "leaves a gap"
                self._fail(f"tensor {name} {fault}: offset {offset}, expected {next_offset}")
            next_offset = _padded(offset + size, alignment)
            infos.append((name, dims, type_name, offset, size))
        start = _padded(self._position, alignment)
        for name, _, _, offset, size in infos:
            if start + offset + size > self._size:
                self._fail(
                    f"tensor {name} ends at byte {start + offset + size}, "
                    f"but the file has {self._size}; is it cut short?"
                )
        tensors = tuple(
            TensorInfo(name, dims, type_name, start + offset, size)
            for name, dims, type_name, offset, size in infos
        )
        return tensors, start

    def _read_shape(self, name: str) -> tuple[tuple[int, ...], str, int]:
        (n_dims,) = self._unpack("<I", f"the shape of tensor {name}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            self._fail(f"tensor {name} has {n_dims} dimensions; 1 to {MAX_DIMENSIONS} are accepted")
        dims = self._unpack(f"<{n_dims}Q", f"the shape of tensor {name}")
        n_elements = 1
        for dim in dims:
            n_elements *= dim
        if n_elements == 0:
            self._fail(f"tensor {name} has a dimension of 0")
        if n_elements > INT64_MAX:
            self._fail(f"tensor {name} has {n_elements} elements")
        (number,) = self._unpack("<I", f"the type of tensor {name}")
        if number not in TENSOR_TYPES:
            self._fail(f"tensor {name} has the unknown type {number}")
        type_name, block, block_bytes = TENSOR_TYPES[number]
        if type_name in WEIGHTLESS_TYPES or (n_dims == 1 and type_name not in VECTOR_TYPES):
            self._fail(f"tensor {name} has {n_dims} dimensions of {type_name}, which is no weight")
        if dims[0] % block:
            self._fail(
                f"tensor {name} has rows of {dims[0]}, not a multiple of {type_name}'s {block}"
            )
        size = n_elements // block * block_bytes
        if size > self._size:
            self._fail(f"tensor {name} takes {size} bytes, but the file has {self._size}")
        return dims, type_name, size


def _padded(offset: int, alignment: int) -> int:
    return offset + -offset % alignment


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be read: {error}"
