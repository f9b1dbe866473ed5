"""Which encoding of a model runs fastest here, by measuring, and what it costs in quality.

Every candidate runs the benchmark's own prompts, in turn with the model as it came, so that what
else the machine does hits all alike; medians count. The one with the most tokens per second wins,
as long as its perplexity is not worse than a stated bound, and as long as it beats the original by
more than noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.benchmark.perplexity import Perplexity, perplexity
from ai4all.benchmark.scores import BenchmarkResult
from ai4all.benchmark.suite import BenchmarkSuite
from ai4all.models.gguf import GGUFHeader
from ai4all.models.memory import load_model
from ai4all.models.reencode import BITS_PER_WEIGHT
from ai4all.types.model import ModelFile

__all__ = ["Encoding", "FitRow", "candidate_types", "choose", "cost_of", "measure_encodings"]

# Part of a speed by which a candidate must beat the original.
_NOISE = 0.03

_SUPER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Encoding:
    """A file of the model, and the type most of its weights have."""

    type_name: str
    file: ModelFile


@dataclass(frozen=True, slots=True)
class FitRow:
    """What was measured of one encoding. Speeds are medians, in tokens per second.

    Attributes:
        tokens_per_second: The benchmark's own figure: tokens over whole time, prompts included.
        prompt_tokens_per_second: Of the long prompt.
        decode_tokens_per_second: Mean over the prompts.
        perplexity_tokens: Tokens that the perplexity is the mean of.
        note: What should be known of it; empty when nothing.
    """

    type_name: str
    sha256: str
    size_bytes: int
    perplexity: float
    perplexity_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


@dataclass(slots=True)
class _Runs:
    perplexity: Perplexity | None = None
    results: list[BenchmarkResult] = field(default_factory=list)


def candidate_types(header: GGUFHeader) -> list[str]:
    """The types worth trying by default: those with the fastest kernels, but for its own.

    Q4_K needs rows of a multiple of 256 weights; where they are not, it would be another type.
    """
    types = ["Q4_0", "Q8_0"]
    if header.embedding_length % _SUPER_BLOCK == 0:
        types.insert(1, "Q4_K_S")
    return [name for name in types if name != header.quantization]


def cost_of(original: str, type_name: str) -> str:
    """What re-encoding from ``original`` to ``type_name`` means for quality, in words."""
    before, after = BITS_PER_WEIGHT.get(original), BITS_PER_WEIGHT.get(type_name)
    if before is None or after is None:
        return ""
    if after > before:
        return f"larger than {original}, and cannot win back what that had lost"
    if before < BITS_PER_WEIGHT["F16"]:
        return f"rounded again, after {original} had rounded"
    return ""


async def measure_encodings(
    backend: InferenceBackend,
    encodings: Sequence[Encoding],
    options: EngineOptions,
    *,
    rounds: int = 3,
    progress: Callable[[str, float], None] | None = None,
) -> list[FitRow]:
    """Measure encodings of one model, the original first.

    Args:
        backend: With nothing running; what it holds is dropped.
        encodings: The original, then the candidates.
        options: How to run them all.
        rounds: Times that each one is measured, in turn.
        progress: Called with what is being done and the share of the whole.

    Raises:
        OutOfMemory: One does not fit.
        ComputeError: It could not be computed.
    """
    runs = {encoding.type_name: _Runs() for encoding in encodings}
    steps = [encoding for _ in range(rounds) for encoding in encodings]
    for number, encoding in enumerate(steps):
        if progress is not None:
            progress(encoding.type_name, number / len(steps))
        await load_model(backend, encoding.file, options)
        run = runs[encoding.type_name]
        if run.perplexity is None:
            run.perplexity = await perplexity(backend)
        run.results.append(await BenchmarkSuite().run(backend))
    original = encodings[0].type_name
    return [
        _row(encoding, runs[encoding.type_name], cost_of(original, encoding.type_name))
        if encoding is not encodings[0]
        else _row(encoding, runs[encoding.type_name], "")
        for encoding in encodings
    ]


def choose(rows: Sequence[FitRow], max_perplexity_increase: float) -> FitRow:
    """The row to compute with: the fastest whose perplexity is within the bound.

    Args:
        rows: The original first. It wins when nothing is clearly faster.
        max_perplexity_increase: Part of the original's perplexity, such as 0.05.
    """
    original = rows[0]
    bound = original.perplexity * (1.0 + max_perplexity_increase)
    fit = [row for row in rows[1:] if row.perplexity <= bound]
    best = max(fit, key=lambda row: row.tokens_per_second, default=original)
    return best if best.tokens_per_second > original.tokens_per_second * (1 + _NOISE) else original


def _row(encoding: Encoding, run: _Runs, note: str) -> FitRow:
    assert run.perplexity is not None
    return FitRow(
        type_name=encoding.type_name,
        sha256=encoding.file.sha256,
        size_bytes=encoding.file.size_bytes,
        perplexity=run.perplexity.value,
        perplexity_tokens=run.perplexity.tokens,
        tokens_per_second=statistics.median(r.scores.tokens_per_second for r in run.results),
        prompt_tokens_per_second=statistics.median(_prompt_rate(r) for r in run.results),
        decode_tokens_per_second=statistics.median(_decode_rate(r) for r in run.results),
        note=note,
    )


def _prompt_rate(result: BenchmarkResult) -> float:
    longest = max(result.prompts, key=lambda row: row.prompt_tokens)
    return longest.prompt_tokens_per_second or 0.0


def _decode_rate(result: BenchmarkResult) -> float:
    return statistics.fmean(row.decode_tokens_per_second or 0.0 for row in result.prompts)
