"""Processes that benches ask questions, one after the other: each has memory and libraries of its own, and may die."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

END_SECONDS = 60.0  # in which a process ends by itself


@contextmanager
def asking(name: str, start: Callable[..., Callable[[Any], Any]], *arguments: Any) -> Iterator[Callable[[Any], Any]]:
    """Starts a process that answers questions until the `with` block ends, and waits until it is ready.

    Args:
        name: what errors call it.
        start: called there with the arguments; returns the function that answers.

    Yields:
        the function that asks.

    Raises:
        ChildProcessError: a question could not be answered, or the process has died.
    """
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, start, arguments))

    def received() -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            process.join()
            raise ChildProcessError(f"The process of {name} has died (exit status {process.exitcode}).") from None

    def ask(question: Any) -> Any:
        with suppress(OSError):  # a dead process: `received` says so
            pipe.send(question)
        answer = received()
        if isinstance(answer, Exception):
            raise ChildProcessError(f"{name} failed at {question!r:.40}: {answer}")
        return answer

    process.start()
    theirs.close()
    try:
        received()
        yield ask
    finally:
        with suppress(OSError):
            pipe.send(None)
        process.join(END_SECONDS)
        process.kill()
        process.join()


def _answer(pipe: Connection, start: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    answer = start(*arguments)
    pipe.send("ready")
    while (question := pipe.recv()) is not None:
        try:
            pipe.send(answer(question))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
