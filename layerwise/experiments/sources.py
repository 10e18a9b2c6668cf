"""Hash of source code, so that results of older code are not mistaken for new ones.

A version number changes at a release; the code changes between releases. The hash covers
the named modules and every module of layerwise that they import. Docstrings, comments and
layout do not count. ``__init__`` files do not count either, since they are only lists: a
new solver does not invalidate the results of the others.
"""

import ast
import hashlib
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from layerwise.solve import Chain, resolve
from layerwise.solvers import SOLVERS

PACKAGE = "layerwise"
ROOT = Path(__file__).parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_identity(method: str | None, modules: Iterable[str]) -> dict[str, Any]:
    """Plain values that, with the input, decide the result of a method.

    Parameters
    ----------
    method
        Name of a solver, or names joined by ``+``; None for code without a solver.
    modules
        Modules that use the method.
    """
    names = set(modules)
    steps: tuple[Any, ...] = ()
    if method is not None:
        solver = resolve(method)
        steps = solver.steps if isinstance(solver, Chain) else (solver,)
        names |= {type(step).__module__ for step in steps}
        names |= {SOLVERS[name].__module__ for name in method.split("+")}
    return {
        "method": [repr(step) for step in steps],  # with every hyper-parameter
        "sources": _hash_once(frozenset(names)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


@cache
def _hash_once(modules: frozenset[str]) -> str:
    return source_hash(modules)


def source_hash(modules: Iterable[str], root: Path = ROOT) -> str:
    """Hash of modules (dotted names) and of all modules of layerwise that they import.

    Parameters
    ----------
    modules
        Names such as ``"layerwise.solvers.wanda"``; names outside layerwise are ignored.
    root
        Folder of the package.
    """
    seen: dict[str, str] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        path = _path(name, root)
        if name in seen or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        pending += _imported(tree)
        _strip(tree)
        seen[name] = ast.dump(tree)
    text = "\n".join(f"{name} {seen[name]}" for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()


def _path(name: str, root: Path) -> Path | None:
    """File of a module of layerwise; None for packages and for names inside a module."""
    package, *parts = name.split(".")
    if package != PACKAGE or not parts:
        return None
    path = root.joinpath(*parts).with_suffix(".py")
    return path if path.is_file() else None


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names that might be modules, from imports anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _strip(tree: ast.Module) -> None:
    """Remove docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
