"""Signals that end a run: SIGTERM and SIGUSR1 from a cluster's scheduler, SIGINT from a keyboard.

Every result is written whole or not at all, and every task resumes from its folder, so a signal
may end a run anywhere. It raises `Ended` at once, or after a piece of work that saves its own
state (`unbroken`). If the process is still there after `GRACE` seconds, for example within a long
call of a library, a thread ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import Signals

from lightning.pytorch.utilities import rank_zero_only

GRACE = 3.5  # seconds from a signal to the end of the process
CODES = {Signals.SIGINT: 130, Signals.SIGTERM: 143}  # exit codes, as shells have them
if hasattr(Signals, "SIGUSR1"):
    CODES[Signals.SIGUSR1] = 143
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows, SIGTERM cannot be handled either


class Ended(SystemExit):
    """The exception by which a signal ends the run."""

    def __init__(self, received: Signals):
        super().__init__(CODES[received])


class _Watch:
    """The state of a process that watches for signals.

    Attributes:
        advice: The end of the message: how the run resumes.
        received: The first signal, if one has come.
        pieces: Number of pieces of work that a signal must not break, one inside the other.
        reported: A lock that is taken by the first report.
    """

    def __init__(self) -> None:
        self.advice = "nothing was begun"
        self.received: Signals | None = None
        self.pieces = 0
        self.reported = threading.Lock()

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal."""
        if self.received is None:
            self.received = Signals(number)
            if self.pieces == 0:
                raise Ended(self.received)

    def report(self) -> None:
        """Print once what ended the run, and how it resumes."""
        # Lightning sets the rank.
        is_first = self.reported.acquire(blocking=False)
        if is_first and rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
            assert self.received is not None
            cause = f"ended by {self.received.name}"
            if self.received is Signals.SIGINT:
                cause = "interrupted"
            print(f"\noss-exp: {cause}; {self.advice}", file=sys.stderr, flush=True)

    def guard(self, pipe: int) -> None:
        """Wait in a thread for a signal, then for the process to end, and end it if it does not."""
        number = os.read(pipe, 1)
        while number and number[0] not in (0, *CODES):  # another handler's signal, such as SIGCHLD
            number = os.read(pipe, 1)
        if number in (b"", b"\0"):
            return
        threading.Event().wait(GRACE)
        self.received = self.received or Signals(number[0])
        self.report()
        self.exit()

    def exit(self) -> None:
        """End the process and its children, without waiting for anything."""
        assert self.received is not None
        for child in multiprocessing.active_children():
            assert child.pid is not None
            with suppress(OSError):  # it has ended
                os.kill(child.pid, KILL)  # joblib's processes have no method `kill`
        sys.stdout.flush()
        os._exit(CODES[self.received])


_watch: _Watch | None = None


@contextmanager
def watched() -> Iterator[None]:
    """Watch for signals within this context.

    SIGTERM and SIGUSR1 end the process with exit code 143, SIGINT with 130, after one line that
    ends with the text of `advise`. Outside the main thread, where Python has no signals, nothing
    is watched.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Handlers, and a pipe that the system writes to even while a library keeps Python busy.
    watch = _watch = _Watch()
    handlers = {number: signal.signal(number, watch.handle) for number in CODES}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    guard = threading.Thread(target=watch.guard, args=(reading,), daemon=True)
    guard.start()

    try:
        yield
    except BaseException:
        if watch.received is None:
            raise
    finally:
        # After a signal the process ends here, whatever else it has led to.
        if watch.received is not None:
            watch.report()
            watch.exit()

        # Else everything is restored.
        _watch = None
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        guard.join()
        os.close(reading)
        os.close(writing)


def advise(text: str) -> None:
    """Set the end of the message that a signal leads to: how the run resumes."""
    if _watch is not None:
        _watch.advice = text


@contextmanager
def unbroken() -> Iterator[None]:
    """Protect a piece of work from signals: the run ends after it.

    Within it, `received` tells whether a signal has come.
    """
    watch = _watch
    if watch is None:
        yield
        return
    watch.pieces += 1
    try:
        yield
    finally:
        watch.pieces -= 1
    end_if_received()


def received() -> bool:
    """Tell whether a signal has come that ends this run."""
    return _watch is not None and _watch.received is not None


def end_if_received() -> None:
    """Raise `Ended` if a signal has come that ends this run."""
    if _watch is not None and _watch.received is not None:
        raise Ended(_watch.received)


def _restore_in_child() -> None:
    """Restore the default handlers in a forked process, such as one that loads data."""
    global _watch
    if _watch is None:
        return
    _watch = None
    signal.set_wakeup_fd(-1)
    for number in CODES:
        is_interrupt = number == Signals.SIGINT
        signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_in_child)
