"""Write the table of settings in docs/operating.md, from the models in ai4all/config.py.

Usage: python docs/make_settings_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

import ujson

from ai4all.config import Settings, explain

DOCUMENT = Path(__file__).with_name("operating.md")
_TABLE = re.compile(r"^\| key \| default \| meaning \|\n(?:\|.*\n)*", re.MULTILINE)


def table() -> str:
    """A row for each setting, in the order of the models."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for row in explain(Settings()):
        default = f"`{ujson.dumps(row.value, escape_forward_slashes=False)}`"
        if row.key == "data_dir":
            default = "the user's data directory"
        elif row.value is None:
            default = ""
        lines.append(f"| `{row.key}` | {default} | {row.description} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The document with the table as it should be."""
    return _TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
