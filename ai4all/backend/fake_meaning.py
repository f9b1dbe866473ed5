"""What a scripted backend takes texts to mean: the words they share, and nothing else."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DIMENSIONS", "word_likelihood", "word_vectors"]

DIMENSIONS: Final = 32

_WORD = re.compile(r"\w+")


def word_vectors(texts: Sequence[str], *, normalize: bool) -> npt.NDArray[np.float32]:
    """A row for each text: the sum of one vector of signs for each of its words.

    Texts with words in common are closer to each other than texts without.
    """
    import numpy as np

    rows = np.zeros((len(texts), DIMENSIONS), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in _words(text) or {""}:
            bits = zlib.crc32(word.encode())
            row += [1.0 if bits >> bit & 1 else -1.0 for bit in range(DIMENSIONS)]
    if normalize:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(lengths > 0.0, lengths, 1.0)
    return rows


def word_likelihood(prompt: str, continuation: str) -> float:
    """Log-likelihood of a continuation: a word that the prompt has is likelier than a new one."""
    known = _words(prompt)
    return -sum(
        (2.0 if word in known else 8.0) + zlib.crc32(word.encode()) % 4
        for word in _words(continuation) or {""}
    )


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}
