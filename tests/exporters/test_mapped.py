"""Pages of a mapped file are dropped, and come back when they are read."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from exporters import mapped
from exporters.mapped import give_back_large_blocks, let_go


def resident(file: Path) -> int:
    """Bytes of a file's mappings that are in memory now."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own files are read")
def test_pages_that_were_read_are_dropped_and_come_back(tmp_path: Path) -> None:
    file, other = tmp_path / "weights", tmp_path / "weights.other"
    for each in (file, other):
        each.write_bytes(bytes(range(256)) * 4096)
    with file.open("rb") as one, other.open("rb") as two:
        kept = mmap.mmap(two.fileno(), 0, access=mmap.ACCESS_READ)
        view = mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(view[:]) == sum(kept[:])
        assert resident(file) == resident(other) == 1 << 20
        let_go(file)
        assert resident(file) == 0
        assert resident(other) == 1 << 20
        assert view[:] == kept[:]


def test_elsewhere_than_on_linux_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped.sys, "platform", "darwin")
    give_back_large_blocks()
    let_go(tmp_path / "weights")
