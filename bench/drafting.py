"""Whether a draft model pays: decoding plainly, by prompt lookup alone, and with the draft model.

Each prompt is answered greedily in each way, in turn, and compared with its plain answer. What a
draft model gains depends on the two models, the text and the machine: measure your own.

Usage: python bench/drafting.py MODEL.gguf DRAFT.gguf [--tokens 160] [--rounds 3] [--fixed 8]
       [--threads 0] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ujson
from peers_prompts import OTHER_PROMPTS, QUOTING_PROMPTS, Prompt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ai4all.backend.base import Completion, EngineOptions, GenerateRequest
from ai4all.backend.native import NativeBackend, engine_build_line
from ai4all.types.model import ModelFile

GROUPS = {"quoting": QUOTING_PROMPTS, "other": OTHER_PROMPTS}
"""The published prompts, by whether the answer repeats much of its prompt."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode."""

    name: str
    options: EngineOptions
    speculate: bool = True


@dataclass
class Answers:
    """Answers to one prompt in one way, one of each round."""

    rates: list[float] = field(default_factory=list)
    last: Completion | None = None

    def add(self, completion: Completion) -> None:
        """Take the answer of one more round."""
        self.rates.append(completion.timings.decode_tokens_per_second or 0.0)
        self.last = completion

    @property
    def completion(self) -> Completion:
        """The last answer."""
        assert self.last is not None
        return self.last


@dataclass(frozen=True, slots=True)
class Row:
    """One way over one group of prompts.

    Attributes:
        ratio: Median over prompts of the speed against the plain one, medians of rounds.
        drafted: Tokens drafted, in the last round.
        by_model: Of those, by the draft model.
        accepted: Of those drafted, right ones.
        identical: Prompts whose token ids are those of the plain answer.
    """

    group: str
    way: str
    tokens_per_second: float
    ratio: float
    drafted: int
    by_model: int
    accepted: int
    identical: int
    prompts: int


def ways_of(base: EngineOptions, draft: ModelFile, fixed: int) -> list[Way]:
    """What is compared; plain decoding first."""
    ways = [
        Way("plain", base, speculate=False),
        Way("lookup", base),
        Way("draft model", replace(base, draft=draft)),
    ]
    if fixed:
        always = replace(base, draft=draft, draft_tokens=fixed)
        ways.append(Way(f"draft model, always {fixed}", always))
    return ways


async def measure(
    model: ModelFile,
    ways: Sequence[Way],
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    rounds: int,
    advance: Callable[[], None],
) -> list[list[Answers]]:
    """Answers by way and prompt. The ways take turns within each round."""
    answers = [[Answers() for _ in prompts] for _ in ways]
    async with NativeBackend() as backend:
        for _ in range(rounds):
            for way, its_answers in zip(ways, answers, strict=True):
                loaded = await backend.load(model, way.options)
                # Not measured: it touches what the load has left cold.
                await backend.complete(_request(prompts[0], 8, way, loaded.has_chat_template))
                for prompt, answer in zip(prompts, its_answers, strict=True):
                    request = _request(prompt, tokens, way, loaded.has_chat_template)
                    answer.add(await backend.complete(request))
                    advance()
    return answers


def _request(prompt: Prompt, tokens: int, way: Way, has_chat_template: bool) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt.text,
        system_prompt=prompt.system if has_chat_template else None,
        max_tokens=tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        reuse_prefix=False,
        speculate=way.speculate,
    )


def row_of(group: str, way: Way, answers: Sequence[Answers], plain: Sequence[Answers]) -> Row:
    """One way over one group, against the plain answers to the same prompts."""
    speeds = [statistics.median(answer.rates) for answer in answers]
    plainly = [statistics.median(answer.rates) for answer in plain]
    ends = [answer.completion for answer in answers]
    return Row(
        group=group,
        way=way.name,
        tokens_per_second=statistics.median(speeds),
        ratio=statistics.median(
            ours / theirs for ours, theirs in zip(speeds, plainly, strict=True)
        ),
        drafted=sum(end.draft_tokens for end in ends),
        by_model=sum(end.draft_model_tokens for end in ends),
        accepted=sum(end.draft_accepted for end in ends),
        identical=sum(
            end.token_ids == other.completion.token_ids
            for end, other in zip(ends, plain, strict=True)
        ),
        prompts=len(ends),
    )


def table(rows: Sequence[Row], title: str) -> Table:
    """The comparison for a person."""
    made = Table(title=title)
    made.add_column("prompts")
    made.add_column("way")
    for heading in ("tok/s", "to plain", "drafted", "by the model", "right", "token-identical"):
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(
            row.group,
            row.way,
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.2f}",
            str(row.drafted),
            str(row.by_model),
            str(row.accepted),
            f"{row.identical} of {row.prompts}",
        )
    return made


def file_of(path: Path) -> ModelFile:
    """A model where it lies, hashed."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelFile(path.stem, path, sha256, path.stat().st_size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed", type=int, default=0, help="also drafts of always so many tokens")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=6, help="of each group, at most")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("ai4all.engine").setLevel(logging.CRITICAL)

    base = EngineOptions(n_ctx=2048, threads=arguments.threads)
    ways = ways_of(base, file_of(arguments.draft), arguments.fixed)
    groups = {name: prompts[: arguments.prompts] for name, prompts in GROUPS.items()}
    prompts = [prompt for group in groups.values() for prompt in group]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering", total=arguments.rounds * len(ways) * len(prompts))
        answers = asyncio.run(
            measure(
                file_of(arguments.model),
                ways,
                prompts,
                tokens=arguments.tokens,
                rounds=arguments.rounds,
                advance=lambda: progress.advance(task),
            )
        )
    rows, first = [], 0
    for name, group in groups.items():
        part = slice(first, first + len(group))
        first += len(group)
        rows += [
            row_of(name, way, its_answers[part], answers[0][part])
            for way, its_answers in zip(ways, answers, strict=True)
        ]
    if arguments.json:
        fields = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
        print(ujson.dumps(fields, indent=2))
    else:
        title = f"{arguments.model.stem} drafted by {arguments.draft.stem}, {engine_build_line()}"
        Console().print(table(rows, title))


if __name__ == "__main__":
    main()
