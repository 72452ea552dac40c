"""Progress for people: a bar on a terminal, sparse lines in a job log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

log = logging.getLogger("medfuncta")

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts work and shows a bar with rate, time left and a note on a terminal, else an occasional line."""

    def __init__(self, title: str, *, total: int, done: int = 0, unit: str):
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._start, self._start_done, self._last_line = time.monotonic(), done, time.monotonic()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit=f" {unit}", dynamic_ncols=True, mininterval=0.2, miniters=0
            )

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more as done, 0 to refresh; `note` replaces the text after the numbers (current PSNR)."""
        self._done += count
        if note is not None:
            self._note = note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self.line()

    def line(self) -> None:
        """Log progress, rate and time left in one line."""
        self._last_line = time.monotonic()
        rate = (self._done - self._start_done) / max(1e-9, self._last_line - self._start)
        left = (self._total - self._done) / rate if rate else float("inf")
        note = f", {self._note}" if self._note else ""
        log.info(
            "%s: %d of %d %s, %s, %s left%s",
            self._title, self._done, self._total, self._unit, _pace(rate), _duration(left), note,
        )  # fmt: skip

    def message(self, text: str) -> None:
        """Log a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            log.info("%s", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _pace(rate: float) -> str:
    return f"{rate:.3g} a second" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s each"


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
