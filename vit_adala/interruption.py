"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and whether the same command would resume."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_folders: list[Path] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that everything that cleans up after Ctrl-C also does so here."""


def writes_to(folder: str | Path) -> None:
    """Note the output folder of this process's command, which may hold checkpoints to resume from."""
    _folders[:] = [Path(folder)]


def in_words(stop: KeyboardInterrupt | None = None) -> str:
    """Return the message for an interruption."""
    # `trainers.runs.checkpoints` seals what is complete; importing its name for that file would take seconds
    patterns = ("checkpoints/**/checksums.json", "[123]-*/config.json")
    resumes = any(any(folder.glob(pattern)) for folder in _folders for pattern in patterns)
    word = "terminated" if isinstance(stop, Terminated) else "interrupted"
    return word + ("; the same command resumes from the last checkpoint" if resumes else "")


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return 128 plus the number of the signal, as shells do."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handle a signal in this process, but not in those that it forks; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == process:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def raise_terminated(number: int, frame: Any) -> None:
    raise Terminated


def leave_at_once(prefix: str) -> Callable[[int, Any], None]:
    """Return a handler that prints one line and ends the process, for use before the command starts.

    An exception would be raised somewhere inside an import, where compiled modules turn it into errors of their own.
    """

    def handler(number: int, frame: Any) -> None:
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        os.write(2, f"{prefix}: {word}.\n".encode())
        os._exit(128 + number)

    return handler
