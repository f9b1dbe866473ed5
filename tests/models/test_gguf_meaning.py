"""What ends a loader with a failed assertion is refused before a loader sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_mutants import BUG_SHAPES, MALFORMED, small_model
from tiny_gguf import CHATML, Tensor, encode_gguf, tiny_metadata, tiny_tensors

from ai4all.errors import InvalidModelFile
from ai4all.models.gguf import read_header

# Refused by llama.cpp with an error of its own, or harmless: the pre-check lets them pass.
LEFT_TO_THE_LOADER = {
    "a character map of three bytes",
    "a character map that ends early",
    "a first token that is not there",
    "a last token below zero",
    "a map that leads out of itself",
    "a rotation at no frequency",
    "a template that does not end",
    "a template that grows",
    "a template that is cut short",
    "a template that looks for a way out",
    "a token type of its own",
    "a tokenizer without merges",
    "a vocabulary size of its own",
    "a weight of another width",
    "a weight that is missing",
    "an embedding of one row",
    "an odd rotation",
    "heads of no width",
    "merges of nothing",
    "more key heads than heads",
    "no heads",
    "rotations wider than a head",
    "suppressed tokens that are not there",
    "weights that are infinite",
    "weights that are no numbers",
}


def problem_of(content: bytes, folder: Path) -> str | None:
    path = folder / "m.gguf"
    path.write_bytes(content)
    try:
        read_header(path)
    except InvalidModelFile as error:
        return error.problem
    return None


def test_the_model_that_the_others_are_made_of_is_sound(tmp_path: Path) -> None:
    assert problem_of(small_model(), tmp_path) is None


@pytest.mark.parametrize("name", MALFORMED)
def test_every_class_of_upstreams_own_test_is_refused(name: str, tmp_path: Path) -> None:
    assert problem_of(MALFORMED[name](), tmp_path) is not None


def test_there_are_as_many_classes_as_upstream_has() -> None:
    # Twenty-six that it refuses, and the tensor without elements, which it accepts by now.
    assert len(MALFORMED) == 27


def test_every_shape_of_a_public_bug_is_refused_or_known_to_be_harmless(tmp_path: Path) -> None:
    passed = {name for name, make in BUG_SHAPES.items() if problem_of(make(), tmp_path) is None}
    assert passed == LEFT_TO_THE_LOADER


def vocabulary(**changes: tuple[int, Any]) -> dict[str, Any]:
    """Some items of the vocabulary's arrays changed."""
    metadata = dict(tiny_metadata())
    changed = {}
    for name, (index, item) in changes.items():
        kind, content = metadata[f"tokenizer.ggml.{name}"]
        changed[f"tokenizer.ggml.{name}"] = (kind, [*content[:index], item, *content[index + 1 :]])
    return changed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llama.rope.scaling.type": ("str", "wild")}, "rope.scaling.type = 'wild'"),
        ({"llama.pooling_type": ("u32", 5)}, "pooling_type = 5; 0 to 4"),
        ({"llama.pooling_type": ("str", "mean")}, "pooling_type = mean; 0 to 4"),
        ({"general.file_type": ("u32", 2**31)}, "file_type = 2147483648; 0 to 1023"),
        ({"llama.nextn_predict_layers": ("u32", 3)}, "nextn_predict_layers = 3 of 2 blocks"),
        ({"llama.posnet.block_count": ("u32", 3)}, "posnet.block_count = 3 of 2 blocks"),
        ({"llama.expert_count": ("u32", 1025)}, "expert_count = 1025"),
        ({"llama.expert_count": ("u32", 4)}, "expert_used_count = 0 of 4"),
        ({"llama.expert_used_count": ("u32", 1)}, "expert_used_count = 1 of 0"),
        ({"llama.expert_used_count": ("array:u32", [0, 1])}, "expert_used_count = 1 of 0"),
        ({"llama.expert_group_count": ("u32", 2)}, "group_count = 2 of 0"),
        (
            {
                "llama.expert_count": ("u32", 4),
                "llama.expert_used_count": ("u32", 2),
                "llama.expert_group_count": ("u32", 3),
            },
            "4 experts in 3 groups, 0 of them used",
        ),
        ({"llama.attention.scale": ("f32", float("inf"))}, "attention.scale = inf"),
        ({"llama.attention.layer_norm_rms_epsilon": ("f32", -1.0)}, "which is negative"),
        ({"llama.attention.group_norm_epsilon": ("f32", float("nan"))}, "is not finite"),
        ({"tokenizer.ggml.model": ("str", "none")}, "tokenizer 'none'"),
        ({"tokenizer.ggml.model": ("str", "no_vocab")}, "tokenizer 'no_vocab'"),
        ({"tokenizer.ggml.model": ("str", "")}, "tokenizer ''"),
        ({"tokenizer.ggml.model": ("str", "bert")}, "byte token, which its tokenizer cannot"),
        ({"tokenizer.ggml.model": ("str", "rwkv")}, "no token for the line feed"),
        (
            {"tokenizer.ggml.model": ("str", "t5"), "tokenizer.ggml.add_bos_token": ("bool", True),
             "tokenizer.ggml.bos_token_id": ("u32", 1 << 20)},
            "has no bos token",
        ),
        (vocabulary(tokens=(700, "the"), token_type=(700, 1)), None),
        (vocabulary(tokens=(700, "▁the")), "token 700 has the text of an earlier one"),
        # What a loader reads ends at the first zero byte.
        (vocabulary(tokens=(700, "▁the\0more")), "token 700 has the text of an earlier one"),
        ({"tokenizer.chat_template": ("str", "{{" + "(" * 300 + ")" * 300 + "}}")}, "302 deep"),
        ({"tokenizer.chat_template.x": ("str", "{% if a %}" * 201)}, "201 deep"),
        ({"tokenizer.chat_template": ("str", CHATML * 40)}, None),
        ({"tokenizer.chat_template": ("str", "{% if a %}{{ [{'b': 1}] }}{% endif %}" * 500)}, None),
    ],
)  # fmt: skip
def test_what_a_loader_takes_for_granted(
    changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    problem = problem_of(encode_gguf({**tiny_metadata(), **changes}, tiny_tensors()), tmp_path)
    if reason is None:
        assert problem is None
    else:
        assert problem is not None
        assert reason in problem


@pytest.mark.parametrize(
    ("dims", "kind", "block_bytes", "reason"),
    [
        ((32,), 8, 34, "1 dimensions of Q8_0, which is no weight"),
        ((32,), 24, 32, "1 dimensions of I8"),
        ((32, 1), 24, 32, "2 dimensions of I8"),
        ((32, 1), 28, 256, "2 dimensions of F64"),
        ((32, 1), 9, 36, "2 dimensions of Q8_1"),
        ((32,), 30, 64, "1 dimensions of BF16"),
        ((32,), 0, 128, None),
        ((32, 1), 8, 34, None),
        ((32, 1), 26, 128, None),
    ],
)
def test_types_that_nothing_computes_with(
    dims: tuple[int, ...], kind: int, block_bytes: int, reason: str | None, tmp_path: Path
) -> None:
    tensors = [*tiny_tensors(), Tensor("t", dims, kind, bytes(block_bytes))]
    problem = problem_of(encode_gguf(tiny_metadata(), tensors), tmp_path)
    assert problem is None if reason is None else reason in str(problem)
