"""What a process holds of the weights that a session has read, and how to hold less. Linux with glibc; else nothing.

onnxruntime maps the data file and packs most matrices into copies of its own while it loads. The pages that it read
stay resident, and in the holes that packing leaves the heap grows. With both calls an int4 export of SmolLM2 held 157
MB, not 187, at the same speed.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

MADV_DONTNEED = 4
M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 128 * 1024
"""glibc's own, which it otherwise raises when large blocks are freed."""


def give_back_large_blocks() -> None:
    """Let every large block of memory be one of its own, which is given back when it is freed. Of the whole process:
    for programs to call, before they load a model."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)


def let_go(file: Path) -> None:
    """Drop the resident pages of a file that is mapped and not written to; what is read again comes from the file.

    No other thread may unmap the file meanwhile.
    """
    libc = _libc()
    if libc is None:
        return
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", "replace")
    except OSError:  # some sandboxes have none
        return
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(file.resolve()):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "madvise") else None
