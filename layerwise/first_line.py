"""A first line of a command whose imports take long: PyTorch alone can take many seconds.

A timer is set when this module is imported, and only if the process was started as one of
the commands that work for a while. The command stops it.
"""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePath

COMMANDS = (
    *("plan", "prune", "retrain", "calibrate", "solve"),
    *("evaluate", "verify", "bench"),
)
PATIENCE = 1.0  # seconds


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
            return command if started == "layerwise" and command in COMMANDS else None
    return None


def _write() -> None:
    with suppress(OSError, AttributeError, ValueError):  # lost progress is no failure
        sys.stderr.write("starting: PyTorch is being imported\n")
        sys.stderr.flush()


timer = threading.Timer(PATIENCE, _write)
timer.daemon = True
if command_of(sys.orig_argv) and os.environ.get("RANK", "0") == "0":
    timer.start()
