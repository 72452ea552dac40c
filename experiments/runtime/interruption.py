"""Ctrl-C and a cluster's preemption notice (SIGTERM): acknowledged at once, and obeyed within two seconds.

A stage checks its `StopRequest` at suitable points. Between two checks the process may be in a compiled program, a
compressed file or a download, which cannot check. Every file is written whole or not at all, and finished files are
kept, so the process can end there. It is held only while a state is in memory alone (training), until this state is
saved. Training then ends even during a validation, which the next start repeats first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, Self

# EX_TEMPFAIL of sysexits.h: not done, saved; run the same command again. Never the code of a crash or a kill.
EXIT_INTERRUPTED = 75
# The exit code of a second request, a shell's own for Ctrl-C.
EXIT_AT_ONCE = 130

# Seconds for a stage to notice a request before the process ends.
_GRACE_SECONDS = 1.5


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message is for the user."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that the stages check; a second signal stops at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._earlier: dict[int, object] = {}
        self._heard = threading.Event()  # a stage has noticed the request and ends by itself
        self._held = threading.Lock()

    def __enter__(self) -> Self:
        # The system's handler writes to the socket even while the main thread is busy.
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._note)
        self._earlier_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop request", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._heard.set()
        self._theirs.close()  # ends the watch

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def _watch(self) -> None:
        """Acknowledge a request, and end the process if no stage does so in time."""
        with self._ours:
            number = self._next_signal()
            if number is None:
                return
            name = signal.Signals(number).name
            at_end = "; stopping after this step" if self._held.locked() else "; stopping"
            print(f"{name}{at_end}, once more stops at once", file=sys.stderr, flush=True)
            leave = threading.Thread(target=self._leave, args=(name,), daemon=True)
            leave.start()
            if self._next_signal() is not None and not self._heard.wait(_GRACE_SECONDS):
                said = f"error: {name} twice: stopped at once; what was saved before is kept"
                print(said, file=sys.stderr, flush=True)
                os._exit(EXIT_AT_ONCE)

    def _next_signal(self) -> int | None:
        """The next SIGINT or SIGTERM; None once the request is over."""
        while received := self._ours.recv(1):
            if received[0] in (signal.SIGINT, signal.SIGTERM):
                return received[0]
        return None

    def _leave(self, name: str) -> None:
        if self._heard.wait(_GRACE_SECONDS):
            return
        with self._held:
            # A held stage has checked by now, or is about to.
            if self._heard.wait(_GRACE_SECONDS / 4):
                return
            print(
                f"{name}: stopped; finished files are kept, run the same command again to go on",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(EXIT_INTERRUPTED)

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Context in which the process is not ended: the state is in memory alone, and the stage checks for a stop."""
        with self._held:
            yield

    def check(self, saved: str) -> None:
        """Raise Interrupted if a stop was asked for; `saved` names the saved state."""
        if self.signal is not None:
            self.tell(saved)

    def tell(self, saved: str) -> NoReturn:
        """Raise Interrupted; the signal may have been another process's."""
        self._heard.set()
        name = "another process was asked to stop" if self.signal is None else self.signal.name
        raise Interrupted(f"{name}: {saved}; run the same command again to go on")


def leave(interrupted: Interrupted) -> NoReturn:
    """End the process now with the code of an interruption; a clean shutdown would wait for running programs."""
    print(interrupted, file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)
