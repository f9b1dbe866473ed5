"""Whether one model can draft for another, told from their headers."""

from __future__ import annotations

from ai4all.models.gguf import GGUFHeader

__all__ = ["draft_misfit"]

# As llama.cpp has them: vocabularies of one family may be padded differently, and may name their
# first tokens differently.
_LARGEST_DIFFERENCE = 128
_FIRST_COMPARED = 5

_MARKS = (
    ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "begin"),
    ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_eos_token", "end"),
)


def draft_misfit(target: GGUFHeader, draft: GGUFHeader) -> str | None:
    """Why ``draft`` cannot draft for ``target``; None when nothing in the headers says so.

    The engine looks again when it has both: it also knows what a header leaves to it.

    Args:
        target: Of the model that computes, read with ``arrays=True``.
        draft: Of the model that shall draft, read so too.
    """
    for header, name in ((target, "the model"), (draft, "it")):
        if header.metadata.get(f"{header.architecture}.attention.sliding_window"):
            return f"{name} has a sliding window, which has no way back from a wrong draft"
    kinds = [header.metadata.get("tokenizer.ggml.model") for header in (target, draft)]
    if kinds[0] != kinds[1]:
        return f"its tokenizer is {kinds[1]}, the model's {kinds[0]}"
    for token, flag, verb in _MARKS:
        added = [header.metadata.get(flag) for header in (target, draft)]
        tokens = [header.metadata.get(token) for header in (target, draft)]
        if None in added:
            continue  # the engine knows what the tokenizer does by itself
        if added[0] != added[1] or (added[0] and tokens[0] != tokens[1]):
            return f"its texts {verb} with another token"
    texts, its_texts = _tokens(target), _tokens(draft)
    if abs(len(texts) - len(its_texts)) > _LARGEST_DIFFERENCE:
        return f"it has {len(its_texts)} tokens, the model {len(texts)}"
    compared = zip(texts[_FIRST_COMPARED:], its_texts[_FIRST_COMPARED:], strict=False)
    for number, (text, its_text) in enumerate(compared, _FIRST_COMPARED):
        if text != its_text:
            return f"its token {number} is {its_text!r}, the model's {text!r}"
    return None


def _tokens(header: GGUFHeader) -> tuple[object, ...]:
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple), "read without arrays"
    return tokens
