"""Signals that end a run: SIGTERM and SIGUSR1 of a cluster's scheduler, SIGINT of a keyboard.

Every result is written whole or not at all, and every task goes on from what its folder holds. So a signal may end a
run anywhere: it becomes an exception, `Ended`, at once, or after a piece of work that keeps its state itself
(`unbroken`). A thread ends a process that is still there after `GRACE` seconds, as within a long call of a library.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from lightning.pytorch.utilities import rank_zero_only

GRACE = 3.5  # seconds from a signal to the end of the process
CODES = {Signals.SIGINT: 130, Signals.SIGTERM: 143}  # as shells number them
if hasattr(Signals, "SIGUSR1"):
    CODES[Signals.SIGUSR1] = 143


class Ended(SystemExit):
    """A signal ends the run."""

    def __init__(self, received: Signals):
        super().__init__(CODES[received])


class _Watch:
    """What is known of the signals to this process."""

    def __init__(self) -> None:
        self.advice = "nothing was begun"
        self.received: Signals | None = None
        self.pieces, self.said = 0, threading.Lock()

    def handle(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received = Signals(number)
            if self.pieces == 0:
                raise Ended(self.received)

    def say(self) -> None:
        """Say once what ended the run, and how it goes on."""
        if self.said.acquire(blocking=False) and rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]  # Lightning sets it
            assert self.received is not None
            how = (
                "interrupted"
                if self.received is Signals.SIGINT
                else f"ended by {self.received.name}"
            )
            print(f"\noss-exp: {how}; {self.advice}", file=sys.stderr, flush=True)

    def guard(self, pipe: int) -> None:
        """Wait for a signal, then for the process to end by itself; runs in a thread of its own."""
        number = os.read(pipe, 1)
        if number in (b"", b"\0"):
            return
        threading.Event().wait(GRACE)
        self.received = self.received or Signals(number[0])
        self.say()
        self.exit()

    def exit(self) -> None:
        """End the process and those it has started, without waiting for anything."""
        assert self.received is not None
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(CODES[self.received])


_watch: _Watch | None = None


@contextmanager
def watched() -> Iterator[None]:
    """End the process with 143 on SIGTERM or SIGUSR1, with 130 on SIGINT, and one line that ends as `advise` says.

    Outside of the main thread, where Python takes no signals, nothing happens.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Handlers, and a pipe that the system writes to even while a library keeps Python busy.
    watch = _watch = _Watch()
    before = {number: signal.signal(number, watch.handle) for number in CODES}
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
        if watch.received is not None:  # whatever else it has led to
            watch.say()
            watch.exit()
        _watch = None
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        guard.join()
        os.close(reading)
        os.close(writing)


def advise(text: str) -> None:
    """Set what a user is told whose run a signal ends: how it goes on."""
    if _watch is not None:
        _watch.advice = text


@contextmanager
def unbroken() -> Iterator[None]:
    """A piece of work that a signal does not break, but ends after; within, `received` tells of one."""
    if (watch := _watch) is None:
        yield
        return
    watch.pieces += 1
    try:
        yield
    finally:
        watch.pieces -= 1
    end_if_received()


def received() -> bool:
    """Return whether a signal has come that ends this run."""
    return _watch is not None and _watch.received is not None


def end_if_received() -> None:
    """Raise `Ended` where a signal has come that ends this run."""
    if _watch is not None and _watch.received is not None:
        raise Ended(_watch.received)


def _forget() -> None:
    """Give a forked process, such as one that loads data, the signals as they were."""
    global _watch
    if _watch is not None:
        _watch = None
        signal.set_wakeup_fd(-1)
        for number in CODES:
            signal.signal(
                number, signal.default_int_handler if number == Signals.SIGINT else signal.SIG_DFL
            )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
