"""Progress of what takes long, on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator

PATIENCE = 2.0  # seconds before a bar is drawn


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that counts up to `total`, and after two seconds draws a bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    bar, task = Progress(console=Console(stderr=True), transient=True), None
    done, started = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal task, done
        done += count
        if task is None and time.monotonic() - started > PATIENCE:
            task = bar.add_task(what, total=total)
            bar.start()
        if task is not None:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        bar.stop()
