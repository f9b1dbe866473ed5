from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from command_line import Cli

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.errors import EngineCrashed, LoadFailed

SCRIPT = ScriptedGeneration(tokens=("Sal", "ty ", "[bold]sea"), prompt_ms=4.0, token_ms=2.0)
TIMINGS = {
    "queue_ms",
    "load_ms",
    "prompt_ms",
    "first_sample_ms",
    "time_to_first_token_ms",
    "total_ms",
    "prompt_tokens_per_second",
    "decode_tokens_per_second",
}


def fake() -> FakeBackend:
    return FakeBackend(SCRIPT, time_scale=0.0)


def test_text_is_printed_as_it_is(cli: Cli, tiny_model: Path) -> None:
    done = cli("generate", "--model", str(tiny_model), "--prompt", "x", backend=fake())
    assert (done.status, done.out, done.err) == (0, "Salty [bold]sea\n", "")


def test_json_holds_all_of_it(cli: Cli, tiny_model: Path) -> None:
    backend = fake()
    arguments = ["--model", str(tiny_model), "--prompt", "one two", "--json"]
    done = cli("generate", *arguments, backend=backend)
    assert (done.status, done.err) == (0, "")
    answer = done.json
    assert set(answer) == {"text", "tokens", "finish_reason", "usage", "timings", "fingerprint"}
    assert answer["text"] == "Salty [bold]sea"
    assert len(answer["tokens"]) == 3
    assert answer["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert set(answer["timings"]) == TIMINGS
    assert answer["timings"]["time_to_first_token_ms"] == 6.0
    sha256 = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert answer["fingerprint"]["model_sha256"] == sha256
    assert backend.calls.closes == 1


def test_flags_reach_the_request(cli: Cli, tiny_model: Path) -> None:
    backend = fake()
    done = cli(
        *["generate", "--model", str(tiny_model), "--prompt", "p", "--system-prompt", "s"],
        *["--max-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.25"],
        *["--min-p", "0.125", "--repetition-penalty", "1.5", "--seed", "9", "--stop", "a"],
        *["--stop", "b", "--ignore-eos", "--threads", "5", "--context-length", "99", "--json"],
        backend=backend,
    )
    assert done.status == 0
    (request,) = backend.calls.requests
    assert (request.prompt, request.system_prompt, request.max_tokens) == ("p", "s", 7)
    assert (request.temperature, request.top_k, request.top_p) == (0.5, 3, 0.25)
    assert (request.min_p, request.repetition_penalty, request.seed) == (0.125, 1.5, 9)
    assert (request.stop, request.ignore_eos) == (("a", "b"), True)
    fingerprint = done.json["fingerprint"]
    assert (fingerprint["threads"], fingerprint["n_ctx"]) == (5, 99)


@pytest.mark.parametrize(
    ("flags", "penalty"),
    [
        ([], 1.1),
        (["--temperature", "0"], 1.0),
        (["--temperature", "0", "--repetition-penalty", "1.1"], 1.1),
    ],
)
def test_greedy_decoding_has_no_penalty_unless_asked(
    cli: Cli, tiny_model: Path, flags: list[str], penalty: float
) -> None:
    backend = fake()
    cli("generate", "--model", str(tiny_model), "--prompt", "x", *flags, backend=backend)
    assert backend.calls.requests[0].repetition_penalty == penalty


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--max-tokens", "0"], "--max-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--stop", ""], "--stop"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_a_value_out_of_range_names_its_flag(
    cli: Cli, tiny_model: Path, flags: list[str], part: str
) -> None:
    done = cli("generate", "--model", str(tiny_model), "--prompt", "x", *flags)
    assert done.status == 2
    assert done.out == ""
    assert part in done.error_line


def test_an_absent_model_is_one_line(cli: Cli, data_dir: Path) -> None:
    done = cli("generate", "--model", "nowhere", "--prompt", "x", "--json")
    assert (done.status, done.out) == (1, "")
    assert "nowhere" in done.error_line
    assert not data_dir.exists()


def test_a_file_that_is_no_model_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    done = cli("generate", "--model", str(tmp_path / "x.gguf"), "--prompt", "x")
    assert done.status == 1
    assert "x.gguf" in done.error_line


@pytest.mark.parametrize(
    "backend",
    [
        FakeBackend(load_error=LoadFailed("the tensor is missing")),
        FakeBackend(ScriptedGeneration(error=EngineCrashed("the tensor is missing"))),
    ],
)
def test_a_failing_engine_is_one_line_and_is_closed(
    cli: Cli, tiny_model: Path, backend: FakeBackend
) -> None:
    arguments = ["--model", str(tiny_model), "--prompt", "x", "--json"]
    done = cli("generate", *arguments, backend=backend)
    assert (done.status, done.out) == (1, "")
    assert "the tensor is missing" in done.error_line
    assert backend.calls.closes == 1
