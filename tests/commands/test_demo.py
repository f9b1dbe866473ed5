from __future__ import annotations

import pytest
from command_line import Cli

from ai4all.backend.base import GenerateRequest
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import BadRequest


def test_json_has_every_block_and_nothing_else(cli: Cli) -> None:
    first = cli("demo", "--json")
    assert first.status == 0
    done = cli("demo", "--tasks", "7", "--json")
    assert (done.status, done.err) == (0, "")
    results = done.json["results"]
    assert [row["block_id"] for row in results] == [f"demo-{n}" for n in range(1, 8)]
    assert all(row["accepted"] and row["success"] for row in results)
    assert all(row["text"] for row in results)
    assert all(row["metrics"]["time_to_first_token_ms"] == 1.0 for row in results)
    assert done.json["benchmark"] == first.json["benchmark"]
    assert done.json["worker_id"] == first.json["worker_id"]
    assert done.json["model"]["model_id"] == "benchmark"


def test_people_see_prompts_texts_and_figures(cli: Cli) -> None:
    done = cli("demo", "--tasks", "2")
    assert done.status == 0
    assert "first run" in done.err
    texts = [row["text"] for row in cli("demo", "--tasks", "2", "--json").json["results"]]
    for text in texts:
        assert text.strip() in done.out
    assert "Why is sea water salty?" in done.out
    assert "1000.0 tok/s" in done.out
    assert "demo-2" in done.out


def test_the_answers_of_two_runs_are_equal(cli: Cli) -> None:
    runs = [cli("demo", "--json").json["results"] for _ in range(2)]
    assert [row["text"] for row in runs[0]] == [row["text"] for row in runs[1]]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_block_that_fails_is_told_and_is_status_1(cli: Cli, as_json: bool) -> None:
    assert cli("demo", "--json").status == 0

    def script(request: GenerateRequest, number: int) -> ScriptedGeneration:
        if "compiler" in request.prompt:
            return ScriptedGeneration(error=BadRequest("scripted failure"))
        return ScriptedGeneration()

    backend = FakeBackend(script, time_scale=0.0)
    done = cli("demo", *["--json"] * as_json, backend=backend)
    assert done.status == 1
    if as_json:
        assert [row["success"] for row in done.json["results"]] == [True, False, True]
        assert done.json["results"][1]["error"]["code"] == "bad_request"
    else:
        assert "bad_request: scripted failure" in done.out
