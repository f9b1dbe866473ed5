"""A GGUF writer and a tiny, really loadable model made with it: numpy and struct only.

``encode_gguf`` writes any metadata and tensors, right or wrong: the malformed files of the tests
come from it too. ``write_tiny_gguf`` writes a small "llama" model with seeded random weights and a
SentencePiece vocabulary that can spell any text. The same arguments give the same bytes on every
platform: the weights come from MT19937's uniform doubles, which numpy keeps stable, and no libm
function touches them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 32
F32, Q8_0 = 0, 8
"""Tensor types, as numbered by ggml."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Value types of the format: number and struct code; string (8) and array (9) are written by hand.
_SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may first
then do any like my now over such our man me even most made after also did many off before must
through back years where much your way well down should because each just those people how too
little state good very make world still see own work long here get both between life being under
never day same another know year while last might great old come since against go came right used
take three hello quantum computing simple terms explain
"""


@dataclass(frozen=True)
class Tensor:
    """One tensor to write. ``dims`` has the fastest dimension first, as the file has it."""

    name: str
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None
    """Offset to declare instead of the right one."""


def string(text: str | bytes) -> bytes:
    """A string as the format has it: length, then bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, content: Any) -> bytes:
    """A typed value: ``kind`` is "u32", "str", "array:f32" and so on."""
    if kind == "str":
        return struct.pack("<i", 8) + string(content)
    if kind.startswith("array:"):
        item = kind.removeprefix("array:")
        if item == "str":
            body = b"".join(string(text) for text in content)
            return struct.pack("<iiQ", 9, 8, len(content)) + body
        number, code = _SCALARS[item]
        return struct.pack(f"<iiQ{len(content)}{code}", 9, number, len(content), *content)
    number, code = _SCALARS[kind]
    return struct.pack(f"<i{code}", number, content)


def encode_gguf(
    metadata: Mapping[str, tuple[str, Any] | bytes] | Iterable[tuple[str | bytes, Any]],
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = ALIGNMENT,
) -> bytes:
    """Encode a GGUF file; the keyword arguments override what a correct file would say.

    Args:
        metadata: Key to ``(kind, content)``, or to the raw bytes of a typed value. Pairs instead
            of a mapping may repeat a key.
        tensors: The tensors, in the order of the file.
    """
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    infos = list(tensors)
    out = bytearray(magic)
    out += struct.pack(
        "<Iqq",
        version,
        len(infos) if n_tensors is None else n_tensors,
        len(pairs) if n_kv is None else n_kv,
    )
    for key, content in pairs:
        out += string(key) + (content if isinstance(content, bytes) else value(*content))
    body = bytearray()
    for tensor in infos:
        offset = len(body) if tensor.offset is None else tensor.offset
        out += string(tensor.name) + struct.pack("<I", len(tensor.dims))
        out += struct.pack(f"<{len(tensor.dims)}q", *tensor.dims)
        out += struct.pack("<iQ", tensor.type, offset)
        body += tensor.data
        body += bytes(-len(body) % alignment)
    out += bytes(-len(out) % alignment)
    return bytes(out + body)


def tiny_metadata(
    *,
    chat_template: bool = True,
    n_layers: int = 2,
    n_embd: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_ff: int = 128,
    n_ctx: int = 512,
    file_type: int = 0,
    renamed: Mapping[int, str] | None = None,
) -> dict[str, tuple[str, Any]]:
    """The metadata of the tiny model, to write or to spoil."""
    tokens, scores, types = _vocabulary()
    for token, text in (renamed or {}).items():
        tokens[token] = text
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", "Tiny random llama"),
        "general.file_type": ("u32", file_type),
        "general.quantization_version": ("u32", 2),
        "llama.context_length": ("u32", n_ctx),
        "llama.embedding_length": ("u32", n_embd),
        "llama.block_count": ("u32", n_layers),
        "llama.feed_forward_length": ("u32", n_ff),
        "llama.attention.head_count": ("u32", n_heads),
        "llama.attention.head_count_kv": ("u32", n_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "llama.rope.dimension_count": ("u32", n_embd // n_heads),
        "llama.rope.freq_base": ("f32", 10000.0),
        "llama.vocab_size": ("u32", len(tokens)),
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.tokens": ("array:str", tokens),
        "tokenizer.ggml.scores": ("array:f32", scores),
        "tokenizer.ggml.token_type": ("array:i32", types),
        "tokenizer.ggml.unknown_token_id": ("u32", 0),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.ggml.add_eos_token": ("bool", False),
        "tokenizer.ggml.add_space_prefix": ("bool", True),
    }
    if chat_template:
        metadata["tokenizer.chat_template"] = ("str", CHATML)
    return metadata


def tiny_tensors(
    *,
    seed: int = 0,
    weight_type: int = F32,
    eos_bias: float = 0.0,
    n_layers: int = 2,
    n_embd: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_ff: int = 128,
) -> list[Tensor]:
    """The tensors of the tiny model."""
    random = np.random.RandomState(seed)
    _, _, types = _vocabulary()
    n_vocab = len(types)
    n_kv = n_embd // n_heads * n_kv_heads

    def uniform(rows: int, columns: int, deviation: float) -> np.ndarray:
        bound = deviation * 1.7320508  # a uniform variable on ±b has deviation b / sqrt(3)
        return ((random.random_sample((rows, columns)) * 2 - 1) * bound).astype(np.float32)

    def matrix(name: str, rows: int, columns: int, deviation: float) -> Tensor:
        return _matrix(name, uniform(rows, columns, deviation), weight_type)

    def norm(name: str) -> Tensor:
        return Tensor(name, (n_embd,), F32, np.ones(n_embd, "<f4").tobytes())

    output = uniform(n_vocab, n_embd, 0.3)
    # A row of zeros has the logit 0, far below the best of some hundred random ones: greedy
    # decoding never ends by chance, and never picks a token that has no text.
    silent = [i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)]
    output[silent] = 0.0
    if eos_bias:
        # Drawn apart, so that all other weights are those of the model without it.
        apart = np.random.RandomState(seed + 1).random_sample(n_embd) * 2 - 1
        output[2] = (apart * (eos_bias * 1.7320508)).astype(np.float32)

    wide = n_embd**-0.5
    tensors = [
        matrix("token_embd.weight", n_vocab, n_embd, 1.0),
        norm("output_norm.weight"),
        _matrix("output.weight", output, weight_type),
    ]
    for layer in range(n_layers):
        block = f"blk.{layer}."
        tensors += [
            norm(block + "attn_norm.weight"),
            matrix(block + "attn_q.weight", n_embd, n_embd, 2 * wide),
            matrix(block + "attn_k.weight", n_kv, n_embd, 2 * wide),
            matrix(block + "attn_v.weight", n_kv, n_embd, wide),
            matrix(block + "attn_output.weight", n_embd, n_embd, wide),
            norm(block + "ffn_norm.weight"),
            matrix(block + "ffn_gate.weight", n_ff, n_embd, wide),
            matrix(block + "ffn_up.weight", n_ff, n_embd, wide),
            matrix(block + "ffn_down.weight", n_embd, n_ff, 2 * n_ff**-0.5),
        ]
    return tensors


def write_tiny_gguf(
    path: Path | str,
    *,
    seed: int = 0,
    chat_template: bool = True,
    weight_type: int = F32,
    eos_bias: float = 0.0,
    n_layers: int = 2,
    n_ctx: int = 512,
    renamed: Mapping[int, str] | None = None,
) -> Path:
    """Write the tiny model and return its path. About 0.6 MB as F32.

    Args:
        seed: Of the weights; another seed is another model of the same shape.
        chat_template: Whether the file brings a ChatML template.
        weight_type: ``F32`` or ``Q8_0``.
        eos_bias: 0 keeps greedy decoding from ever ending. At 0.5 some prompts end after some
            tens of tokens, at 0.8 most end within a few.
        n_layers: Number of blocks.
        n_ctx: Context length that the file declares.
        renamed: Tokens by id that have another text: the vocabulary of another model.
    """
    path = Path(path)
    metadata = tiny_metadata(
        chat_template=chat_template,
        n_layers=n_layers,
        n_ctx=n_ctx,
        file_type={F32: 0, Q8_0: 7}[weight_type],
        renamed=renamed,
    )
    tensors = tiny_tensors(seed=seed, weight_type=weight_type, eos_bias=eos_bias, n_layers=n_layers)
    path.write_bytes(encode_gguf(metadata, tensors))
    return path


def _vocabulary() -> tuple[list[str], list[float], list[int]]:
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    types = [_UNKNOWN, _CONTROL, _CONTROL, _CONTROL, _CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [_BYTE] * 256
    # Pieces merge two at a time, so a word is reachable only through its prefixes. Longer pieces
    # come later and score lower, as in a trained vocabulary.
    pieces = dict.fromkeys(["▁", *(chr(code) for code in range(0x21, 0x7F)), *"äéñöüß€中文"])
    prefixes = {f"▁{word}"[:end] for word in _WORDS.split() for end in range(2, len(word) + 2)}
    pieces.update(dict.fromkeys(sorted(prefixes, key=lambda piece: (len(piece), piece))))
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))]
    tokens += pieces
    types += [_NORMAL] * len(pieces)
    return tokens, scores, types


def _matrix(name: str, weights: np.ndarray, weight_type: int) -> Tensor:
    rows, columns = weights.shape
    encode = {F32: lambda w: w.astype("<f4").tobytes(), Q8_0: _q8_0}[weight_type]
    return Tensor(name, (columns, rows), weight_type, encode(weights))


def _q8_0(weights: np.ndarray) -> bytes:
    """Blocks of 32 weights: a half-precision scale, then 32 signed bytes."""
    blocks = weights.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1) / np.float32(127)).astype("<f2")
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
    quants = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    packed = np.empty(len(blocks), dtype=[("scale", "<f2"), ("quants", "i1", 32)])
    packed["scale"], packed["quants"] = scale, quants
    return packed.tobytes()
