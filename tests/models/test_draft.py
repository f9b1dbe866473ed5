"""Which model can draft for which, told from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import encode_gguf, tiny_metadata, tiny_tensors

from ai4all.models.draft import draft_misfit
from ai4all.models.gguf import GGUFHeader, read_header

Header = Callable[..., GGUFHeader]


@pytest.fixture
def header(tmp_path: Path) -> Header:
    """Makes headers of tiny models: what is changed or, being None, left out, by key."""

    def make(renamed: dict[int, str] | None = None, **changes: Any) -> GGUFHeader:
        metadata = tiny_metadata(renamed=renamed)
        for name, content in changes.items():
            key = name.replace("__", ".")
            if content is None:
                del metadata[key]
            else:
                metadata[key] = content
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        path.write_bytes(encode_gguf(metadata, tiny_tensors()))
        return read_header(path, arrays=True)

    return make


def test_models_of_one_vocabulary(header: Header) -> None:
    assert draft_misfit(header(), header()) is None
    # The first tokens may have other names, and the end may be padded.
    assert draft_misfit(header(), header({0: "[unknown]", 4: "[end]"})) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"renamed": {300: "nowhere"}}, r"token 300 is 'nowhere', the model's '.+'"),
        ({"tokenizer__ggml__add_bos_token": ("bool", False)}, "begin with another token"),
        ({"tokenizer__ggml__bos_token_id": ("u32", 3)}, "begin with another token"),
        ({"tokenizer__ggml__add_eos_token": ("bool", True)}, "end with another token"),
        ({"llama__attention__sliding_window": ("u32", 128)}, "it has a sliding window"),
    ],
)
def test_models_of_two(header: Header, changes: dict[str, Any], problem: str) -> None:
    found = draft_misfit(header(), header(**changes))
    assert found is not None
    assert re.search(problem, found)


def test_the_model_itself_may_be_what_cannot_be_drafted_for(header: Header) -> None:
    found = draft_misfit(header(llama__attention__sliding_window=("u32", 128)), header())
    assert found == "the model has a sliding window, which has no way back from a wrong draft"


def test_what_a_header_leaves_open_is_the_engines_to_say(header: Header) -> None:
    silent = header(tokenizer__ggml__add_bos_token=None)
    assert draft_misfit(header(), silent) is None
    assert draft_misfit(silent, header()) is None


@pytest.mark.parametrize(("missing", "fits"), [(100, True), (200, False)])
def test_vocabularies_may_differ_a_little_in_length(
    header: Header, missing: int, fits: bool
) -> None:
    whole = header()
    kept = {
        name: whole.metadata[f"tokenizer.ggml.{name}"][:-missing]  # type: ignore[index]
        for name in ("tokens", "scores", "token_type")
    }
    kinds = {"tokens": "array:str", "scores": "array:f32", "token_type": "array:i32"}
    changes = {f"tokenizer__ggml__{name}": (kinds[name], kept[name]) for name in kept}
    shorter = header(llama__vocab_size=("u32", len(kept["tokens"])), **changes)
    found = draft_misfit(whole, shorter)
    assert (found is None) is fits
    if found is not None:
        assert found == f"it has {len(kept['tokens'])} tokens, the model {whole.vocabulary_size}"
