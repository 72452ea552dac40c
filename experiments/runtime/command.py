"""Exit codes and one-line errors of the other commands, the same as the launcher's."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from experiments.runtime.interruption import EXIT_INTERRUPTED, Interrupted

# Numbers of an OSError: full, over the quota, or a file larger than allowed.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger("medfuncta")


def parse(argv: Sequence[str], *, required: Sequence[str] = (), example: str = "", options=flags.FLAGS) -> None:
    """Read flags.

    Args:
      argv: the process's arguments, the command's name first.
      required: flags that must have a value.
      example: an example of the flags, for the message.
    Raises:
      absl.flags.Error: a flag is wrong, unknown or missing, or a word is no flag.
    """
    rest = options(list(argv))
    for name in required:
        if not options.get_flag_value(name, None):
            raise flags.Error(f"--{name} is missing; e.g. {example}")
    if len(rest) > 1:
        raise flags.Error(f"{rest[1]!r} is not a flag")


def carry_out(
    work: Callable[[], None], *, refusals: tuple[type[Exception], ...], place: Path, when_stopped: str
) -> int:
    """Run the work of a command; every user error ends in one line.

    Args:
      work: the function to run; raises Interrupted if a stop was asked for.
      refusals: exceptions whose text tells a user what to do.
      place: the name in the message of an OSError without a file.
      when_stopped: the message after a KeyboardInterrupt.
    Returns:
      The exit code: 0 done, 1 refused, 75 interrupted, 130 stopped at once.
    """
    try:
        work()
        return 0
    except Interrupted as interrupted:
        log.warning("%s", interrupted)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return refuse(when_stopped, code=130)
    except refusals as error:
        return refuse(error, code=1)
    except OSError as error:
        return refuse(f"{error.filename or place}: {error.strerror or error}", code=1)


def refuse(error: object, *, code: int) -> int:
    """Print the reason in one line; returns `code`."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
