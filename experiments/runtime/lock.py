"""One writer per run directory: a lock that is released when its holder dies, on this machine or on others.

The lock is the operating system's (`flock`), which most network file systems share between machines. For the others,
each holder also keeps a small file beside the lock, `WORKDIR/.lock/HOST-PID.json`, and renews its time while alive; a
holder on another machine counts until its file is `STALE_SECONDS` old.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import log
from medfuncta_jax.atomic import atomic_path

# Seconds between renewals of a holder's file, and the age at which a holder on another machine counts as dead.
BEAT_SECONDS, STALE_SECONDS = 5.0, 60.0

# Seconds between two attempts to get the lock.
_AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """A process that holds or asks for a lock.

    Attributes:
      host, pid: the process.
      machine: differs between machines with the same name.
      since: start of the process, local time.
      what: a description for people.
      shared: whether others that share may hold the lock at the same time.
    """

    host: str
    pid: int
    machine: str
    since: str
    what: str
    shared: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.what}, since {self.since})"


@contextlib.contextmanager
def held(workdir: Path, what: str, *, shared: bool, stop: StopRequest) -> Iterator[None]:
    """Hold the lock of a run directory, after waiting for another process if necessary.

    Args:
      workdir: an existing directory.
      what: the stage, shown to waiting processes.
      shared: whether to share the lock with others that share it, such as the jobs of an array.
      stop: checked while waiting.
    Raises:
      Interrupted: a stop was asked for while waiting.
      OSError: the directory cannot be written.
    """
    own = Holder(socket.gethostname(), os.getpid(), _machine(), time.strftime("%Y-%m-%d %H:%M:%S"), what, shared)
    place = workdir / ".lock"
    place.mkdir(exist_ok=True)
    file = place / f"{own.host}-{own.pid}.json"
    with open(place / "flock", "a") as lock:
        _acquire(lock.fileno(), place, file, own, stop)
        ended = threading.Event()
        threading.Thread(target=_beat, args=(file, workdir, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            file.unlink(missing_ok=True)


def _acquire(lock: int, place: Path, file: Path, own: Holder, stop: StopRequest) -> None:
    told: str | None = None
    while True:
        by_system = _system_lock(lock, own.shared)
        others = _others(place, file, own, by_system)
        if by_system is not False and not others:
            with atomic_path(file) as partial:
                partial.write_text(json.dumps(asdict(own)) + "\n")
            others = _others(place, file, own, by_system)  # of two simultaneous requests, one or both give way
            if not others:
                return
            file.unlink(missing_ok=True)
        if by_system:
            fcntl.flock(lock, fcntl.LOCK_UN)
        who = str(others[0]) if others else "another process"
        if who != told:
            log.warning("waiting for %s, which writes in %s; Ctrl-C ends the wait", who, place.parent)
            told = who
        stop.check(f"nothing was begun while waiting for {who}")
        time.sleep(_AGAIN_SECONDS * random.uniform(0.5, 1.5))


def _system_lock(lock: int, shared: bool) -> bool | None:
    """Whether the system gave the lock; None on a file system without locks."""
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _others(place: Path, file: Path, own: Holder, by_system: bool | None) -> list[Holder]:
    """Living holders that conflict with this one; the files of dead ones are removed."""
    others, now = [], None
    for path in sorted(place.glob("*.json")):
        if path == file or path.name.startswith("."):
            continue
        try:
            holder = Holder(**json.loads(path.read_text()))
            age = path.stat().st_mtime
        except (OSError, ValueError, TypeError):  # already removed, or not a holder's file
            continue
        if own.shared and holder.shared:
            continue
        here = holder.machine == own.machine
        if here and by_system:  # the system would not have given a lock that a process of this machine holds
            path.unlink(missing_ok=True)
            continue
        if not (here and by_system is False):
            now = _now(place) if now is None else now
            if now - age > STALE_SECONDS:
                if by_system is not False:
                    log.warning("%s is gone without a word; its lock is taken over", holder)
                    path.unlink(missing_ok=True)
                continue
        others.append(holder)
    return others


def _now(place: Path) -> float:
    """The time by the clock that dates files there, perhaps a server's."""
    probe = place / f".now-{socket.gethostname()}-{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _beat(file: Path, workdir: Path, ended: threading.Event) -> None:
    """Renew the holder's file. Without it, another process may take the lock, and further writes could conflict."""
    while not ended.wait(BEAT_SECONDS):
        try:
            os.utime(file)
        except FileNotFoundError:
            if ended.is_set():
                return
            print(
                f"error: the lock of {workdir} was taken over or removed while this process did not respond; run the "
                "same command again, which goes on from what was saved",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)
        except OSError:  # a server that is unavailable for a moment
            continue


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
