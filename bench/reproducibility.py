"""What changes the tokens and what does not: the reproducibility matrix, as measured.

Greedy decoding picks the largest logit. The order in which a product is summed depends on threads,
batch shape and kernels, so two logits that are nearly equal may swap places; the text then goes
another way from there on. Each row below changes one thing against the first row and says for how
many of the prompts the token ids stayed the same, with the sha256 over all ids (as little-endian
32-bit integers, prompt after prompt).

Usage: python bench/reproducibility.py MODEL.gguf [--tokens 64] [--formats Q8_0,Q4_0] [--quick]
       [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import logging
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ujson
from rich.console import Console
from rich.table import Table

from ai4all.backend.base import EngineOptions, GenerateRequest, InferenceBackend
from ai4all.backend.cores import compute_threads
from ai4all.backend.native import NativeBackend, engine_build_line
from ai4all.errors import LoadFailed
from ai4all.models.gguf import read_header
from ai4all.models.reencode import reencode
from ai4all.types.model import ModelFile

PREFIX = (
    "The harbour master keeps a book in which every ship that has ever called at the island is "
    "written down, with the day, the weather, what it carried and what it took away. "
)

PROMPTS = (
    "Hello, world!",
    "Explain quantum computing in simple terms.",
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "List three uses for a brick:\n1.",
    "Q: What is the boiling point of water?\nA:",
    PREFIX + "One evening a boat came that was not in the book, and",
    PREFIX + "When his daughter learnt to read, the first thing she asked was",
)
"""The published prompt set. The last two share a beginning long enough to be reused."""

QUICK_PROMPTS, QUICK_TOKENS = PROMPTS[:2] + PROMPTS[-2:], 12


@dataclass(frozen=True)
class Setting:
    """One row: what is changed, and how."""

    axis: str
    value: str
    options: EngineOptions
    neighbours: int = 0
    reuse_prefix: bool = False
    speculate: bool = False
    deterministic: bool = False
    file: Path | None = None


@dataclass(frozen=True)
class Row:
    """A setting, and the token ids of each prompt under it."""

    setting: Setting
    token_ids: tuple[tuple[int, ...], ...]
    reused: int
    batched_with: int

    @property
    def sha256(self) -> str:
        """Over all ids."""
        ids = array("i", [token for answer in self.token_ids for token in answer])
        if sys.byteorder == "big":
            ids.byteswap()
        return hashlib.sha256(ids.tobytes()).hexdigest()


def settings_of(base: EngineOptions, formats: dict[str, Path], *, quick: bool) -> list[Setting]:
    """The rows; the first is what the others are compared with."""
    threads = [1, 2, *([compute_threads()] if compute_threads() > 2 else [])]

    def changed(axis: str, value: object, **options: object) -> Setting:
        return Setting(axis, str(value), dataclasses.replace(base, **options))  # type: ignore[arg-type]

    rows = [Setting("baseline", _describe(base), base), Setting("again", "the same", base)]
    rows += [changed("threads", n, threads=n) for n in threads if n != base.threads]
    sizes = (16,) if quick else (16, 64, 256)
    rows += [changed("ubatch", n, n_ubatch=n) for n in sizes if n != base.n_ubatch]
    rows += [changed("batch", n, n_batch=n) for n in (64,) if n != base.n_batch]
    rows += [changed("slots", 4, n_slots=4)]
    rows += [
        Setting("neighbours", "3", dataclasses.replace(base, n_slots=4), neighbours=3),
        Setting("prefix reuse", "on", base, reuse_prefix=True),
        Setting("speculation", "on", base, speculate=True),
        changed("flash attention", "off", flash_attention="off"),
        changed("KV cache", "q8_0", kv_type="q8_0"),
        changed("mmap", "off", use_mmap=False),
        Setting("deterministic", "alone", base, deterministic=True),
        Setting(
            "deterministic",
            "3 neighbours, reuse asked for",
            dataclasses.replace(base, n_slots=4),
            neighbours=3,
            reuse_prefix=True,
            speculate=True,
            deterministic=True,
        ),
    ]
    rows += [Setting("format", name, base, file=path) for name, path in formats.items()]
    return rows


def _describe(options: EngineOptions) -> str:
    return (
        f"{options.threads} threads, batch {options.n_batch}, ubatch {options.n_ubatch}, "
        f"flash attention {options.flash_attention}"
    )


async def measure(
    path: Path, settings: Sequence[Setting], prompts: Sequence[str], tokens: int
) -> list[Row]:
    """Run every setting over the prompts; one that the model does not allow is left out."""
    rows = []
    async with NativeBackend() as backend:
        for setting in settings:
            file = setting.file or path
            model = ModelFile(file.stem, file, "0" * 64, file.stat().st_size)
            try:
                await backend.load(model, setting.options)
            except LoadFailed as error:
                print(f"left out: {setting.axis} {setting.value}: {error}", file=sys.stderr)
                continue
            rows.append(await _run(backend, setting, prompts, tokens))
    return rows


async def _run(
    backend: InferenceBackend, setting: Setting, prompts: Sequence[str], tokens: int
) -> Row:
    answers, reused, most = [], 0, 0
    for number, prompt in enumerate(prompts):
        request = GenerateRequest(
            prompt=prompt,
            max_tokens=tokens,
            temperature=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            reuse_prefix=setting.reuse_prefix,
            speculate=setting.speculate,
            deterministic=setting.deterministic,
        )
        others = [
            asyncio.ensure_future(
                backend.complete(
                    dataclasses.replace(
                        request,
                        prompt=f"{prompts[(number + n) % len(prompts)]} {n}",
                        deterministic=False,
                        reuse_prefix=False,
                    )
                )
            )
            for n in range(1, setting.neighbours + 1)
        ]
        await asyncio.sleep(0)
        completion = await backend.complete(request)
        await asyncio.gather(*others)
        answers.append(completion.token_ids)
        reused += completion.fingerprint.prefix_reused
        most = max(most, completion.fingerprint.batched_with)
    return Row(setting, tuple(answers), reused, most)


def same_prompts(row: Row, baseline: Row) -> int:
    """Prompts whose token ids are those of the baseline."""
    pairs = zip(row.token_ids, baseline.token_ids, strict=True)
    return sum(ours == theirs for ours, theirs in pairs)


def first_difference(row: Row, baseline: Row) -> int | None:
    """The earliest token, counted from 0, at which a prompt's answer goes another way."""
    places = [
        next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        for ours, theirs in zip(row.token_ids, baseline.token_ids, strict=True)
        if ours != theirs
    ]
    return min(places, default=None)


def document(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The matrix for ``--json``."""
    return [
        {
            "axis": row.setting.axis,
            "value": row.setting.value,
            "identical_prompts": same_prompts(row, rows[0]),
            "prompts": len(row.token_ids),
            "first_difference": first_difference(row, rows[0]),
            "prefix_reused": row.reused,
            "batched_with": row.batched_with,
            "token_ids_sha256": row.sha256,
        }
        for row in rows
    ]


def table(rows: Sequence[Row], title: str) -> Table:
    """The matrix for a person."""
    made = Table(title=title)
    for heading in ("what changes", "to", "token-identical", "first difference", "sha256 of ids"):
        made.add_column(heading, overflow="fold")
    for row in rows:
        same, all_of_them = same_prompts(row, rows[0]), len(row.token_ids)
        verdict = "yes" if same == all_of_them else "no"
        place = first_difference(row, rows[0])
        made.add_row(
            row.setting.axis,
            row.setting.value,
            f"{verdict}, {same} of {all_of_them}",
            "-" if place is None else f"token {place}",
            row.sha256[:16],
        )
    return made


async def _with_formats(
    arguments: argparse.Namespace, prompts: Sequence[str], tokens: int
) -> list[Row]:
    base = EngineOptions(n_ctx=512, threads=min(2, compute_threads()), prefix_cache_mb=64)
    own = read_header(arguments.model).quantization
    with tempfile.TemporaryDirectory() as folder:
        formats = {}
        for name in filter(None, arguments.formats.split(",")):
            if name != own:
                formats[name] = Path(folder) / f"{name}.gguf"
                await reencode(arguments.model, formats[name], name, threads=base.threads)
        settings = settings_of(base, formats, quick=arguments.quick)
        return await measure(arguments.model, settings, prompts, tokens)


def main() -> int:
    """Measure and print. Exit status 1 when repeating, or deterministic mode, is not exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--formats", default="Q8_0,Q4_0", help="encodings to compare with")
    parser.add_argument("--quick", action="store_true", help="four prompts, twelve tokens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("ai4all.engine").setLevel(logging.CRITICAL)
    prompts, tokens = (
        (QUICK_PROMPTS, QUICK_TOKENS) if arguments.quick else (PROMPTS, arguments.tokens)
    )
    rows = asyncio.run(_with_formats(arguments, prompts, tokens))
    if arguments.json:
        print(ujson.dumps(document(rows), indent=2))
    else:
        title = f"{arguments.model.stem}, {engine_build_line()}, {tokens} tokens a prompt"
        Console().print(table(rows, title))
    again = [row.sha256 == rows[0].sha256 for row in rows if row.setting.axis == "again"]
    exact = {row.sha256 for row in rows if row.setting.axis == "deterministic"}
    return 0 if all(again) and len(exact) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
