"""Model files that nobody should load, through a whole worker. ``tests/hostile_models.py`` is
the long form."""

from __future__ import annotations

from pathlib import Path

from gguf_mutants import BUG_SHAPES, MALFORMED, Mutator, small_model
from model_gauntlet import CLASSES, run_gauntlet
from mortality import deadly_model

# What takes all memory before it is ended: the long form has it.
SLOW = {"a template that grows"}
ENDLESS = "a template that does not end"
MUTANTS = [f"mutant {n}" for n in range(40)]


async def test_bad_models_are_answered_one_by_one_and_the_link_stays(tmp_path: Path) -> None:
    shapes = {name: make for name, make in (MALFORMED | BUG_SHAPES).items() if name not in SLOW}

    def make(name: str) -> bytes:
        if name == "deadly":
            return deadly_model()
        if name in shapes:
            return shapes[name]()
        return Mutator(int(name.split()[1])).mutant()[1]

    # A folder whose name must not come back in any answer.
    folder = tmp_path / "planted-owner"
    folder.mkdir()
    good = folder / "good.gguf"
    good.write_bytes(small_model())
    found = await run_gauntlet(folder, good, [*shapes, "deadly", *MUTANTS], make)

    assert (found.links, found.drops) == (1, 0)
    by_name = {passage.name: passage for passage in found.passages}
    assert len(found.passages) == len(shapes) + len(MUTANTS) + 3
    assert {passage.outcome for passage in found.passages} <= set(CLASSES)
    for passage in found.passages:
        assert "planted-owner" not in passage.message, passage
        assert str(Path(__file__).parents[2]) not in passage.message, passage
    for name in MALFORMED:
        assert by_name[name].outcome == "refused by the pre-check", by_name[name]
    # Neither loaded nor waited for.
    assert by_name[ENDLESS].outcome == "engine died"
    assert "the chat template does not end" in by_name[ENDLESS].message
    for name in BUG_SHAPES.keys() - SLOW - {ENDLESS}:
        assert by_name[name].outcome not in ("engine died", "engine hung"), by_name[name]
    # One that the pre-check does not know kills the engine, and the next computes all the same.
    assert by_name["deadly"].outcome == "engine died"
    assert "baichuan.cpp:" in str(by_name["deadly"].died_of)
    assert found.passages[-1].outcome == "answered"
    assert found.classes["answered"] > 10
    assert found.classes["refused by llama.cpp"] > 5
