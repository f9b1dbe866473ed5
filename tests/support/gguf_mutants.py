"""GGUF files that nobody should load: known malformations, known bugs, and endless mutants.

``MALFORMED`` has one file of each class that llama.cpp's own ``test-gguf`` makes by hand, and
``BUG_SHAPES`` one of each shape that public bugs of GGUF loaders have had. Each begins as the tiny
model and has one thing wrong. ``Mutator`` changes bytes and structure at random; the same seed
gives the same files. Nothing here is stored: every file is made when it is asked for.
"""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from tiny_gguf import CHATML, F32, Q8_0, Tensor, encode_gguf, string, tiny_metadata, tiny_tensors

__all__ = ["BUG_SHAPES", "MALFORMED", "Mutator", "small_model"]

Metadata = dict[str, Any]

_SHAPE: Final = {"n_layers": 1, "n_embd": 32, "n_heads": 2, "n_kv_heads": 1, "n_ff": 64}
_ALIGNMENT_KEY: Final = "general.alignment"

INT64_MAX: Final = (1 << 63) - 1
UINT64_MAX: Final = (1 << 64) - 1


def small_model(**changes: Any) -> bytes:
    """The smallest model that loads and computes; some keys changed, dropped where None."""
    return _encode(changes)


@functools.cache
def _own_metadata() -> Metadata:
    return dict(tiny_metadata(n_ctx=128, **_SHAPE))


@functools.cache
def _own_tensors() -> tuple[Tensor, ...]:
    return tuple(tiny_tensors(**_SHAPE))


def _metadata(changes: Metadata) -> Metadata:
    metadata = dict(_own_metadata())
    for key, value in changes.items():
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    return metadata


def _tensors() -> list[Tensor]:
    return list(_own_tensors())


def _encode(changes: Metadata, tensors: list[Tensor] | None = None, **how: Any) -> bytes:
    return encode_gguf(_metadata(changes), _tensors() if tensors is None else tensors, **how)


def _with_tensor(**changes: Any) -> bytes:
    """The model with one more tensor, of which something is wrong."""
    fields: dict[str, Any] = {"name": "t", "dims": (32, 2), "type": F32, "data": bytes(256)}
    return _encode({}, [*_tensors(), Tensor(**fields | changes)])


def _pairs(*more: tuple[str | bytes, Any]) -> bytes:
    return encode_gguf([*_metadata({}).items(), *more], _tensors())


def _declared_shape(dims: tuple[int, ...], kind: int = F32) -> bytes:
    return _with_tensor(dims=dims, type=kind)


def _huge_pair() -> bytes:
    """Two tensors whose sizes add up to something small when they wrap."""
    side = 0x7FFFFFFFFFFFFFC0
    i8 = 24
    tensors = [Tensor(f"t{n}", (side,), i8, b"", offset=n * side) for n in range(2)]
    return _encode({}, [*_tensors(), *tensors])


# What llama.cpp's tests/test-gguf.cpp makes, by its names. All but the tensor without elements are
# refused there; that one is refused here, too.
MALFORMED: Final[dict[str, Callable[[], bytes]]] = {
    "HEADER_BAD_MAGIC": lambda: _encode({}, magic=b"FUGG"),
    "HEADER_BAD_VERSION_0": lambda: _encode({}, version=0),
    "HEADER_BAD_VERSION_1": lambda: _encode({}, version=1),
    "HEADER_BAD_VERSION_FUTURE": lambda: _encode({}, version=4),
    "HEADER_BAD_N_TENSORS": lambda: _encode({}, n_tensors=-1),
    "HEADER_BAD_N_KV": lambda: _encode({}, n_kv=-1),
    "KV_BAD_KEY_SIZE": lambda: _small_header(struct.pack("<Q", UINT64_MAX) + b"my_key"),
    "KV_EMPTY_KEY": lambda: _pairs(("", ("u32", 1))),
    "KV_BAD_TYPE": lambda: _pairs(("my_key", struct.pack("<iB", 13, 0))),
    "KV_DUPLICATE_KEY": lambda: _pairs(("general.name", ("str", "again"))),
    "KV_BAD_ALIGN": lambda: _encode({_ALIGNMENT_KEY: ("u32", 13)}),
    "KV_WRONG_TYPE_ALIGN": lambda: _encode({_ALIGNMENT_KEY: ("i32", 32)}),
    "TENSORS_BAD_NAME_SIZE": lambda: _with_tensor(name="t" * 64),
    "TENSORS_BAD_N_DIMS": lambda: _declared_shape((1, 1, 1, 1, 1)),
    "TENSORS_BAD_SHAPE": lambda: _declared_shape((-1, 2)),
    "TENSORS_ZERO_DIM": lambda: _declared_shape((0, 2)),
    "TENSORS_NE_TOO_BIG": lambda: _declared_shape((1 << 32, 1 << 32)),
    "TENSORS_NBYTES_TOO_BIG": lambda: _declared_shape((1 << 61, 1), 27),
    "TENSORS_BAD_TYPE": lambda: _with_tensor(type=4096),
    "TENSORS_BAD_OFFSET": lambda: _with_tensor(offset=1 << 40),
    "TENSORS_DUPLICATE_NAME": lambda: _with_tensor(name="output.weight"),
    "TENSORS_BAD_ALIGN": lambda: _encode({_ALIGNMENT_KEY: ("u32", 13)}, alignment=13),
    "TENSORS_INCONSISTENT_ALIGN": lambda: _encode({}, alignment=1),
    "DATA_NOT_ENOUGH_DATA": lambda: _encode({})[:-4096],
    "DATA_BAD_ALIGN": lambda: _encode({_ALIGNMENT_KEY: ("u32", 0)}),
    "DATA_INCONSISTENT_ALIGN": lambda: _encode({_ALIGNMENT_KEY: ("u32", 64)}),
    "DATA_MEM_SIZE_OVERFLOW": _huge_pair,
}


def _small_header(rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", 3, 1, 1) + rest + bytes(64)


def _vocabulary(**changes: Any) -> Metadata:
    """The tiny vocabulary with arrays replaced by what ``changes`` makes of them."""
    keys = {name: f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    whole = _metadata({})
    changed: Metadata = {}
    for name, change in changes.items():
        kind, content = whole[keys[name]]
        changed[keys[name]] = change if isinstance(change, bytes) else (kind, change(list(content)))
    return changed


def _replaced(index: int, item: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda content: [*content[:index], item, *content[index + 1 :]]


# What went wrong in public, 2024 to 2026, in llama.cpp and in what is built on it.
BUG_SHAPES: Final[dict[str, Callable[[], bytes]]] = {
    # Sizes that wrap: CVE-2025-53630 and what its fix let through, CVE-2026-27940.
    "a dimension that wraps to none": lambda: _declared_shape(((1 << 42) + 1, 1 << 22)),
    "elements that wrap": lambda: _declared_shape((1 << 31, 1 << 31, 4)),
    "a size that wraps when it is padded": lambda: _declared_shape((UINT64_MAX >> 2,), 24),
    "an offset near the end of all numbers": lambda: _with_tensor(offset=UINT64_MAX - 31),
    # Bytes that are not there: CVE-2026-7482.
    "a tensor past the end of the file": lambda: _with_tensor(data=b"", dims=(1 << 20, 16)),
    # Counts in files of some bytes.
    "a key of 2^63 items": lambda: _small_header(string("k") + struct.pack("<iiQ", 9, 0, 1 << 63)),
    "a string of a gigabyte": lambda: _small_header(string("k") + struct.pack("<iQ", 8, 1 << 30)),
    "2^30 strings": lambda: _small_header(string("k") + struct.pack("<iiQ", 9, 8, 1 << 30)),
    "arrays in arrays": lambda: _small_header(string("k") + struct.pack("<iiQ", 9, 9, 1)),
    # Types that a loader casts without looking.
    "scores of one byte each": lambda: _encode(
        {"tokenizer.ggml.scores": ("array:u8", [1] * len(_tokens()))}
    ),
    "token types of one byte each": lambda: _encode(
        {"tokenizer.ggml.token_type": ("array:u8", [1] * len(_tokens()))}
    ),
    "tokens that are numbers": lambda: _encode({"tokenizer.ggml.tokens": ("array:u32", [1, 2])}),
    "fewer scores than tokens": lambda: _encode(_vocabulary(scores=lambda s: s[:3])),
    "fewer token types than tokens": lambda: _encode(_vocabulary(token_type=lambda t: t[:3])),
    "a tokenizer that is a number": lambda: _encode({"tokenizer.ggml.model": ("u32", 7)}),
    "an architecture that is a list": lambda: _encode(
        {"general.architecture": ("array:str", ["llama"])}
    ),
    "a template that is a number": lambda: _encode({"tokenizer.chat_template": ("u32", 1)}),
    "a flag that is neither": lambda: _encode(
        {"tokenizer.ggml.add_bos_token": struct.pack("<iB", 7, 255)}
    ),
    # More than fixed arrays hold.
    "513 blocks": lambda: _encode({"llama.block_count": ("u32", 513)}),
    "no blocks": lambda: _encode({"llama.block_count": ("u32", 0)}),
    "2^32-1 blocks": lambda: _encode({"llama.block_count": ("u32", (1 << 32) - 1)}),
    "more experts used than there are": lambda: _encode({"llama.expert_used_count": ("u32", 2)}),
    "as many experts as there are numbers": lambda: _encode(
        {"llama.expert_count": ("u32", (1 << 32) - 1), "llama.expert_used_count": ("u32", 1)}
    ),
    "heads for half of the blocks": lambda: _encode(
        {"llama.attention.head_count": ("array:u32", [])}
    ),
    "no heads": lambda: _encode({"llama.attention.head_count": ("u32", 0)}),
    "more key heads than heads": lambda: _encode({"llama.attention.head_count_kv": ("u32", 7)}),
    "an endless context": lambda: _encode({"llama.context_length": ("u32", (1 << 32) - 1)}),
    "no width": lambda: _encode({"llama.embedding_length": ("u32", 0)}),
    "rotations wider than a head": lambda: _encode({"llama.rope.dimension_count": ("u32", 4096)}),
    "an odd rotation": lambda: _encode({"llama.rope.dimension_count": ("u32", 15)}),
    "heads of no width": lambda: _encode(
        {"llama.attention.key_length": ("u32", 0), "llama.attention.value_length": ("u32", 0)}
    ),
    "a vocabulary size of its own": lambda: _encode({"llama.vocab_size": ("u32", 1 << 31)}),
    # Tokens that are taken apart without looking: plamo2's "<0x-1>", ids beyond the vocabulary.
    "a byte token that names no byte": lambda: _encode(_vocabulary(tokens=_replaced(9, "<0x-1>"))),
    "such a byte token for plamo2": lambda: _encode(
        _vocabulary(tokens=_replaced(9, "<0x-1>")) | {"tokenizer.ggml.model": ("str", "plamo2")}
    ),
    "a first token that is not there": lambda: _encode(
        {"tokenizer.ggml.bos_token_id": ("u32", 1 << 30)}
    ),
    "a last token below zero": lambda: _encode({"tokenizer.ggml.eos_token_id": ("i32", -7)}),
    "suppressed tokens that are not there": lambda: _encode(
        {"tokenizer.ggml.suppress_tokens": ("array:u32", [5, 1 << 31])}
    ),
    "a token type of its own": lambda: _encode(_vocabulary(token_type=_replaced(7, 99))),
    "tokens that are all alike": lambda: _encode(_vocabulary(tokens=lambda t: ["a"] * len(t))),
    "tokens without text": lambda: _encode(_vocabulary(tokens=lambda t: [""] * len(t))),
    "no tokens": lambda: _encode({"tokenizer.ggml.tokens": ("array:str", [])}),
    "merges of nothing": lambda: _encode(
        {"tokenizer.ggml.model": ("str", "gpt2"), "tokenizer.ggml.merges": ("array:str", ["a", ""])}
    ),
    "a tokenizer without merges": lambda: _encode({"tokenizer.ggml.model": ("str", "gpt2")}),
    "a character map that ends early": lambda: _encode(
        {
            "tokenizer.ggml.model": ("str", "t5"),
            "tokenizer.ggml.precompiled_charsmap": ("array:u8", [255, 255, 255, 127, 1, 2, 3]),
        }
    ),
    "a character map of three bytes": lambda: _encode(
        {
            "tokenizer.ggml.model": ("str", "t5"),
            "tokenizer.ggml.precompiled_charsmap": ("array:u8", [1, 2, 3]),
        }
    ),
    "a map that leads out of itself": lambda: _encode(
        {
            "tokenizer.ggml.model": ("str", "t5"),
            "tokenizer.ggml.precompiled_charsmap": (
                "array:u8",
                list(struct.pack("<IIII", 12, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF)),
            ),
        }
    ),
    "a pooling that is not there": lambda: _encode({"llama.pooling_type": ("u32", 77)}),
    "a part of three": lambda: _encode({"split.count": ("u16", 3)}),
    "an adapter": lambda: _encode({"general.type": ("str", "adapter")}),
    "a projector": lambda: _encode({"general.architecture": ("str", "clip")}),
    # Numbers that are none.
    "a norm of nothing": lambda: _encode(
        {"llama.attention.layer_norm_rms_epsilon": ("f32", float("nan"))}
    ),
    "a rotation at no frequency": lambda: _encode({"llama.rope.freq_base": ("f32", 0.0)}),
    "weights that are no numbers": lambda: _encode({}, _weights(lambda w: w * np.nan)),
    "weights that are infinite": lambda: _encode({}, _weights(lambda w: w + np.inf)),
    "a weight of another width": lambda: _encode({}, _reshaped("blk.0.attn_q.weight")),
    "a weight that is missing": lambda: _encode({}, _without("blk.0.ffn_up.weight")),
    "an embedding of one row": lambda: _encode({}, _one_row("token_embd.weight")),
    "a norm of another type": lambda: _encode({}, _norm_of_bytes()),
    # Templates: CVE-2024-34359 and CVE-2026-5760, and what only costs time.
    "a template that looks for a way out": lambda: _encode(
        {
            "tokenizer.chat_template": (
                "str",
                "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}",
            )
        }
    ),
    "a template that is cut short": lambda: _encode(
        {"tokenizer.chat_template": ("str", "{% for m in messages %}" * 200)}
    ),
    "a template that does not end": lambda: _encode(
        {
            "tokenizer.chat_template": (
                "str",
                "{% for a in range(100000000) %}{% for b in range(100000000) %}{% endfor %}"
                "{% endfor %}",
            )
        }
    ),
    "a template that grows": lambda: _encode(
        {
            "tokenizer.chat_template": (
                "str",
                "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}"
                "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            )
        }
    ),
    "a template of brackets": lambda: _encode(
        {"tokenizer.chat_template": ("str", "{{" + "(" * 60_000 + "}}")}
    ),
    "a template of 64 KiB and more": lambda: _encode(
        {"tokenizer.chat_template": ("str", CHATML + " " * 65_536)}
    ),
}


def _tokens() -> list[str]:
    tokens: list[str] = _metadata({})["tokenizer.ggml.tokens"][1]
    return tokens


def _weights(change: Callable[[np.ndarray], np.ndarray]) -> list[Tensor]:
    tensors = []
    for tensor in _tensors():
        values = change(np.frombuffer(tensor.data, "<f4")).astype("<f4")
        tensors.append(Tensor(tensor.name, tensor.dims, tensor.type, values.tobytes()))
    return tensors


def _edited(name: str, edit: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [edit(tensor) if tensor.name == name else tensor for tensor in _tensors()]


def _reshaped(name: str) -> list[Tensor]:
    return _edited(name, lambda t: Tensor(t.name, (t.dims[0] * 2, t.dims[1] // 2), t.type, t.data))


def _without(name: str) -> list[Tensor]:
    return [tensor for tensor in _tensors() if tensor.name != name]


def _one_row(name: str) -> list[Tensor]:
    return _edited(name, lambda t: Tensor(t.name, (t.dims[0], 1), t.type, t.data[: 4 * t.dims[0]]))


def _norm_of_bytes() -> list[Tensor]:
    return _edited("output_norm.weight", lambda t: Tensor(t.name, t.dims, 24, bytes(t.dims[0])))


# Mutants.

_ARCHITECTURES: Final = (
    "llama", "llama4", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi2", "phi3", "gpt2",
    "falcon", "mpt", "bloom", "stablelm", "starcoder", "mamba", "mamba2", "rwkv6", "rwkv7", "bert",
    "nomic-bert", "t5", "t5encoder", "deepseek", "deepseek2", "command-r", "olmo", "olmo2", "dbrx",
    "granite", "minicpm", "plamo2", "jamba", "falcon-h1", "gpt-oss", "lfm2", "bitnet", "clip",
    "chatglm", "exaone", "smollm3", "arctic", "baichuan", "internlm2", "orion", "xverse", "nothing",
)  # fmt: skip
_TOKENIZERS: Final = (
    "llama",
    "gpt2",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "none",
    "no_vocab",
    "spm",
    "",
)
_PRE_TOKENIZERS: Final = (
    "default", "llama3", "llama-bpe", "deepseek-llm", "falcon", "gpt-2", "mpt", "starcoder",
    "refact", "command-r", "qwen2", "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro-chat",
    "chatglm-bpe", "viking", "jais", "tekken", "smollm", "codeshell", "bloom", "gpt3-finnish",
    "exaone", "minerva-7b", "megrez", "gpt-4o", "superbpe", "trillion", "bailingmoe", "llama4",
    "pixtral", "seed-coder",
    "hunyuan", "kimi-k2", "nonsense",
)  # fmt: skip

# Keys that loaders read, below the architecture, with the type that is right for each.
_KEYS: Final[dict[str, str]] = {
    "vocab_size": "u32", "context_length": "u32", "embedding_length": "u32", "block_count": "u32",
    "leading_dense_block_count": "u32", "feed_forward_length": "u32",
    "use_parallel_residual": "bool",
    "expert_feed_forward_length": "u32", "expert_shared_feed_forward_length": "u32",
    "tensor_data_layout": "str", "expert_count": "u32", "expert_used_count": "u32",
    "expert_shared_count": "u32", "expert_group_count": "u32", "expert_group_used_count": "u32",
    "expert_weights_scale": "f32", "expert_weights_norm": "bool", "expert_gating_func": "u32",
    "moe_every_n_layers": "u32", "nextn_predict_layers": "u32", "pooling_type": "u32",
    "logit_scale": "f32", "decoder_start_token_id": "u32", "decoder_block_count": "u32",
    "attn_logit_softcapping": "f32", "final_logit_softcapping": "f32", "swin_norm": "bool",
    "rescale_every_n_layers": "u32", "residual_scale": "f32", "embedding_scale": "f32",
    "token_shift_count": "u32", "interleave_moe_layer_step": "u32", "attention.head_count": "u32",
    "attention.head_count_kv": "u32", "attention.max_alibi_bias": "f32",
    "attention.clamp_kqv": "f32",
    "attention.key_length": "u32", "attention.value_length": "u32",
    "attention.layer_norm_epsilon": "f32", "attention.layer_norm_rms_epsilon": "f32",
    "attention.group_norm_epsilon": "f32", "attention.group_norm_groups": "u32",
    "attention.causal": "bool", "attention.q_lora_rank": "u32", "attention.kv_lora_rank": "u32",
    "attention.relative_buckets_count": "u32", "attention.sliding_window": "u32",
    "attention.sliding_window_pattern": "u32", "attention.scale": "f32",
    "attention.output_scale": "f32", "attention.temperature_length": "u32",
    "attention.temperature_scale": "f32", "attention.key_length_mla": "u32",
    "attention.value_length_mla": "u32", "attention.shared_kv_layers": "u32",
    "attention.recurrent_layers": "array:u32", "attention.indexer.head_count": "u32",
    "rope.dimension_count": "u32", "rope.dimension_sections": "array:i32", "rope.freq_base": "f32",
    "rope.freq_base_swa": "f32", "rope.scale_linear": "f32", "rope.scaling.type": "str",
    "rope.scaling.factor": "f32", "rope.scaling.attn_factor": "f32",
    "rope.scaling.original_context_length": "u32", "rope.scaling.finetuned": "bool",
    "rope.scaling.yarn_log_multiplier": "f32", "ssm.conv_kernel": "u32", "ssm.inner_size": "u32",
    "ssm.state_size": "u32", "ssm.time_step_rank": "u32", "ssm.group_count": "u32",
    "ssm.dt_b_c_rms": "bool", "wkv.head_size": "u32", "posnet.embedding_length": "u32",
    "posnet.block_count": "u32", "convnext.block_count": "u32", "shortconv.l_cache": "u32",
    "classifier.output_labels": "array:str",
}  # fmt: skip
_TOKENIZER_KEYS: Final[dict[str, str]] = {
    **{
        f"tokenizer.ggml.{name}_token_id": "u32"
        for name in (
            "bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask", "fim_pre",
            "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
        )
    },
    "tokenizer.ggml.token_type_count": "u32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.ggml.add_sep_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.ggml.remove_extra_whitespaces": "bool",
    "tokenizer.ggml.precompiled_charsmap": "array:u8",
    "tokenizer.ggml.merges": "array:str",
    "tokenizer.ggml.suppress_tokens": "array:u32",
    "tokenizer.ggml.normalizer.lowercase": "bool",
    "tokenizer.chat_template": "str",
    "general.file_type": "u32",
    "general.quantization_version": "u32",
    "general.sampling.temp": "f32",
    "general.sampling.top_k": "i32",
    "general.sampling.sequence": "str",
    "split.no": "u16",
    "split.tensors.count": "i32",
    "adapter.type": "str",
}  # fmt: skip
_RANGES: Final = {
    "u8": (0, 255), "i8": (-128, 127), "u16": (0, 65_535), "i16": (-32_768, 32_767),
    "u32": (0, (1 << 32) - 1), "i32": (-(1 << 31), (1 << 31) - 1), "u64": (0, UINT64_MAX),
    "i64": (-(1 << 63), INT64_MAX),
}  # fmt: skip
_TEXTS: Final = (
    "", "a", " ", "▁", "\x00", "<0x41>", "<0x-1>", "<s>", "a b", "é", "\U0010ffff", "x" * 300,
    "linear", "yarn", "longrope", "none", "\n", "{{",
    "{% for x in range(9999999999) %}{% endfor %}",
)  # fmt: skip
_TENSOR_TYPES: Final = (
    (F32, 4, 1), (1, 2, 1), (30, 2, 1), (Q8_0, 34, 32), (2, 18, 32), (24, 1, 1),
)  # fmt: skip
"""Number, bytes of a block, weights of a block."""


class Mutator:
    """Endless mutants, the same ones for the same seed. ``mutant`` says in a word what it did."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._whole = small_model()
        self._header_end = self._whole.index(_tensors()[0].data)

    def mutant(self) -> tuple[str, bytes]:
        """The next mutant: what kind of change it has, and its bytes."""
        if self._chance.random() < 0.3:
            return "bytes", self._with_wrong_bytes()
        return self._with_wrong_structure()

    def _with_wrong_bytes(self) -> bytes:
        chance = self._chance
        data = bytearray(self._whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            # The weights are most of the file, and the least of its meaning.
            end = self._header_end if chance.random() < 0.85 else len(data)
            at = chance.randrange(max(1, min(end, len(data))))
            match chance.randrange(6):
                case 0 | 1:
                    data[at] ^= 1 << chance.randrange(8)
                case 2:
                    extreme = chance.choice((0, 1, 1 << 31, 1 << 62, INT64_MAX, UINT64_MAX))
                    size = chance.choice((1, 2, 4, 8))
                    data[at : at + size] = struct.pack("<Q", extreme)[:size]
                case 3:
                    data[at] = chance.randrange(256)
                case 4:
                    length = chance.choice((1, 8, 32))
                    data[at : at + length] = chance.randbytes(length)
                case _:
                    # As many bytes are put in as are taken out: what comes after stays in place.
                    other, length = chance.randrange(len(data)), chance.choice((8, 32, 256))
                    piece = data[other : other + length]
                    data[at : at + len(piece)] = piece
        if chance.random() < 0.05:
            del data[chance.randrange(len(data)) :]
        return bytes(data)

    def _with_wrong_structure(self) -> tuple[str, bytes]:
        metadata, tensors = _metadata({}), _tensors()
        kinds = []
        for _ in range(self._chance.choice((1, 1, 1, 2, 3))):
            change = self._chance.choice(
                (
                    self._change_value,
                    self._change_value,
                    self._add_key,
                    self._add_key,
                    self._change_type,
                    self._drop_key,
                    self._change_vocabulary,
                    self._change_vocabulary,
                    self._change_tokenizer,
                    self._change_architecture,
                    self._change_tensor,
                    self._change_tensor,
                )
            )
            change(metadata, tensors)
            kinds.append(change.__name__.removeprefix("_").replace("_", " "))
        return min(kinds), encode_gguf(metadata, tensors)

    def _value(self, kind: str) -> Any:
        chance = self._chance
        if kind.startswith("array:"):
            item = kind.removeprefix("array:")
            return [self._value(item) for _ in range(chance.choice((0, 1, 1, 2, 4, 100)))]
        if kind == "str":
            return chance.choice(_TEXTS)
        if kind == "bool":
            return chance.random() < 0.5
        if kind in ("f32", "f64"):
            return chance.choice(
                (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"), 0.5)
            )
        low, high = _RANGES[kind]
        near = chance.choice((0, 1, 2, 3, 7, 16, 31, 32, 33, 63, 64, 65, 128, 512, 4096, 1 << 20))
        return max(low, min(high, chance.choice((near, near, low, high, high // 2 + 1, high - 1))))

    def _change_value(self, metadata: Metadata, _: list[Tensor]) -> None:
        scalars = [key for key, (kind, _) in metadata.items() if not kind.startswith("array:")]
        if scalars:
            key = self._chance.choice(scalars)
            metadata[key] = (metadata[key][0], self._value(metadata[key][0]))

    def _add_key(self, metadata: Metadata, _: list[Tensor]) -> None:
        if self._chance.random() < 0.7:
            key, kind = self._chance.choice(list(_KEYS.items()))
            kind = f"array:{kind}" if ":" not in kind and self._chance.random() < 0.1 else kind
            metadata[f"llama.{key}"] = (kind, self._value(kind))
        else:
            key, kind = self._chance.choice(list(_TOKENIZER_KEYS.items()))
            metadata[key] = (kind, self._value(kind))

    def _change_type(self, metadata: Metadata, _: list[Tensor]) -> None:
        kinds = (*_RANGES, "f32", "f64", "bool", "str", "array:str", "array:u32", "array:i32")
        kind = self._chance.choice((*kinds, "array:f32", "array:u8", "array:bool", "array:u64"))
        metadata[self._chance.choice(list(metadata))] = (kind, self._value(kind))

    def _drop_key(self, metadata: Metadata, _: list[Tensor]) -> None:
        del metadata[self._chance.choice(list(metadata))]

    def _change_vocabulary(self, metadata: Metadata, _: list[Tensor]) -> None:
        chance = self._chance
        key = chance.choice(("tokens", "scores", "token_type", "tokens", "token_type"))
        name = f"tokenizer.ggml.{key}"
        if name not in metadata or not isinstance(metadata[name][1], list):
            return
        kind, content = metadata[name][0], list(metadata[name][1])
        item = kind.removeprefix("array:")
        if kind == item or not content:
            return
        for _ in range(chance.choice((1, 3, 40))):
            at = chance.randrange(len(content))
            value = self._value(item)
            if key == "token_type" and chance.random() < 0.7:
                value = chance.choice((0, 1, 2, 3, 4, 5, 6))
            content[at] = value
        if chance.random() < 0.1:
            del content[chance.randrange(len(content)) :]
        metadata[name] = (kind, content)

    def _change_tokenizer(self, metadata: Metadata, _: list[Tensor]) -> None:
        chance = self._chance
        metadata["tokenizer.ggml.model"] = ("str", chance.choice(_TOKENIZERS))
        if chance.random() < 0.7:
            metadata["tokenizer.ggml.pre"] = ("str", chance.choice(_PRE_TOKENIZERS))
        if chance.random() < 0.6:
            merges = [f"{chance.choice('abcdeth')} {chance.choice('abcdeth')}" for _ in range(20)]
            for _ in range(chance.choice((0, 0, 1, 5))):
                merges[chance.randrange(len(merges))] = chance.choice(_TEXTS)
            metadata["tokenizer.ggml.merges"] = ("array:str", merges)
        if chance.random() < 0.3:
            size = chance.choice((0, 3, 4, 8, 64, 1000))
            body = bytearray(chance.randbytes(size))
            if size >= 8 and chance.random() < 0.7:
                body[:4] = struct.pack("<I", chance.choice((0, 4, size - 4, size, 1 << 31)))
            metadata["tokenizer.ggml.precompiled_charsmap"] = ("array:u8", list(body))

    def _change_architecture(self, metadata: Metadata, tensors: list[Tensor]) -> None:
        chance = self._chance
        name = chance.choice(_ARCHITECTURES)
        for key in [key for key in metadata if key.startswith("llama.")]:
            metadata[f"{name}.{key.removeprefix('llama.')}"] = metadata.pop(key)
        metadata["general.architecture"] = ("str", name)
        for key, kind in chance.sample(list(_KEYS.items()), 12):
            if f"{name}.{key}" not in metadata:
                metadata[f"{name}.{key}"] = (kind, self._value(kind))

    def _change_tensor(self, _: Metadata, tensors: list[Tensor]) -> None:
        chance = self._chance
        at = chance.randrange(len(tensors))
        old = tensors[at]
        match chance.randrange(7):
            case 0:
                del tensors[at]
            case 1:
                other = tensors[chance.randrange(len(tensors))]
                tensors[at] = Tensor(other.name, old.dims, old.type, old.data)
            case 2:
                dims = [chance.choice((1, 2, 16, 31, 32, 33, 64, 96, n, n * 2)) for n in old.dims]
                dims += [chance.choice((1, 2))] * chance.choice((0, 0, 1, 2))
                size = 4 * int(np.prod(dims))
                tensors[at] = Tensor(old.name, tuple(dims[:4]), F32, _stretched(old.data, size))
            case 3:
                number, block_bytes, block = chance.choice(_TENSOR_TYPES)
                size = int(np.prod(old.dims)) // block * block_bytes
                tensors[at] = Tensor(old.name, old.dims, number, _stretched(old.data, size))
            case 4:
                extreme = struct.pack("<f", self._value("f32"))
                data = bytearray(old.data)
                for _ in range(chance.choice((1, len(data) // 4))):
                    start = 4 * chance.randrange(max(1, len(data) // 4))
                    data[start : start + 4] = extreme
                tensors[at] = Tensor(old.name, old.dims, old.type, bytes(data))
            case 5:
                tensors[at] = Tensor(old.name, old.dims, old.type, chance.randbytes(len(old.data)))
            case _:
                tensors.append(Tensor(f"{old.name}.x", old.dims, old.type, old.data))


def _stretched(data: bytes, size: int) -> bytes:
    return (data * (size // max(1, len(data)) + 1))[:size]
