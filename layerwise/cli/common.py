"""What several commands share: what was typed, threads, progress, hyper-parameters."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from layerwise.errors import DataError, UsageError, quoted
from layerwise.limits import MOST_THREADS, check_limit
from layerwise.run.outputs.strict_yaml import parse_yaml

TYPED = "COMMANDLINE"  # source of a parameter, as click names it


def typed_names(context: typer.Context) -> set[str]:
    """Names of the parameters that are on the command line, not left to their default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == TYPED}


def set_threads(threads: int | None, workers: int = 1) -> None:
    """Use so many CPU threads per worker; None divides those that PyTorch takes."""
    import torch

    if threads is None and workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
    if threads is not None:
        if threads < 1:
            message = f"--threads must be at least 1, got {threads}"
            raise UsageError(message)
        check_limit("--threads", threads, MOST_THREADS)
        torch.set_num_threads(threads)


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result it gets.

    Raises
    ------
    UsageError
        It is a folder or a device, or its folder is missing or cannot be written.
    """
    if path is None:
        return
    try:
        folder = path.absolute().parent
        problem = None
        if not path.name or (path.exists() and not path.is_file()):
            problem = "it is not a file: name one"
        elif not folder.is_dir():
            problem = "it has no folder: create it first"
        elif not os.access(path if path.exists() else folder, os.W_OK):
            problem = "it cannot be written: choose another place"
    except (OSError, ValueError) as error:
        problem = f"{getattr(error, 'strerror', None) or error}; choose another name"
    if problem is not None:
        message = f"{option} {quoted(str(path))}: {problem}"
        raise UsageError(message)


@contextmanager
def saying_steps() -> Iterator[None]:
    """Write a line on stderr about every step inside that takes long."""
    from layerwise.reports.lines import Lines
    from layerwise.run.steps import listening

    with Lines(sys.stderr) as lines, listening(lines.now):
        yield


@contextmanager
def progress_on(plain: Any, rich: Any) -> Iterator[Any]:
    """A bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    progress = rich(console) if console.is_terminal else plain(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()


def method_options(set_: list[str], effort: str | None) -> dict[str, Any]:
    """Hyper-parameters of the method; `--effort` is one of them with a flag of its own."""
    return _assignments(set_) | ({"effort": effort} if effort else {})


def _assignments(items: list[str]) -> dict[str, Any]:
    """``name=value`` pairs, values read as YAML scalars."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            message = f"--set takes name=value, got {quoted(item)}"
            raise UsageError(message)
        try:
            found[name] = parse_yaml(value, "the value")
        except DataError:
            message = f"--set {name} takes one number or word, got {quoted(value)}"
            raise UsageError(message) from None
    return found
