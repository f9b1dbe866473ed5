"""Sentences and words of a text, and where they are.

The texts are the requesters': every pattern takes time in proportion to the text, whatever is in
it. So a run of marks is matched from its first one only, and given back never.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["ends_sentence", "nearest_sentence_end", "sentence_spans", "words"]

# A full stop within a number or an abbreviation has no space after it. Scripts that put no space
# between sentences have marks of their own.
_LATIN_END: Final = r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+"
_CJK_END: Final = r"(?<![。！？])[。！？]++[」』”]*+"
_SENTENCE = re.compile(rf"\S.*?(?:{_LATIN_END}(?=\s|\Z)|{_CJK_END}|\Z)", re.DOTALL)
_END = re.compile(rf"(?:{_LATIN_END}|{_CJK_END})\Z")

_LINE = re.compile(r"[^\n]*+\n?")
_LIST_ITEM = re.compile(r"[^\S\n]*+(?:[-*•‣]|\d{1,3}[.)])\s")

# Scripts that put no space between words are compared by the character.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """``[start, end)`` of each sentence, in characters, without white space around it.

    A sentence may go on over the end of a line, but not over an empty line or into a list's item.
    """
    for block_start, block in _blocks(text):
        for match in _SENTENCE.finditer(block):
            start = block_start + match.start()
            yield start, start + len(match[0].rstrip())


def words(text: str) -> list[str]:
    """The words of a text in order, without marks and regardless of case."""
    return [word.casefold() for word in _WORD.findall(text)]


def nearest_sentence_end(text: str, word_count: int) -> int:
    """Where to cut a text for the length nearest ``word_count``, but only after a whole sentence.

    The whole text when no sentence in it ends.
    """
    best, best_miss, count = len(text), -1, 0
    for start, end in sentence_spans(text):
        count += len(text[start:end].split())
        miss = abs(count - word_count)
        if ends_sentence(text[start:end]) and (best_miss < 0 or miss < best_miss):
            best, best_miss = end, miss
    return best


def ends_sentence(text: str) -> bool:
    """Whether the text ends as a sentence does."""
    return _END.search(text) is not None


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and items of lists, with their places."""
    begun = 0
    for line in _LINE.finditer(text):
        if line.start() > begun and (not line[0].strip() or _LIST_ITEM.match(line[0])):
            yield begun, text[begun : line.start()]
            begun = line.start()
    yield begun, text[begun:]
