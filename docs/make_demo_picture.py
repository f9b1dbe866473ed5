"""Draw docs/demo.svg: what ``ai4all-native demo`` shows on a terminal of this machine.

The demo runs for real in a pseudo terminal; what it wrote there becomes the picture. It runs once
before, unseen, so that the picture has no download in it.

Usage: python docs/make_demo_picture.py [--data-dir DIR] [--output FILE] [--columns N]
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROWS = 50

# No web font and no title bar: the picture must look the same without a network.
SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>Output of ai4all-native demo</title>
<style>
.{unique_id}-matrix {{
  font-family: monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
}}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def run_in_terminal(command: list[str], columns: int) -> str:
    """Run ``command`` in a pseudo terminal; return all that it wrote.

    Raises:
        SystemExit: It failed; with what it wrote.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    hidden = {"NO_COLOR", "COLUMNS", "LINES"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    written = bytearray()
    while chunk := _read(ours):
        written += chunk
    os.close(ours)
    text = written.decode().replace("\r\n", "\n")
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux says so when the last writer has closed its end.
        return b""


def draw(written: str, columns: int) -> str:
    """The picture of a terminal that shows ``written``."""
    console = Console(
        record=True,
        width=columns,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print("$ ai4all-native demo", style="bold", highlight=False)
    console.print(Text.from_ansi(written.rstrip()))
    return console.export_svg(title="", code_format=SVG, unique_id="demo")


def main() -> None:
    """Run the demo and write its picture."""
    parser = argparse.ArgumentParser(description="Draw what the demo shows.")
    parser.add_argument("--data-dir", help="passed on to the demo")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("demo.svg"))
    parser.add_argument("--columns", type=int, default=100, help="width of the terminal")
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).with_name("ai4all-native")), "demo"]
    if arguments.data_dir is not None:
        command += ["--data-dir", arguments.data_dir]
    run_in_terminal([*command, "--tasks", "1"], arguments.columns)
    arguments.output.write_text(
        draw(run_in_terminal(command, arguments.columns), arguments.columns), encoding="utf-8"
    )
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
