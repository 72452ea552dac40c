"""Ctrl-C and a cluster's preemption notice (SIGTERM): finish the step, save, and say so."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn, Self

# EX_TEMPFAIL of sysexits.h: not done, saved; run the same command again. Never the code of a crash or a kill.
EXIT_INTERRUPTED = 75


class Interrupted(Exception):
    """The run was asked to stop and has saved all it had; carries what to tell the user."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that the stages look at; a second one stops at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self, saved: str) -> None:
        """Raise Interrupted if a stop was asked for; `saved` says what is safe."""
        if self.signal is not None:
            self.tell(saved)

    def tell(self, saved: str) -> NoReturn:
        """Raise Interrupted; the signal may have been another process's."""
        name = "another process was asked to stop" if self.signal is None else self.signal.name
        raise Interrupted(f"{name}: {saved}; run the same command again to go on")
