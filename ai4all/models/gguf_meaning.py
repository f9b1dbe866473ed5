"""What a loader takes for granted about the keys of a model, and aborts or worse without.

Most wrong values end a load with an error, and those are left to the loader. Here are the ones
that end it with a failed assertion or with what memory happens to hold: each is checked in
llama.cpp by nothing but an assertion, or by nothing at all. The checks are of keys that models of
any architecture have; what one architecture alone takes for granted is left to the engine's own
process, which may die of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ai4all.models.gguf_format import (
    ARCHITECTURE,
    ARCHITECTURE_KEY_TYPES,
    ARCHITECTURE_REQUIRED_KEYS,
    BYTE_TOKEN_TYPE,
    INTEGERS,
    KEY_TYPES,
    MAX_BLOCKS,
    MAX_EXPERTS,
    MAX_FILE_TYPE,
    MAX_POOLING_TYPE,
    MAX_TEMPLATE_DEPTH,
    REQUIRED_KEYS,
    ROPE_SCALINGS,
    TOKENIZERS,
    ArrayInfo,
    Value,
)

__all__ = ["Vocabulary", "length_of", "problems"]


@dataclass(slots=True)
class Vocabulary:
    """What was seen of the tokens while they passed by.

    Attributes:
        byte_tokens: Tokens whose text is ``<0xHH>``.
        token_types: Their types, as numbers; empty when the file has none.
        twins: The first token whose text an earlier one has, or None.
        has_newline: Whether one is the line feed as RWKV writes it.
    """

    byte_tokens: set[int] = field(default_factory=set)
    token_types: tuple[int, ...] = ()
    twins: int | None = None
    has_newline: bool = False


def length_of(value: Value) -> int:
    """Number of items of an array; 0 of anything else."""
    if isinstance(value, ArrayInfo):
        return value.length
    return len(value) if isinstance(value, tuple) else 0


def problems(
    metadata: Mapping[str, Value], types: Mapping[str, str], vocabulary: Vocabulary
) -> Iterator[str]:
    """Yield what is wrong with the keys. After the first, the rest may not make sense.

    Args:
        metadata: Keys and values.
        types: The type of each value, such as "u32" or "array:str".
        vocabulary: What the reader saw of the tokens.
    """
    for key in REQUIRED_KEYS:
        if key not in metadata:
            yield f"has no {key}"
    yield from _wrong_types(KEY_TYPES, "", types)
    architecture = str(metadata["general.architecture"])
    if not ARCHITECTURE.fullmatch(architecture):
        yield f"has the architecture {architecture[:64]!r}, which is not a name"
    yield from _wrong_types(ARCHITECTURE_KEY_TYPES, f"{architecture}.", types)
    kind = metadata.get("general.type", "model")
    if kind != "model":
        yield f"is not a model by itself: its general.type is {str(kind)[:64]!r}"
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        yield f"is one part of {parts}; merge them into one file first"
    for key in ARCHITECTURE_REQUIRED_KEYS:
        value = metadata.get(f"{architecture}.{key}")
        most = MAX_BLOCKS if key == "block_count" else (1 << 31) - 1
        if value is None:
            yield f"has no {architecture}.{key}"
        if not isinstance(value, int) or not 1 <= value <= most:
            yield f"has {architecture}.{key} = {value}; 1 to {most} are accepted"
    shape = _Shape(architecture, metadata)
    yield from shape.problems(types)
    yield from _tokenizer_problems(metadata, types, vocabulary)
    yield from _template_problems(metadata)


def _wrong_types(
    expected: Mapping[str, str], prefix: str, types: Mapping[str, str]
) -> Iterator[str]:
    for key, accepted in expected.items():
        found = types.get(prefix + key)
        if found is not None and found not in accepted.split("|"):
            yield f"{prefix}{key} is {found}, expected {accepted.replace('|', ' or ')}"


class _Shape:
    """The keys below the architecture's name."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        self._prefix = f"{architecture}."
        self._metadata = metadata

    def _largest(self, key: str) -> int:
        """A count that may come as one number or as one for each block; 0 when it is absent."""
        value = self._metadata.get(self._prefix + key, 0)
        numbers = value if isinstance(value, tuple) else (value,)
        return max((n for n in numbers if isinstance(n, int)), default=0)

    def problems(self, types: Mapping[str, str]) -> Iterator[str]:
        n_blocks = self._largest("block_count")
        for key, value in self._metadata.items():
            name = key.removeprefix(self._prefix)
            ours = name in ARCHITECTURE_KEY_TYPES
            if ours and types[key].startswith("array:") and length_of(value) != n_blocks:
                yield f"{key} has {length_of(value)} items, not one for each block"
            if name != key and isinstance(value, float):
                yield from self._wrong_float(key, value)
        for key in ("nextn_predict_layers", "posnet.block_count", "convnext.block_count"):
            if self._largest(key) > n_blocks:
                yield f"has {self._prefix}{key} = {self._largest(key)} of {n_blocks} blocks"
        scaling = self._metadata.get(f"{self._prefix}rope.scaling.type", "linear")
        if scaling not in ROPE_SCALINGS:
            yield f"has {self._prefix}rope.scaling.type = {str(scaling)[:32]!r}"
        for key, most in (
            ("general.file_type", MAX_FILE_TYPE),
            (f"{self._prefix}pooling_type", MAX_POOLING_TYPE),
        ):
            value = self._metadata.get(key, 0)
            if not isinstance(value, int) or not 0 <= value <= most:
                yield f"has {key} = {value}; 0 to {most} are accepted"
        yield from self._expert_problems()

    def _wrong_float(self, key: str, value: float) -> Iterator[str]:
        if not math.isfinite(value):
            yield f"has {key} = {value}, which is not finite"
        if key.endswith("epsilon") and value < 0.0:
            yield f"has {key} = {value}, which is negative"

    def _expert_problems(self) -> Iterator[str]:
        experts, used = self._largest("expert_count"), self._largest("expert_used_count")
        groups, groups_used = (
            self._largest("expert_group_count"),
            self._largest("expert_group_used_count"),
        )
        name = f"{self._prefix}expert"
        if experts > MAX_EXPERTS:
            yield f"has {name}_count = {experts}; at most {MAX_EXPERTS} are accepted"
        if not (1 <= used <= experts if experts else used == 0):
            yield f"has {name}_used_count = {used} of {experts} experts"
        if groups and groups >= experts:
            yield f"has {name}_group_count = {groups} of {experts} experts"
        if groups > 1 and (experts % groups or not 0 < groups_used < groups):
            yield f"has {experts} experts in {groups} groups, {groups_used} of them used"


def _tokenizer_problems(
    metadata: Mapping[str, Value], types: Mapping[str, str], vocabulary: Vocabulary
) -> Iterator[str]:
    n_tokens = length_of(metadata["tokenizer.ggml.tokens"])
    if n_tokens == 0:
        yield "has an empty vocabulary"
    model = str(metadata["tokenizer.ggml.model"])
    if model not in TOKENIZERS:
        yield f"has the tokenizer {model[:32]!r}; known are {', '.join(sorted(TOKENIZERS))}"
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in metadata and length_of(metadata[key]) != n_tokens:
            yield f"{key} has {length_of(metadata[key])} items for {n_tokens} tokens"
    for key, found in types.items():
        is_token_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_token_id and found not in INTEGERS:
            yield f"{key} is {found}, expected an integer"
    yield from _byte_token_problems(model, vocabulary.token_types, vocabulary.byte_tokens)
    if vocabulary.twins is not None:
        yield f"token {vocabulary.twins} has the text of an earlier one"
    if model == "rwkv" and not vocabulary.has_newline:
        yield "has no token for the line feed, which its tokenizer needs"
    for role, needed in _needed_tokens(model, metadata):
        if needed is None or needed >= n_tokens:
            yield f"has no {role} token, but its tokenizer adds one"


def _byte_token_problems(
    model: str, token_types: Sequence[int], byte_tokens: Collection[int]
) -> Iterator[str]:
    for index, kind in enumerate(token_types):
        if kind != BYTE_TOKEN_TYPE:
            continue
        # Loaders take the byte's value out of the token's text without looking.
        if index not in byte_tokens:
            yield f"token {index} is a byte token, but its text is not <0xHH>"
        if model == "bert":
            yield f"token {index} is a byte token, which its tokenizer cannot have"


def _needed_tokens(model: str, metadata: Mapping[str, Value]) -> Iterator[tuple[str, int | None]]:
    """Tokens that the tokenizer puts around every text: what each is for, and which it is."""
    defaults = TOKENIZERS[model]

    def which(role: str) -> int | None:
        named = metadata.get(f"tokenizer.ggml.{role}_token_id")
        n_tokens = length_of(metadata["tokenizer.ggml.tokens"])
        # One that is not there is passed over for the default.
        if isinstance(named, int) and 0 <= named < n_tokens:
            return named
        return defaults.ids.get(role)

    for flag, role in (("add_bos_token", "bos"), ("add_eos_token", "eos")):
        if metadata.get(f"tokenizer.ggml.{flag}", role in defaults.added):
            yield role, which(role)
    if model == "bert":
        yield "seperator", which("seperator")


def _template_problems(metadata: Mapping[str, Value]) -> Iterator[str]:
    for key, value in metadata.items():
        if "chat_template" in key and isinstance(value, str):
            depth = _deepest(value)
            if depth > MAX_TEMPLATE_DEPTH:
                yield f"{key} is nested {depth} deep; at most {MAX_TEMPLATE_DEPTH} are accepted"


def _deepest(template: str) -> int:
    """How deep brackets and blocks stand in each other, at most.

    Brackets in texts and comments count too: real templates are far from the limit all the same.
    """
    depth = deepest = 0
    for piece in template.replace("{%", "\0").replace("%}", " ").split("\0"):
        word = piece.lstrip("-+ \t\r\n")[:8]
        if word.startswith(("for", "if", "macro", "call", "filter")):
            depth += 1
        elif word.startswith("end"):
            depth -= 1
        for character in piece:
            if character in "([{":
                depth += 1
                deepest = max(deepest, depth)
            elif character in ")]}":
                depth -= 1
        deepest = max(deepest, depth)
    return deepest
