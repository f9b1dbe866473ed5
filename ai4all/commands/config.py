"""``ai4all-native config``: show, init and validate."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from ai4all.commands.environment import print_json, read_settings, stdout_console
from ai4all.config import default_toml, explain
from ai4all.errors import ConfigError

__all__ = ["init_config", "show_config", "validate_config"]


def show_config(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Print every setting with its value and origin. Secrets are masked.

    Raises:
        ConfigError: A key or value is wrong.
    """
    settings = read_settings(config, data_dir)
    rows = explain(settings)
    if as_json:
        file = str(settings.config_file) if settings.config_file is not None else None
        print_json({"config_file": file, "settings": [asdict(row) for row in rows]})
        return
    table = Table()
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.key, "" if row.value is None else str(row.value), row.origin)
    console = stdout_console()
    console.print(table)
    console.print(f"file: {settings.config_file or 'none'}", markup=False, soft_wrap=True)


def init_config(config: Path | None, data_dir: Path | None, *, force: bool, as_json: bool) -> None:
    """Write the default file: to ``config``, or into the data directory.

    Raises:
        ConfigError: A file is there and ``force`` was not said.
        OSError: It cannot be written.
    """
    path = config or (data_dir or read_settings(None, None).data_dir) / "config.toml"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise ConfigError("", "there is a file already; --force replaces it", str(path)) from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(default_toml())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    if as_json:
        print_json({"config_file": str(path)})
    else:
        stdout_console().print(f"written: {path}", markup=False, soft_wrap=True)


def validate_config(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Check the settings, and that the token, where one is set, can be read.

    Raises:
        ConfigError: Something is wrong; it names the key and its place.
    """
    settings = read_settings(config, data_dir)
    settings.coordinator_token()
    file = str(settings.config_file) if settings.config_file is not None else None
    if as_json:
        print_json({"valid": True, "config_file": file})
    else:
        stdout_console().print(f"valid: {file or 'no file'}", markup=False, soft_wrap=True)
