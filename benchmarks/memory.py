"""How much memory: what a process holds now, and the largest resident set of its tree while something else drives it.

For the peak there are two sources, the larger counts. A thread adds up the resident sets of the process tree every
20 ms; between two samples it is blind. The kernel's own high-water mark (VmHWM, Linux) misses nothing but knows one
process: for a server of one process it is exact. Pages that processes share are counted once for each. (The ru_maxrss
of a finished child is no substitute: the kernel carries the parent's mark over `exec`, so a child of a large process
looks large.)
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from compress.errors import ConfigError

INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Resident:
    """What one process holds, in bytes.

    Attributes:
        anon: memory of its own.
        file: pages of mapped files, which the system can take back.
        total: both, and what it shares with others.
        peak: the most that `total` has been.
    """

    anon: int
    file: int
    total: int
    peak: int


def resident(pid: int | None = None) -> Resident | None:
    """What a process holds (None: this one); None where there is no such process, or the system does not tell."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text("ascii", "replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmHWM" not in fields:  # a process that has ended and is not yet reaped
        return None
    return Resident(*(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmRSS", "VmHWM")))


class PeakMemory:
    """Watch a running process in a `with` block; `bytes` is the peak of its tree so far.

        with PeakMemory(server.pid) as peak:
            ...  # drive the server
        peak.bytes

    Raises:
        ConfigError: there is no such process, or it may not be looked at.
    """

    def __init__(self, pid: int, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self.bytes = 0
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"memory of {pid}", daemon=True)
        try:
            self._process = psutil.Process(pid)
            self._process.memory_info()
        except psutil.Error as error:
            raise ConfigError(f"cannot watch the memory of process {pid}: {error}") from error

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._sample()

    def _sample(self) -> None:
        """Take one sample. A process that has gone adds nothing."""
        together = marks = 0
        for process in self._tree():
            try:
                together += process.memory_info().rss
            except psutil.Error:
                continue
            held = resident(process.pid)
            marks = max(marks, held.peak if held else 0)
        self.bytes = max(self.bytes, together, marks)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return []


def peak_rss_of(argv: Sequence[str], *, interval_seconds: float = INTERVAL_SECONDS, quiet: bool = False) -> int:
    """Run a command to its end and return the peak of its process tree in bytes; `quiet` drops what it prints.

    Raises:
        ConfigError: the command cannot be started, ends with an error, or ends before it can be watched.
    """
    try:
        stdout = subprocess.DEVNULL if quiet else None
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout)
    except OSError as error:
        raise ConfigError(f"cannot start {argv[0]}: {error.strerror}") from error
    with process, PeakMemory(process.pid, interval_seconds=interval_seconds) as peak:
        code = process.wait()
    if code != 0:
        raise ConfigError(f"{argv[0]} ended with code {code}: its memory says nothing")
    return peak.bytes
