"""A Ray on this machine that only the program that started it can use.

The servers of Ray run any code that is sent to them. So this Ray listens on the loopback
address, asks for a token that is made here, and keeps its files in a folder of its own.
The token is in the environment of its processes and in no file.
"""

import importlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.errors import WorkerError, one_line

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on Linux too


@contextmanager
def private_ray() -> Iterator[dict[str, Any]]:
    """Give arguments for ``ray.init``, and the environment that it needs, to the context.

    What the user has set, such as ``RAY_AUTH_MODE=disabled``, holds again afterwards.

    Raises
    ------
    WorkerError
        The folder for temporary files cannot be used, or Ray has changed inside.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _temporary_folder() as folder, _environment(token | LOOPBACK_ONLY):
        yield {"_temp_dir": str(folder), "include_dashboard": False}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """New path that nobody else can reach; it is short, as it will hold sockets."""
    place = os.environ.get("RAY_TMPDIR", "/tmp" if sys.platform == "darwin" else None)
    try:
        folder = tempfile.mkdtemp(prefix="ray-", dir=place)
    except OSError as error:
        message = f"Ray cannot keep its files: {one_line(error)}; change RAY_TMPDIR"
        raise WorkerError(message) from error
    try:
        yield Path(folder) / "files"  # which Ray opens to everyone
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that Ray and its processes see inside the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _read_again()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Let Ray read the environment, which it did once, when it was imported."""
    constants: Any = importlib.import_module("ray._private.ray_constants")
    raylet: Any = importlib.import_module("ray._raylet")
    try:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        constants.ENABLE_RAY_CLUSTER = constants.env_bool(
            constants.ENABLE_RAY_CLUSTERS_ENV_VAR, sys.platform == "linux"
        )
    except AttributeError as error:
        message = (
            f"a local Ray of this version cannot be kept private ({one_line(error)}): "
            f"install another version, or use --workers without --ray"
        )
        raise WorkerError(message) from error
