"""Sentences and words of a text, and where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["last_sentence_end", "sentence_spans", "words"]

# To the end of the line or to a mark that ends a sentence: a full stop within a number or an
# abbreviation has no space after it. Scripts that put no space between sentences have marks of
# their own.
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”]*|$)", re.MULTILINE)
_END = re.compile(r"(?:[.!?…]+[\"'”’»)\]]*|[。！？]+[」』”]*)\Z")

# Scripts that put no space between words are compared by the character.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """``[start, end)`` of each sentence, in characters, without white space around it."""
    for match in _SENTENCE.finditer(text):
        start, end = match.span()
        yield start, start + len(text[start:end].rstrip())


def words(text: str) -> list[str]:
    """The words of a text in order, without marks and regardless of case."""
    return [word.casefold() for word in _WORD.findall(text)]


def last_sentence_end(text: str) -> int:
    """Where the last whole sentence ends, or 0 when there is none."""
    ends = [end for start, end in sentence_spans(text) if _END.search(text[start:end])]
    return ends[-1] if ends else 0
