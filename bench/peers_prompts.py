"""Prompts of the comparison, beyond the benchmark's three. All texts are the project's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ai4all.benchmark.suite import benchmark_prompts

EIGHT_PROMPTS = [
    f"Write a short letter to a friend about {subject}. Say what you saw there, whom you met,"
    " and what you would do differently the next time you go."
    for subject in (
        "a week at the sea in winter",
        "a night train across the mountains",
        "the opening of a small library",
        "a market in an old harbour town",
        "a walk through a botanical garden",
        "an afternoon in a clock museum",
        "the first snow in a big city",
        "a school play about the planets",
    )
]
"""Eight tasks of about the same length."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the chat template, and how many tokens to generate."""

    text: str
    system: str
    tokens: int = 160


_BEES = """The hives stand on the south side of the orchard, where the wall keeps the wind away. In
April the keeper opens each of them once, counts the frames with brood, and writes the number on a
card that hangs under the roof. A colony with fewer than four frames is joined to its neighbour. In
May the first honey comes from the cherry trees, and most years it is the only honey that is light
enough to be sold in glass. After the hay is cut the bees fly to the lime trees along the canal;
that honey is darker and is kept for the winter. In September the keeper weighs every hive. Each one
needs fifteen kilograms to reach the spring, and what it lacks is given as sugar dissolved in warm
water. From November on nobody opens a hive, for the cold would break the cluster; the keeper only
listens, with an ear against the wood, for the low sound that says that the colony lives."""

_FERRY = """The ferry Aurelia leaves the northern pier at 6:40, 9:10, 13:25 and 18:05. On Sundays
the first departure is cancelled. The crossing takes fifty minutes in calm weather.
Passengers with bicycles board first, passengers with cars last. A ticket costs 8.50,
children under six travel free of charge, and a bicycle costs 3.00. The harbour office
can be reached at the number 555-0134 from Monday to Friday between eight and noon. In
storms above force eight the ferry stays in the harbour, and tickets remain valid for
thirty days."""

_CODE = """def read_table(path, separator):
    rows = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line:
                continue
            rows.append(line.split(separator))
    return rows


def write_table(path, separator, rows):
    with open(path, "w") as file:
        for row in rows:
            file.write(separator.join(row))
            file.write("\\n")
"""

QUOTING_PROMPTS = [
    Prompt(
        f"Repeat the following text word for word.\n\n{_BEES}",
        "You repeat texts exactly, without any comment.",
    ),
    Prompt(
        f"Repeat the following text word for word.\n\n{_FERRY}",
        "You repeat texts exactly, without any comment.",
    ),
    Prompt(
        f"Copy this program and change nothing.\n\n{_CODE}",
        "You copy programs exactly.",
    ),
    Prompt(
        f"Quote every sentence of the text that holds a number.\n\n{_FERRY}",
        "You answer with quotations only.",
    ),
    Prompt(
        f"Summarise the text in its own words and phrases.\n\n{_BEES}",
        "You write summaries that keep to the wording of the text.",
    ),
    Prompt(
        f"Write an abstract of the text, quoting its sentences.\n\n{_BEES}\n\n{_FERRY}",
        "You write summaries that keep to the wording of the text.",
    ),
]
"""Answers that repeat much of their prompt."""

OTHER_PROMPTS = [
    Prompt("Invent a name for a small bakery and explain it.", "You are a helpful assistant."),
    Prompt("Tell a story about a lighthouse and a fox.", "You are a storyteller."),
    Prompt("Why is the sky dark at night?", "You are a patient teacher."),
    Prompt("Give advice to someone who moves to a new city.", "You are a good friend."),
    Prompt("Describe how a bicycle stays upright.", "You are an engineer."),
    Prompt("Write a poem about rain on a tin roof.", "You are a poet."),
]
"""Answers that repeat little of their prompt."""


def first_token_prompts(count: Callable[[str], int] | None) -> list[str]:
    """Prompts of 4, 9 and 1,000 tokens.

    Args:
        count: Counts the tokens of a text. Without it, the benchmark's prompts have to do, which
            are about as long.
    """
    short, medium, long = (prompt for _, prompt in benchmark_prompts())
    if count is None:
        return [short, medium, long]
    return [cut(text, length, count) for text, length in ((short, 4), (medium, 9), (long, 1000))]


def cut(text: str, length: int, count: Callable[[str], int]) -> str:
    """Repeat or cut ``text`` at a word, so that it has ``length`` tokens or as few less as can be.

    Args:
        text: Words to take.
        length: Tokens to have.
        count: Counts the tokens of a text.
    """
    words = list(itertools.islice(itertools.cycle(text.split()), length))
    least, most = 1, len(words)
    while least < most:
        middle = (least + most + 1) // 2
        if count(" ".join(words[:middle])) <= length:
            least = middle
        else:
            most = middle - 1
    prompt = " ".join(words[:least])
    # A word may have been too long for the rest; short ones fill it up.
    while count(f"{prompt} a") <= length:
        prompt += " a"
    return prompt


def prefix_pair(number: int) -> tuple[str, str]:
    """Two prompts that share their first 500 tokens or so; another pair for each ``number``."""
    prefix = f"Notebook {number}. {_BEES} Page {number + 1}. {_FERRY} {_BEES[:600]}"
    return (
        f"{prefix}\n\nQuestion: When does the keeper weigh the hives?\nAnswer:",
        f"{prefix}\n\nQuestion: What does a ticket for a bicycle cost?\nAnswer:",
    )
