"""Five hundred names that would like to be paths."""

from __future__ import annotations

from typing import Final

__all__ = ["NAMES", "TARGET"]

TARGET: Final = "outside/secret.gguf"
"""What the names below try to reach: it lies beside the data directory."""


def _names() -> list[str]:
    depths = [1, 2, 3, 8, 40]
    names: list[str] = []
    for separator in ("/", "\\", "//", "/./", "\\/", "%2f", "%5c", "\u2215", "\u29f8", "\uff0f"):
        for up in ("..", "...", "%2e%2e", ". .", ".. ", "\u2025", "\uff0e\uff0e", "..\u200b"):
            for depth in depths:
                path = separator.join([up] * depth + TARGET.split("/"))
                names.append(path)
    plain = [
        "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/self/mem", "/dev/zero",
        "/dev/stdin",
        "~/.ssh/id_rsa", "~root/.bashrc", "$HOME/.ssh/id_rsa", "${HOME}", "`id`", "$(id)", "; id",
        "| id", "& id", "C:\\Windows\\win.ini", "C:/Windows/win.ini", "\\\\host\\share\\x",
        "//host/x",
        "file:///etc/passwd", "file:/etc/passwd", "http://127.0.0.1:9/x", "pypi:x==1/y",
        "CON", "NUL", "AUX", "COM1", "LPT1", "con.gguf", "nul.txt", "a:stream", "a::$DATA",
        ".", "..", "...", "/", "\\", "//", "./", "../", "-", "--", "-rf", "--help", "-", "*", "?",
        "[a-z]*", "{a,b}", "**/*", "%00", "%s%s%s%n", "{0.__class__}", "{{7*7}}", "<script>",
        "' OR 1=1",
        "'; DROP TABLE results; --", "\" OR \"\"=\"", "index.json", ".index.lock", ".fetch.lock",
        "results.sqlite3", "results.sqlite3-wal", "worker_id", ".initialized", "quarantine.json",
        "config.toml", "models", "models/", "models/../worker_id", "logs/../worker_id",
        "cache/hashes.json",
    ]  # fmt: skip
    odd = [
        "", " ", "\t", "\n", "\r\n", "\0", "a\0b", "../\0", "a\nb", "\x1b[2J", "\x7f",
        "\u202egpj.exe",
        "\ufeff", "\u200b", "\u0000/../x", "\ud7ff", "\ue000", "\uffff", "\U0010ffff", "é" * 100,
        "e\u0301", "\u00e9", "x" * 255, "x" * 256, "x" * 257, "x" * 1024, "x" * 4096, "/" * 1024,
        "../" * 300, "a/" * 400, "." * 1024, "\u4e2d" * 341, "😀" * 256,
    ]  # fmt: skip
    names += plain + odd
    # The digest of a model is a file's name: one that is nearly one must not be taken for it.
    for digest in (
        "a" * 64,
        "A" * 64,
        "a" * 63,
        "a" * 65,
        "g" * 64,
        "a" * 64 + "\n",
        "sha256:" + "a" * 64,
    ):
        names += [digest, f"../{digest}", f"{digest}.gguf", f"{digest}/../{TARGET}"]
    return list(dict.fromkeys(names))


NAMES: Final = _names()
assert len(NAMES) >= 500
