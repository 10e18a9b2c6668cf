"""The first line of a command, written before PyTorch is imported, which takes seconds.

It is written when this module is imported, and only if the process was started as one of
the commands that work for a while.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath

COMMANDS = (
    *("plan", "prune", "retrain", "calibrate", "solve"),
    *("evaluate", "verify", "bench"),
)


def command_of(line: Sequence[str]) -> str | None:
    """Command of layerwise that a command line of Python starts; None if none works.

    Parameters
    ----------
    line
        As ``sys.orig_argv``: interpreter, its options, script or module, arguments.
    """
    words = iter(line[1:])
    for word in words:
        if word in ("-X", "-W"):  # options of Python that have a value
            next(words, None)
        elif word == "-m" or not word.startswith("-"):
            started = next(words, "") if word == "-m" else PurePath(word).stem
            command = next(words, "")
            known = started == "layerwise" and command in COMMANDS
            return command if known and "--help" not in line else None
    return None


if (_command := command_of(sys.orig_argv)) and os.environ.get("RANK", "0") == "0":
    with suppress(OSError, AttributeError, ValueError):  # lost progress is no failure
        sys.stderr.write(f"layerwise {_command}: starting\n")
        sys.stderr.flush()
