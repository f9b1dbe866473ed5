from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai4all.tasks.evidence import find_evidence
from ai4all.tasks.sentences import nearest_sentence_end, sentence_spans

BRIDGE = (
    "The old bridge over the Lenna was built in 1912 by Clara\n  Voss. It has three arches of "
    "granite (3.5 m each) and carries a single railway line. During the flood of 1954 the middle "
    "arch was damaged! It was repaired in the following summer."
)
WHO = "Who built the bridge?"


def quotes(answer: str, question: str = WHO, context: str = BRIDGE) -> list[str]:
    return [context[start:end] for start, end in find_evidence(answer, question, context)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("1912", ["1912"]),
        ("Clara Voss", ["Clara\n  Voss"]),
        ("“clara voss.”", ["Clara\n  Voss"]),
        ("3.5 m", ["3.5 m"]),
        ("arch", ["arch"]),
        ("the", ["The", "the", "the", "the", "the"]),
    ],
)
def test_an_answer_that_stands_there_is_found_where_it_stands(
    answer: str, found: list[str]
) -> None:
    assert quotes(answer) == found


def test_a_word_is_not_found_inside_another() -> None:
    assert quotes("art", context="The party starts. It is art.") == ["art"]
    assert quotes("rail") == []


def test_scripts_without_spaces_are_found_too() -> None:
    context = "この橋は1912年に建てられた。設計者は田中です。"
    assert quotes("田中", "設計者は誰ですか", context) == ["田中"]
    assert quotes("田中という設計者", "設計者は誰ですか", context) == ["設計者は田中です。"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("It was Clara Voss who built it, in 1912.", [0]),
        ("In the flood of 1954, its middle arch suffered.", [2]),
        ("There are three granite arches, and one was damaged by the flood.", [1, 2]),
    ],
)
def test_an_answer_in_other_words_is_found_by_its_sentences(answer: str, found: list[int]) -> None:
    sentences = list(sentence_spans(BRIDGE))
    assert find_evidence(answer, WHO, BRIDGE) == [sentences[at] for at in found]


def test_a_verdict_is_about_the_question() -> None:
    assert quotes("Yes.", "Was the middle arch damaged?") == [
        "During the flood of 1954 the middle arch was damaged!"
    ]


@pytest.mark.parametrize("answer", ["", " \n", "…", "Napoleon Bonaparte", "Nobody knows the truth"])
def test_what_the_context_does_not_say_has_no_evidence(answer: str) -> None:
    assert quotes(answer) == []


TEXT = st.text(st.sampled_from("ab A.!?\n\t'\"0。漢ßİ é-"), max_size=60)


@given(TEXT, TEXT, TEXT)
def test_spans_lie_in_the_context_in_order_and_apart(
    answer: str, question: str, context: str
) -> None:
    end_before = 0
    for start, end in find_evidence(answer, question, context):
        assert end_before <= start < end <= len(context)
        end_before = end


@given(TEXT)
def test_sentences_cover_all_but_white_space(text: str) -> None:
    covered = 0
    for start, end in sentence_spans(text):
        assert not text[covered:start].strip()
        assert text[start:end].strip() == text[start:end] != ""
        covered = end
    assert not text[covered:].strip()


def test_a_full_stop_within_a_number_ends_nothing() -> None:
    text = 'It costs 3.50 today. "Really?" asked Ann'
    assert [text[a:b] for a, b in sentence_spans(text)] == [
        "It costs 3.50 today.",
        '"Really?"',
        "asked Ann",
    ]


@pytest.mark.parametrize(
    ("words", "kept"), [(1, "One."), (3, "One. Two more."), (99, "One. Two more.")]
)
def test_a_text_is_cut_only_after_a_sentence(words: int, kept: str) -> None:
    text = "One. Two more. And then it"
    assert text[: nearest_sentence_end(text, words)] == kept
    assert nearest_sentence_end("no end at all", 1) == len("no end at all")
