"""Where settings are written: the environment, the TOML file, the token's file.

Each value comes with its origin in words, so that a mistake can name its place.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from ai4all.errors import ConfigError

__all__ = ["default_data_dir", "find_file", "read_environment", "read_file", "read_token"]

APP_NAME = "ai4all-native"
ENV_PREFIX = "AI4ALL_"
CONFIG_FILE_VARIABLE = "AI4ALL_CONFIG"
MAX_FILE_BYTES = 1 << 20
MAX_TOKEN_BYTES = 16 << 10

# Variables of ours that are no settings: of the build, of the tests, of this module.
OTHER_VARIABLES = frozenset({CONFIG_FILE_VARIABLE, "AI4ALL_LLAMA_SOURCE_DIR", "AI4ALL_TEST_MODEL"})


def default_data_dir() -> Path:
    """Where data goes when nobody says otherwise."""
    return platformdirs.user_data_path(APP_NAME, appauthor=False)


def read_environment(
    environ: Mapping[str, str], keys: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield the key, text and origin of each variable that is a setting.

    Raises:
        ConfigError: A variable is almost one.
    """
    variables = {ENV_PREFIX + key.upper().replace(".", "_"): key for key in keys}
    sections = {name for name in (key.partition(".")[0] for key in keys) if name}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        origin = f"variable {variable}"
        if variable in variables:
            if text:  # an empty variable is one that is not set
                yield variables[variable], text, origin
            continue
        near = difflib.get_close_matches(variable, variables, 1, 0.85)
        of_section = variable.removeprefix(ENV_PREFIX).partition("_")[0].lower() in sections
        # Other programs of the network may have variables of this prefix: only what looks
        # like one of ours gone wrong is an error.
        if near or of_section:
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError("", f"{variable} is not a setting{hint}", "the environment")


def find_file(
    given: Path | str | None, flags: Mapping[str, Any], environ: Mapping[str, str]
) -> Path | None:
    """The configuration file to read: the one that is named, else the first that exists.

    Raises:
        ConfigError: A path begins with ``~`` and somebody without a home.
    """
    named = given or environ.get(CONFIG_FILE_VARIABLE)
    data_dir = flags.get("data_dir") or environ.get(ENV_PREFIX + "DATA_DIR") or default_data_dir()
    try:
        if named:
            return Path(named).expanduser()
        own = Path(data_dir).expanduser()
    except RuntimeError as error:
        raise ConfigError("", f"{named or data_dir}: {error}", "") from error
    directories = (own, platformdirs.user_config_path(APP_NAME, appauthor=False))
    for directory in directories:
        path = directory / "config.toml"
        if path.is_file():
            return path
    return None


def read_file(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield the dotted key, value and origin of each assignment in a TOML file.

    Raises:
        ConfigError: It cannot be read, or is no TOML, or a section is no table.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError("", f"the configuration cannot be read: {reason}", str(path)) from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError("", f"is longer than {MAX_FILE_BYTES} bytes", str(path))
    try:
        text = raw.decode()
        tables = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError("", f"is not valid TOML: {error}", str(path)) from error
    places = _line_numbers(text)

    def origin(key: str) -> str:
        line = places.get(key)
        return f"{path}, line {line}" if line else str(path)

    sections = {key.partition(".")[0] for key in keys if "." in key}
    for name, value in tables.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                key = f"{name}.{inner}"
                yield key, inner_value, origin(key)
        elif name in sections:
            raise ConfigError(name, f"must be a table: [{name}]", origin(name))
        else:
            yield name, value, origin(name)


_HEADER = re.compile(r"\s*\[\s*\"?([\w-]+)\"?\s*\]")
_ASSIGNMENT = re.compile(r"\s*\"?([\w-]+)\"?\s*(?:\.\s*\"?([\w-]+)\"?\s*)?=")


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key to line, for the ways in which people write TOML; the rest goes without."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = header[1]
        elif assignment := _ASSIGNMENT.match(line):
            parts = [part for part in (section, assignment[1], assignment[2]) if part]
            found.setdefault(".".join(parts), number)
    return found


def read_token(path: Path, key: str, origin: str) -> str:
    """The text of a token's file; empty when it cannot be a token.

    Raises:
        ConfigError: It cannot be read, or others can read it too.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}"
        raise ConfigError(key, problem, origin) from error
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(key, f"others can read {path}; run: chmod 600 {path}", origin)
    try:
        return raw.decode("ascii").strip() if len(raw) <= MAX_TOKEN_BYTES else ""
    except UnicodeDecodeError:
        return ""
