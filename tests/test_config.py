from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ai4all import config_places
from ai4all.backend.base import EngineOptions
from ai4all.config import Settings, default_toml, explain, load_settings
from ai4all.errors import ConfigError
from ai4all.models.sources import BENCHMARK_SHA256, BENCHMARK_SOURCE


@pytest.fixture(autouse=True)
def _no_files_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        config_places.platformdirs, "user_config_path", lambda *a, **k: tmp_path / "etc"
    )
    monkeypatch.setattr(
        config_places.platformdirs, "user_data_path", lambda *a, **k: tmp_path / "share"
    )


def from_toml(tmp_path: Path, text: str, **more: Any) -> Settings:
    path = tmp_path / "given.toml"
    path.write_text(text)
    return load_settings(path, environ={}, **more)


def fault(tmp_path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_toml(tmp_path, text)
    return caught.value


def test_defaults(tmp_path: Path) -> None:
    settings = load_settings(environ={})
    assert settings.data_dir == tmp_path / "share"
    assert settings.coordinator.reconnect_interval_ms == 2000
    assert settings.coordinator.max_reconnect_attempts == 0
    assert settings.worker.model == "benchmark"
    assert settings.models.benchmark_source == BENCHMARK_SOURCE
    assert settings.config_file is None
    assert {row.origin for row in explain(settings)} == {"default"}


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        "[engine]\nthreads = 1\nbatch = 11\nubatch = 12\n[coordinator]\nurl = 'ws://file'\n"
    )
    environ = {"AI4ALL_ENGINE_THREADS": "2", "AI4ALL_ENGINE_BATCH": "22"}
    settings = load_settings(path, {"engine.threads": 3, "coordinator.url": None}, environ=environ)
    engine = settings.engine
    assert (engine.threads, engine.batch, engine.ubatch, engine.gpu_layers) == (3, 22, 12, "auto")
    assert settings.coordinator.url == "ws://file"
    assert settings.origin("engine.threads") == "flag --engine-threads"
    assert settings.origin("engine.batch") == "variable AI4ALL_ENGINE_BATCH"
    assert settings.origin("engine.ubatch") == f"{path}, line 4"
    assert settings.origin("engine.gpu_layers") == "default"
    assert settings.config_file == path


def test_every_setting_has_a_variable() -> None:
    texts = {
        "coordinator.url": "wss://example.org",
        "coordinator.token": "abc",
        "coordinator.pin_sha256": f"{'a' * 64}, sha256//{'A' * 43}=",
        "worker.id": "8a7d9f3e-1c1f-4a7b-9a56-0f2d8c1b2a3d",
        "worker.model": "m",
        "engine.flash_attention": "on",
        "engine.kv_type": "q8_0",
        "models.benchmark_source": "file:/m",
        "models.benchmark_sha256": "a" * 64,
        "models.allowed_sources": "pypi:, file:",
        "log.level": "debug",
    }
    for row in explain(load_settings(environ={})):
        text = texts.get(row.key, "true" if isinstance(row.value, bool) else "1")
        variable = "AI4ALL_" + row.key.upper().replace(".", "_")
        if row.key.endswith(("_ms", "_bytes")):
            text = "5000"
        settings = load_settings(environ={variable: text})
        assert settings.origin(row.key) == f"variable {variable}"
    listed = load_settings(environ={"AI4ALL_MODELS_ALLOWED_SOURCES": "pypi:, file:"})
    assert listed.models.allowed_sources == ("pypi:", "file:")
    none = load_settings(environ={"AI4ALL_MODELS_ALLOWED_SOURCES": " , "})
    assert none.models.allowed_sources == (), "an empty beginning would allow everything"
    pinned = load_settings(environ={"AI4ALL_COORDINATOR_PIN_SHA256": "0" * 64})
    assert pinned.coordinator.pin_sha256 == (f"sha256//{'A' * 43}=",)


def test_an_empty_variable_is_none_at_all() -> None:
    assert load_settings(environ={"AI4ALL_ENGINE_THREADS": ""}).engine.threads == 0


def test_where_the_file_is_looked_for(tmp_path: Path) -> None:
    def write(path: Path, threads: int) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"[engine]\nthreads = {threads}\n")

    def threads(**environ: str) -> int:
        return load_settings(environ=environ).engine.threads

    assert threads() == 0
    write(tmp_path / "etc" / "config.toml", 1)
    assert threads() == 1
    write(tmp_path / "share" / "config.toml", 2)
    assert threads() == 2
    write(tmp_path / "elsewhere" / "config.toml", 3)
    assert threads(AI4ALL_DATA_DIR=str(tmp_path / "elsewhere")) == 3
    flagged = load_settings(None, {"data_dir": tmp_path / "elsewhere"}, environ={})
    assert (flagged.engine.threads, flagged.data_dir) == (3, tmp_path / "elsewhere")
    write(tmp_path / "named.toml", 4)
    assert threads(AI4ALL_CONFIG=str(tmp_path / "named.toml")) == 4


@pytest.mark.parametrize(
    ("text", "key", "problem", "line"),
    [
        ("[engine]\n\nthreads = 'many'", "engine.threads", "must be a whole number", 3),
        ("[engine]\nthreads = -1", "engine.threads", "must be at least 0, not -1", 2),
        ("[engine]\nthreads = 1.5", "engine.threads", "must be a whole number", 2),
        ("[engine]\nthreads = true", "engine.threads", "must be a number, not True", 2),
        ("engine.batch = 100_000", "engine.batch", "must be at most 65536", 1),
        ("[engine]\nkv_type = 'f17'", "engine.kv_type", "'f16', 'f32', 'bf16'", 2),
        ("[engine]\nuse_mmap = 'maybe'", "engine.use_mmap", "true or false", 2),
        ("# a\n[engine]\nthread = 4", "engine.thread", "did you mean engine.threads?", 3),
        ("[egine]\nthreads = 4", "egine.threads", "did you mean engine.threads?", 2),
        ("[worker]\nurl = 'ws://x'", "worker.url", "did you mean coordinator.url?", 2),
        ("[worker]\nzzzzz = 1", "worker.zzzzz", "[worker] has id, model", 2),
        ("zzzzz = 1", "zzzzz", "there are data_dir, coordinator", 1),
        ("engine = 5", "engine", "must be a table: [engine]", 1),
        ("[coordinator]\nurl = 'http://x'", "coordinator.url", "wss://host:port/path", 2),
        ("[coordinator]\nreconnect_jitter = nan", "coordinator.reconnect_jitter", "number", 2),
        ("[coordinator]\nreconnect_jitter = 2", "coordinator.reconnect_jitter", "at most 1", 2),
        ("[coordinator]\ntoken = 'x'", "coordinator.token", "coordinator.token_file", 2),
        ("[coordinator]\npin_sha256 = ['x']", "coordinator.pin_sha256", "of a public key", 2),
        ("[worker]\nid = 'me'", "worker.id", "must be a UUID", 2),
        ("[models]\nbenchmark_sha256 = 'x'", "models.benchmark_sha256", "64 hexadecimal", 2),
        ("[models]\nallowed_sources = [1]", "models.allowed_sources", "must be text", 2),
        ('data_dir = "a\\u0000b"', "data_dir", "must be a path", 1),
        ("data_dir = '~nobody-of-this-name/x'", "data_dir", "home", 1),
        ("[log]\nlevel = 'loud'", "log.level", "'debug', 'info', 'warning' or 'error'", 2),
        ("[log]\njson = 'so'", "log.json", "true or false", 2),
        ("[log]\nas_json = true", "log.as_json", "log.json", 2),
    ],
)
def test_a_mistake_names_itself_and_its_place(
    tmp_path: Path, text: str, key: str, problem: str, line: int
) -> None:
    error = fault(tmp_path, text)
    assert error.key == key
    assert problem in error.problem
    assert error.origin == f"{tmp_path / 'given.toml'}, line {line}"


def test_a_token_in_a_file_is_not_repeated(tmp_path: Path) -> None:
    assert "hunter2" not in str(fault(tmp_path, "[coordinator]\ntoken = 'hunter2'"))
    in_url = fault(tmp_path, "[coordinator]\nurl = 'wss://me:hunter2@example.org'")
    assert "must not hold a name or password" in str(in_url)
    assert "hunter2" not in str(in_url)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "line 2" in str(fault(tmp_path, "[engine]\nthreads = = 1\n"))
    assert "not valid TOML" in str(fault(tmp_path, "a" * 10))
    assert "longer than" in str(fault(tmp_path, "# " + "x" * (1 << 20)))
    (tmp_path / "latin.toml").write_bytes(b"# \xff\n")
    for path in (tmp_path / "absent.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError) as caught:
            load_settings(path, environ={})
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("AI4ALL_COORDINTOR_URL", "did you mean AI4ALL_COORDINATOR_URL?"),
        ("AI4ALL_DATADIR", "did you mean AI4ALL_DATA_DIR?"),
        ("AI4ALL_ENGINE_ZZZZZZZZZZ", "is not a setting"),
    ],
)
def test_a_variable_gone_wrong(variable: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="the environment") as caught:
        load_settings(environ={variable: "x"})
    assert variable in str(caught.value)
    assert problem in str(caught.value)


def test_variables_of_others_are_left_alone() -> None:
    load_settings(
        environ={"AI4ALL_LLAMA_SOURCE_DIR": "x", "AI4ALL_TEST_MODEL": "x", "AI4ALL_PORTAL": "y"}
    )


def test_a_home_that_nobody_has() -> None:
    for flags, file in (({"data_dir": "~nobody-of-this-name"}, None), ({}, "~nobody-of-this-name")):
        with pytest.raises(ConfigError, match="home"):
            load_settings(file, flags, environ={})


def test_a_flag_gone_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {"coordinator.url": "localhost:80"}, environ={})
    assert caught.value.origin == "flag --coordinator"
    with pytest.raises(ConfigError, match="flag --data-dirs"):
        load_settings(None, {"data_dirs": "x"}, environ={})
    with pytest.raises(ConfigError):
        load_settings(None, {"coordinator.token": "x"}, environ={})


def test_explaining_masks_secrets() -> None:
    settings = load_settings(environ={"AI4ALL_COORDINATOR_TOKEN": "hunter2"})
    assert settings.coordinator.token == SecretStr("hunter2")
    rows = {row.key: row for row in explain(settings)}
    assert rows["coordinator.token"].value == "********"
    assert rows["coordinator.token"].origin == "variable AI4ALL_COORDINATOR_TOKEN"
    assert "hunter2" not in repr(settings) + repr(rows) + str(settings.model_dump())
    assert all(row.description for row in rows.values())


def test_the_default_file_says_the_defaults(tmp_path: Path) -> None:
    text = default_toml()
    assert tomllib.loads(text) == {
        name: {} for name in ("coordinator", "worker", "engine", "isolation", "models", "log")
    }
    # With every line in force it changes nothing.
    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in text.splitlines()
    )
    settings = from_toml(tmp_path, uncommented)
    assert settings.model_dump() == load_settings(environ={}).model_dump()
    assert settings.models.benchmark_sha256 == BENCHMARK_SHA256
    written = {row.key for row in explain(settings) if row.origin != "default"}
    assert written == {row.key for row in explain(settings)} - {"coordinator.token"}


def test_another_benchmark_model_is_not_held_to_our_digest(tmp_path: Path) -> None:
    other = from_toml(tmp_path, "[models]\nbenchmark_source = 'file:/m.gguf'")
    assert other.models.benchmark_sha256 is None
    pinned = from_toml(
        tmp_path,
        f"[models]\nbenchmark_source = 'file:/m.gguf'\nbenchmark_sha256 = '{'A' * 64}'",
    )
    assert pinned.models.benchmark_sha256 == "a" * 64


def test_engine_options() -> None:
    assert load_settings(environ={}).engine_options() == EngineOptions(n_ubatch=0)
    settings = load_settings(
        None,
        {
            "engine.context_length": 1024,
            "engine.batch": 256,
            "engine.threads": 3,
            "engine.memory_limit_mb": 900,
            "engine.draft_model": "smaller",
            "engine.draft_tokens": 4,
            "worker.max_concurrent_tasks": 4,
        },
        environ={},
    )
    assert settings.engine_options() == EngineOptions(
        n_ctx=1024,
        n_batch=256,
        n_ubatch=0,
        threads=3,
        n_slots=4,
        memory_limit_mb=900,
        draft_tokens=4,
    )


def test_no_coordinator_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="AI4ALL_COORDINATOR_URL"):
        load_settings(environ={}).coordinator_url()
    settings = load_settings(None, {"coordinator.url": "ws://localhost:1"}, environ={})
    assert settings.coordinator_url() == "ws://localhost:1"


def test_the_token(tmp_path: Path) -> None:
    def token(**environ: str) -> str | None:
        return load_settings(environ=environ).coordinator_token()

    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert token() is None
    assert token(AI4ALL_COORDINATOR_TOKEN="from-env") == "from-env"
    with pytest.raises(ConfigError, match="chmod 600"):
        token(AI4ALL_COORDINATOR_TOKEN_FILE=str(file))
    file.chmod(0o600)
    assert token(AI4ALL_COORDINATOR_TOKEN_FILE=str(file)) == "from-file"
    both = {"AI4ALL_COORDINATOR_TOKEN": "env", "AI4ALL_COORDINATOR_TOKEN_FILE": str(file)}
    assert token(**both) == "env"
    for content in (b"", b"\n", b"two words", b"\xff\xfe", b"a\nb", b"x" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="holds no token"):
            token(AI4ALL_COORDINATOR_TOKEN_FILE=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        token(AI4ALL_COORDINATOR_TOKEN_FILE=str(tmp_path / "absent"))


def test_layers_are_a_number_or_auto(tmp_path: Path) -> None:
    def layers(text: str) -> int:
        return from_toml(tmp_path, f"[engine]\ngpu_layers = {text}").engine_options().gpu_layers

    # For the engine, auto is the number that cannot be one.
    assert (layers('"auto"'), layers("0"), layers("12"), layers('"12"')) == (-1, 0, 12, 12)
    for text in ("-1", "1.5", '"all"', "true", "10001"):
        with pytest.raises(ConfigError, match="must be auto, or a whole number from 0 to 10000"):
            layers(text)
    assert '# gpu_layers = "auto"' in default_toml()
    assert "(auto, or 0 to 10000)" in default_toml()
