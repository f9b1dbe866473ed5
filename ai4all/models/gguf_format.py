"""The numbers of the GGUF format, and the limits that we set on top of them.

Type numbers and block sizes are those of ``ggml.h`` and ``ggml-common.h``; value types those of
``gguf.h``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """A metadata array that is described instead of kept: the type of its items, their number."""

    item_type: str
    length: int


Value = int | float | bool | str | tuple[int | float | bool | str, ...] | ArrayInfo
"""A metadata value."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What a kind of tokenizer does unless the file says otherwise.

    Attributes:
        ids: Its special tokens.
        added: Those that it puts around every text.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    added: frozenset[str] = frozenset()


# Limits of ours. Each is far above what published models need and far below what hurts.
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 256
MAX_NAME_BYTES = 63
MAX_STRING_BYTES = 1 << 20
MAX_TEMPLATE_BYTES = 64 << 10
MAX_ARRAY_ITEMS = 4 << 20
MAX_STRINGS = 4 << 20
MAX_HEADER_BYTES = 128 << 20
MAX_DIMENSIONS = 4
MAX_BLOCKS = 512
MAX_EXPERTS = 1024
MAX_TEMPLATE_DEPTH = 200
MAX_VOCABULARY = 1 << 20
ALIGNMENTS = frozenset(1 << n for n in range(3, 13))
SMALL_ARRAY = 1024
"""Numeric arrays up to this length are kept in the metadata; longer ones only described."""

INT64_MAX = (1 << 63) - 1
WINDOW = 1 << 20

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"),
    5: ("i32", "i"), 6: ("f32", "f"), 7: ("bool", "B"), 10: ("u64", "Q"), 11: ("i64", "q"),
    12: ("f64", "d"),
}  # fmt: skip
INTEGERS = frozenset({"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"})

# Types that only computations in progress have, and such as no weight is multiplied by.
WEIGHTLESS_TYPES = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I64", "F64"})
VECTOR_TYPES = frozenset({"F32"})
"""What norms and biases come in; the CPU computes with no other."""

# Tensor type: name, weights in a block, bytes of a block. Numbers missing here were withdrawn.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType({
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
})  # fmt: skip

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0",
    38: "MXFP4", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

# What the keys that a loader casts must be. Alternatives are separated by "|".
KEY_TYPES = {
    "general.architecture": "str",
    "general.alignment": "u32",
    "general.file_type": "u32",
    "general.quantization_version": "u32",
    "general.type": "str",
    "split.count": "u16",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.pre": "str",
    "tokenizer.ggml.tokens": "array:str",
    "tokenizer.ggml.scores": "array:f32|array:i32",
    "tokenizer.ggml.token_type": "array:i32",
    "tokenizer.ggml.merges": "array:str",
    "tokenizer.ggml.precompiled_charsmap": "array:u8|array:i8",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.ggml.remove_extra_whitespaces": "bool",
    "tokenizer.chat_template": "str",
    "tokenizer.chat_templates": "array:str",
}
ARCHITECTURE_KEY_TYPES = {
    "block_count": "u32",
    "context_length": "u32",
    "embedding_length": "u32",
    "vocab_size": "u32",
    "feed_forward_length": "u32|array:u32|array:i32",
    "attention.head_count": "u32|array:u32|array:i32",
    "attention.head_count_kv": "u32|array:u32|array:i32",
    "attention.layer_norm_epsilon": "f32",
    "attention.layer_norm_rms_epsilon": "f32",
    "rope.dimension_count": "u32",
    "rope.freq_base": "f32",
    "expert_count": "u32",
    "expert_used_count": "u32|array:u32|array:i32",
}
REQUIRED_KEYS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
ARCHITECTURE_REQUIRED_KEYS = ("block_count", "context_length", "embedding_length")
ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})
# Numbers that llama.cpp reads as one of its enumerations, and the most that those can hold.
MAX_FILE_TYPE = 1023
MAX_POOLING_TYPE = 4
TOKENIZERS: Mapping[str, Tokenizer] = MappingProxyType({
    "llama": Tokenizer({"bos": 1, "eos": 2}, frozenset({"bos"})),
    "gpt2": Tokenizer({"bos": 11, "eos": 11}),
    "bert": Tokenizer({"bos": 101, "seperator": 102}, frozenset({"bos"})),
    "t5": Tokenizer({"eos": 1}, frozenset({"eos"})),
    "rwkv": Tokenizer(),
    "plamo2": Tokenizer({"bos": 1, "eos": 2}),
    "gemma4": Tokenizer({"bos": 2, "eos": 1}),
    "hybriddna": Tokenizer({"bos": 11, "eos": 11}),
    "whitespace": Tokenizer({"bos": 11, "eos": 11}),
})  # fmt: skip
BYTE_TOKEN_TYPE = 6
BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
