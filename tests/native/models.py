"""Writes the models of the native tests: ``python models.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_gguf import Q8_0, write_tiny_gguf


def main(folder: Path) -> None:
    """Write the tiny model, and what may stand beside it as its draft model."""
    # In a format whose products are the same for one token and for several: it can be drafted for.
    write_tiny_gguf(folder / "tiny.gguf", weight_type=Q8_0)
    write_tiny_gguf(folder / "other.gguf", seed=1)
    write_tiny_gguf(folder / "close.gguf")
    write_tiny_gguf(folder / "strange.gguf", renamed={300: "nowhere"})
    write_tiny_gguf(folder / "short.gguf", n_ctx=64)
    write_tiny_gguf(folder / "deep.gguf", n_layers=32)
    write_tiny_gguf(folder / "thin.gguf", n_layers=1, seed=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
