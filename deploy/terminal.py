"""What a person sees while foldaway works: progress bars and words on stderr. stdout is for the result alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from compress.result import Progress


class Terminal:
    """Words and progress bars on stderr, in a ``with``. Bars are shown on a terminal only."""

    def __init__(self) -> None:
        quieten_libraries()
        self.console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line of words; markup is not interpreted."""
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table."""
        self.console.print(table)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what is being done, and show that it goes on, where nobody can tell how long it takes."""
        self.say(what)
        task = self._bars.add_task("", total=None)
        try:
            yield
        finally:
            self._bars.remove_task(task)

    @property
    def progress(self) -> Progress:
        """The callback that library calls take."""
        return self._show

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        task = self._tasks[what]
        self._bars.update(task, completed=done, total=total)  # type: ignore[arg-type]
        if done >= total:
            self._bars.remove_task(task)  # type: ignore[arg-type]
            del self._tasks[what]


def quieten_libraries() -> None:
    """Turn off the bars and notes that libraries write to stderr; ours take their place."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
