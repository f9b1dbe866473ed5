"""The rows of the comparison: what is asked of whom, and which goal it stands for.

A row takes its contenders in turn, round after round (A B C A B C ...), so that a machine that
slows down slows all of them. A ratio belongs to one round; the row's figure is the median of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_contenders import (
    BINDINGS,
    OURS,
    Hosted,
    MissingPeer,
    Sample,
    Server,
    Setup,
    batched_bench,
    llama_bench,
)
from peers_prompts import (
    EIGHT_PROMPTS,
    OTHER_PROMPTS,
    QUOTING_PROMPTS,
    first_token_prompts,
    prefix_pair,
)

from ai4all.benchmark.suite import benchmark_prompts

SERVER = Server.name
Measure = Callable[[int], float]
"""Called with the number of the round; gives one figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line of the table.

    Attributes:
        row: The goal's name.
        what: What was measured.
        unit: Of the figures.
        ours: Our figure of each round.
        peer: Whom we are compared with; empty where the goal is a figure of its own.
        theirs: The peer's figure of each round.
        how: "ratio" (ours over theirs), "difference" (ours less theirs) or "value" (ours).
        goal: What the median must reach.
        at_least: Whether more is better.
    """

    row: str
    what: str
    unit: str
    ours: list[float]
    goal: float | None
    at_least: bool
    peer: str = ""
    theirs: list[float] = field(default_factory=list)
    how: str = "ratio"

    @property
    def figures(self) -> list[float]:
        """The figure of each round that the goal speaks of."""
        if self.how == "value":
            return self.ours
        pairs = zip(self.ours, self.theirs, strict=True)
        if self.how == "difference":
            return [mine - other for mine, other in pairs]
        return [mine / other for mine, other in pairs]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.figures)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.at_least else self.median <= self.goal


@dataclass(slots=True)
class Report:
    """What a run found.

    Attributes:
        comparisons: The lines of the table.
        missing: (row, who, why) of what was not measured.
        contenders: What each contender says of itself.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of the comparison.

    Attributes:
        setup: The model and its shape.
        fitted: The same model, fitted to this machine; None where there is none.
        rounds: How often each contender has its turn.
        tokens: Tokens of a generation.
        tell: Told what is going on.
        report: What is found.
    """

    setup: Setup
    fitted: Path | None
    rounds: int
    tokens: int
    tell: Callable[[str], None]
    report: Report = field(default_factory=Report)

    def with_model(self, model: Path) -> Setup:
        """The same shape with another model."""
        return Setup(
            model=model,
            programs=self.setup.programs,
            threads=self.setup.threads,
            n_ctx=self.setup.n_ctx,
            n_batch=self.setup.n_batch,
            n_ubatch=self.setup.n_ubatch,
        )

    def shaped(self, n_ctx: int) -> Setup:
        """The same model with another context."""
        setup = self.setup
        return Setup(
            model=setup.model,
            programs=setup.programs,
            threads=setup.threads,
            n_ctx=n_ctx,
            n_batch=setup.n_batch,
            n_ubatch=setup.n_ubatch,
        )

    def open(self, row: str, held: ExitStack, name: str, opener: Callable[[], Any]) -> Any:
        """Open a contender for the time of a row; None, and a note, when it cannot run."""
        self.tell(f"{row}: starting {name}")
        try:
            contender = held.enter_context(opener())
        except MissingPeer as exc:
            self.missing(row, name, str(exc))
            return None
        self.report.contenders.setdefault(name, contender.info)
        contender.generate("Once upon a time there was", 8)  # The first use pays for page faults.
        return contender

    def missing(self, row: str, name: str, why: str) -> None:
        """Note what is not measured."""
        self.report.missing.append((row, name, why))

    def take_turns(self, row: str, turns: Mapping[str, Measure]) -> dict[str, list[float]]:
        """Let each have its turn in each round; who fails is out, with a note."""
        figures: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(self.rounds):
            for name in list(figures):
                self.tell(f"{row}: round {number + 1} of {self.rounds}, {name}")
                try:
                    figures[name].append(turns[name](number))
                except (MissingPeer, OSError, ValueError, KeyError, ZeroDivisionError) as exc:
                    self.missing(row, name, f"{type(exc).__name__}: {exc}")
                    del figures[name]
        return figures

    def compare(
        self,
        row: str,
        what: str,
        unit: str,
        figures: Mapping[str, list[float]],
        goals: Mapping[str, float | None],
        *,
        at_least: bool,
        how: str = "ratio",
        ours: str = OURS,
    ) -> None:
        """Set our figures against those of each peer in ``goals``."""
        if ours not in figures:
            return
        self.report.comparisons += [
            Comparison(
                row=row,
                what=what,
                unit=unit,
                ours=figures[ours],
                peer=peer,
                theirs=figures[peer],
                how=how,
                goal=goal,
                at_least=at_least,
            )
            for peer, goal in goals.items()
            if peer in figures
        ]

    def open_ours(
        self, row: str, held: ExitStack, setup: Setup | None = None, slots: int = 1
    ) -> Any:
        """Ours; see ``open``."""
        return self.open(row, held, OURS, lambda: Hosted("ours", setup or self.setup, slots))

    def open_server(
        self, row: str, held: ExitStack, setup: Setup | None = None, slots: int = 1
    ) -> Any:
        """``llama-server``; see ``open``."""
        return self.open(row, held, SERVER, lambda: Server(setup or self.setup, slots))

    def open_bindings(self, row: str, held: ExitStack) -> dict[str, Any]:
        """The other Python bindings that can run here."""
        opened = {
            name: self.open(row, held, name, lambda name=name: Hosted(name, self.setup))
            for name in BINDINGS
        }
        return {name: binding for name, binding in opened.items() if binding is not None}


def whole_benchmark(run: Run) -> None:
    """P0: the three prompts, all tokens over all time, from the request to the last token."""
    prompts = [prompt for _, prompt in benchmark_prompts()]

    def rate(contender: Any) -> Measure:
        def measure(number: int) -> float:
            samples = [contender.generate(prompt, run.tokens) for prompt in prompts]
            return sum(s.tokens for s in samples) / sum(s.total_s for s in samples)

        return measure

    with ExitStack() as held:
        contenders = {
            OURS: run.open_ours("P0", held),
            SERVER: run.open_server("P0", held),
            **run.open_bindings("P0", held),
        }
        fitted = f"{OURS}, fitted"
        if run.fitted is not None:
            setup = run.with_model(run.fitted)
            contenders[fitted] = run.open("P0", held, fitted, lambda: Hosted("ours", setup))
        else:
            run.missing("P0", fitted, "no fitted model was given (--fitted)")
        turns = {name: rate(one) for name, one in contenders.items() if one is not None}
        figures = run.take_turns("P0", turns)
    what = f"three prompts, {run.tokens} tokens each"
    goals: dict[str, float | None] = {SERVER: 1.0, **dict.fromkeys(BINDINGS)}
    run.compare("P0", what, "tok/s", figures, goals, at_least=True)
    run.compare(
        "P0", f"{what}, fitted", "tok/s", figures, {SERVER: 1.6}, at_least=True, ours=fitted
    )


def decode_alone(run: Run) -> None:
    """P1 (P10 on a GPU): decode of one sequence."""
    prompt = benchmark_prompts()[0][1]
    bench = "llama-bench"

    def rate(contender: Any) -> Measure:
        # One more token than counts: the first belongs to the prompt.
        return lambda number: contender.generate(prompt, run.tokens + 1).decode_rate

    with ExitStack() as held:
        contenders = {
            OURS: run.open_ours("P1", held),
            SERVER: run.open_server("P1", held),
            **run.open_bindings("P1", held),
        }
        device = contenders[OURS].info["device"] if contenders[OURS] is not None else "CPU"
        turns = {name: rate(one) for name, one in contenders.items() if one is not None}
        turns[bench] = lambda number: run.tokens / llama_bench(run.setup, decode=run.tokens)
        figures = run.take_turns("P1", turns)
    row, least = ("P1", 1.0) if device == "CPU" else ("P10", 0.98)
    what = f"decode, one sequence, {run.tokens} tokens"
    goals = {bench: least, SERVER: 1.0, "llama-cpp-python": 1.15, "xllamacpp": None}
    run.compare(row, what, "tok/s", figures, goals, at_least=True)


def first_token(run: Run) -> None:
    """P2: time to the first token, against the server and against the bare prompt's decode."""
    bench = "llama-bench"
    with ExitStack() as held:
        ours = run.open_ours("P2", held)
        server = run.open_server("P2", held)
        for prompt in first_token_prompts(None if server is None else server.count_tokens):
            turns: dict[str, Measure] = {}
            count = 0
            if ours is not None:
                count = ours.generate(prompt, 1).prompt_tokens
                turns[OURS] = lambda number, p=prompt: 1e3 * ours.first_token_s(p)
            if server is not None:
                turns[SERVER] = lambda number, p=prompt: 1e3 * server.first_token_s(p)
            if count:
                # The median of several where one is over in no time.
                several = 5 if count < 100 else 1
                turns[bench] = lambda number, n=count, r=several: (
                    1e3 * llama_bench(run.setup, prompt=n, repetitions=r)
                )
            figures = run.take_turns("P2", turns)
            what = f"time to first token, prompt of {count}"
            run.compare("P2", what, "ms", figures, {SERVER: 1.0}, at_least=False)
            run.compare(
                "P2",
                f"{what}, over the bare decode",
                "ms",
                figures,
                {bench: 0.5},
                at_least=False,
                how="difference",
            )


def eight_at_once(run: Run) -> None:
    """P4: eight tasks at once."""
    bench = "llama-batched-bench"
    count = len(EIGHT_PROMPTS)
    setup = run.shaped(512)
    both: list[tuple[float, float]] = []
    with ExitStack() as held:
        ours = run.open_ours("P4", held, setup, count)
        server = run.open_server("P4", held, setup, count)
        turns: dict[str, Measure] = {}
        prompt_tokens = 32
        if ours is not None:
            warm = ours.together(EIGHT_PROMPTS, 4)
            prompt_tokens = round(statistics.mean(sample.prompt_tokens for sample in warm))

            def measure(number: int) -> float:
                samples = ours.together(EIGHT_PROMPTS, run.tokens)
                both.append((_decode_together(samples), _end_to_end(samples)))
                return both[-1][1]

            turns[OURS] = measure
        if server is not None:
            server.together(EIGHT_PROMPTS, 4)
            turns[SERVER] = lambda number: server.together(EIGHT_PROMPTS, run.tokens)
        turns[bench] = lambda number: batched_bench(
            setup, prompt=prompt_tokens, decode=run.tokens, sequences=count
        )
        figures = run.take_turns("P4", turns)
    what = f"{count} tasks at once, {run.tokens} tokens each"
    run.compare("P4", f"{what}, end to end", "tok/s", figures, {SERVER: 1.15}, at_least=True)
    if OURS in figures:
        decoding = {**figures, OURS: [decode for decode, _ in both]}
        run.compare("P4", f"{what}, decode alone", "tok/s", decoding, {bench: 1.0}, at_least=True)


def _decode_together(samples: Iterable[Sample]) -> float:
    """Tokens a second while all sequences decode."""
    samples = list(samples)
    begin = max(sample.first_s for sample in samples)
    until = min(sample.last_s for sample in samples)
    tokens = sum(n for s in samples for at, n in s.arrivals if begin < at <= until)
    return tokens / (until - begin)


def _end_to_end(samples: Iterable[Sample]) -> float:
    samples = list(samples)
    return sum(sample.tokens for sample in samples) / max(sample.total_s for sample in samples)


def shared_prefix(run: Run) -> None:
    """P5: the second of two tasks that begin alike."""
    cold: dict[str, list[float]] = {OURS: [], SERVER: []}
    reused: list[int] = []

    def share(name: str, contender: Any) -> Measure:
        def measure(number: int) -> float:
            # New texts in each round: nothing of an older one is left to be found.
            first, second = prefix_pair(number)
            before = contender.first_token_s(first)
            after = contender.first_token_s(second, reuse=True)
            cold[name].append(1e3 * before)
            return 1e3 * after

        return measure

    with ExitStack() as held:
        ours = run.open_ours("P5", held)
        server = run.open_server("P5", held)
        turns: dict[str, Measure] = {}
        if ours is not None:
            if "reuse_prefix" in ours.info["offers"]:
                turns[OURS] = share(OURS, ours)
            else:
                run.missing("P5", OURS, "not offered")
        if server is not None:
            turns[SERVER] = share(SERVER, server)
        figures = run.take_turns("P5", turns)
        if OURS in figures:
            first, second = prefix_pair(run.rounds)
            ours.generate(first, 1)
            reused.append(ours.generate(second, 1, reuse=True).reused)
    for name, goal in ((OURS, 0.08), (SERVER, None)):
        if name in figures:
            tokens = f" ({reused[0]} tokens reused)" if name == OURS else ""
            run.report.comparisons.append(
                Comparison(
                    row="P5",
                    what=f"{name}: first token of a second task with the same prefix{tokens}",
                    unit="ms",
                    ours=figures[name],
                    peer="the cold one",
                    theirs=cold[name],
                    goal=goal,
                    at_least=False,
                )
            )


def speculation(run: Run) -> None:
    """P6: prompt lookup on and off, and whether the tokens stay the same."""
    with ExitStack() as held:
        ours = run.open_ours("P6", held)
        if ours is None:
            return
        if "speculate" not in ours.info["offers"]:
            run.missing("P6", OURS, "speculation is not offered")
            return
        different = 0
        for kind, prompts, goal in (
            ("summaries and quotations", QUOTING_PROMPTS, 1.5),
            ("other prompts", OTHER_PROMPTS, 0.97),
        ):
            off: list[list[Sample]] = []
            on: list[list[Sample]] = []
            for number in range(run.rounds):
                run.tell(f"P6: round {number + 1} of {run.rounds}, {kind}")
                off.append([])
                on.append([])
                for prompt in prompts:
                    tokens = min(prompt.tokens, 2 * run.tokens)
                    for speculate, samples in ((False, off[-1]), (True, on[-1])):
                        samples.append(
                            ours.generate(
                                prompt.text,
                                tokens,
                                speculate=speculate,
                                system_prompt=prompt.system,
                            )
                        )
                pairs = zip(off[-1], on[-1], strict=True)
                different += sum(before.token_ids != after.token_ids for before, after in pairs)
            run.report.comparisons += [
                Comparison(
                    row="P6",
                    what=f"decode with speculation, {kind}",
                    unit="tok/s",
                    ours=[_decode_rate(samples) for samples in on],
                    peer="switched off",
                    theirs=[_decode_rate(samples) for samples in off],
                    goal=goal,
                    at_least=True,
                ),
                Comparison(
                    row="P6",
                    what=f"the prompt that gains least, {kind}",
                    unit="x",
                    ours=[
                        min(
                            statistics.median(
                                after[n].decode_rate / before[n].decode_rate
                                for before, after in zip(off, on, strict=True)
                            )
                            for n in range(len(prompts))
                        )
                    ],
                    how="value",
                    goal=0.97,
                    at_least=True,
                ),
            ]
        run.report.comparisons.append(
            Comparison(
                row="P6",
                what="generations that speculation changes",
                unit="",
                ours=[float(different)],
                how="value",
                goal=0.0,
                at_least=False,
            )
        )


def _decode_rate(samples: list[Sample]) -> float:
    """Tokens a second after the first step of each, over all of them."""
    tokens = sum(sample.tokens - sample.first_tokens for sample in samples)
    return tokens / sum(sample.last_s - sample.first_s for sample in samples)


def prompt_speed(run: Run) -> None:
    """P7: prompt speed, as the file came and fitted, against the server on the file as it came."""
    prompt = benchmark_prompts()[-1][1]
    fitted = f"{OURS}, fitted"

    def speed(contender: Any) -> Measure:
        def measure(number: int) -> float:
            sample = contender.generate(prompt, 1)
            return float(sample.prompt_tokens / sample.first_s)

        return measure

    with ExitStack() as held:
        contenders = {OURS: run.open_ours("P7", held), SERVER: run.open_server("P7", held)}
        if run.fitted is not None:
            setup = run.with_model(run.fitted)
            contenders[fitted] = run.open("P7", held, fitted, lambda: Hosted("ours", setup))
        else:
            run.missing("P7", fitted, "no fitted model was given (--fitted)")
        turns = {name: speed(one) for name, one in contenders.items() if one is not None}
        figures = run.take_turns("P7", turns)
    run.compare("P7", "prompt speed", "tok/s", figures, {SERVER: None}, at_least=True)
    what = "prompt speed, fitted"
    goals = {SERVER: 2.0, OURS: None}
    run.compare("P7", what, "tok/s", figures, goals, at_least=True, ours=fitted)
