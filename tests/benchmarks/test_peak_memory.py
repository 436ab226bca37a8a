"""Peak memory of processes whose memory is known."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.memory import PeakMemory, peak_rss_of
from compress.errors import ConfigError

MB = 1_000_000
ALLOCATE = "held = bytearray(b'x') * 200_000_000; del held; import time; time.sleep({})"
IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE.format(0.2)!r}])"


def test_memory_that_was_held_only_for_a_moment_is_seen() -> None:
    small = peak_rss_of([sys.executable, "-c", "import time; time.sleep(0.2)"])
    large = peak_rss_of([sys.executable, "-c", ALLOCATE.format(0.2)])
    assert 195 * MB < large - small < 215 * MB


def test_memory_of_a_child_counts() -> None:
    assert peak_rss_of([sys.executable, "-c", IN_A_CHILD]) > 200 * MB


def test_the_memory_of_the_watcher_does_not_count() -> None:
    held = bytearray(b"x") * 100_000_000
    assert peak_rss_of([sys.executable, "-c", "import time; time.sleep(0.2)"]) < 60 * MB
    del held


def test_a_running_process_can_be_watched() -> None:
    process = subprocess.Popen([sys.executable, "-c", ALLOCATE.format(30)])
    try:
        with PeakMemory(process.pid) as peak:
            deadline = time.monotonic() + 10
            while peak.bytes < 200 * MB and time.monotonic() < deadline:
                time.sleep(0.05)
        assert 200 * MB < peak.bytes < 260 * MB
    finally:
        process.kill()
        process.wait()


def test_a_process_that_ends_while_it_is_watched_keeps_its_peak() -> None:
    process = subprocess.Popen([sys.executable, "-c", ALLOCATE.format(0.3)])
    with PeakMemory(process.pid) as peak:
        process.wait()
    assert peak.bytes > 200 * MB


def test_a_process_that_is_not_there_is_refused() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ConfigError, match="cannot watch the memory"):
        PeakMemory(process.pid)


def test_a_command_that_fails_or_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="ended with code 3"):
        peak_rss_of([sys.executable, "-c", "import sys, time; time.sleep(0.2); sys.exit(3)"])
    with pytest.raises(ConfigError, match="cannot start"):
        peak_rss_of(["no-such-command-at-all"])
