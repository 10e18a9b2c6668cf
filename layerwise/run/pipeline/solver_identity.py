"""Identity of users' own solvers: an unfinished run continues only with the same one.

A solver of layerwise is described by its name and options. An object of somebody else may
have a `fingerprint`, a text or a method that returns one. Without it, its identity is a
hash of its attributes and of the compiled code of its classes, with the functions and
constants of their module that this code names. With an attribute that cannot be described,
such as a generator of PyTorch, the identity is unknown, and no run is continued.
"""

import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from typing import Any

from torch import Tensor

from layerwise.errors import UsageError
from layerwise.run.checkpoints.hashes import bytes_sha256, tensor_hashes
from layerwise.solve import steps_of
from layerwise.solver import Solver

ENTRY, UNKNOWN = "state or code of the solver", "unknown"
PLAIN = (type(None), bool, int, float, complex, str, bytes)
PARTS = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")
# packages for whose code their versions, or that of Python, stand in a fingerprint
VERSIONED = sys.stdlib_module_names | {"torch", "numpy", "layerwise"}
Seen = dict[int, Any]  # objects that are described already, by their id


class Indescribable(Exception):
    """A value has no description that is the same in another process."""


def own_solver(solver: Solver) -> dict[str, str]:
    """Entry of a fingerprint for users' own objects in a solver; empty if it has none.

    Raises
    ------
    UsageError
        A fingerprint is not a text.
    """
    steps = (getattr(step, "own", step) for step in steps_of(solver))
    own = [step for step in steps if not _is_ours(type(step))]
    if not own:
        return {}
    try:
        text = "\n".join(map(_identity, own))
    except (Indescribable, RecursionError):
        return {ENTRY: UNKNOWN}
    return {ENTRY: bytes_sha256(text.encode(errors="surrogatepass"))}


def _identity(step: Any) -> str:
    given = getattr(step, "fingerprint", None)
    if given is not None:
        text = given() if callable(given) else given
        if not isinstance(text, str) or not text:
            message = (
                f"the fingerprint of {type(step).__name__} is {text!r}: give a text that "
                f"says everything that decides its answers"
            )
            raise UsageError(message)
        return text
    return "\n".join(_describe(step, {}))


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "layerwise"


def _describe(value: Any, seen: Seen) -> Iterator[str]:
    """Lines that are the same for equal values, in every process."""
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {tensor_hashes([('', value)])['']}"
    elif hasattr(value, "__array_interface__"):
        yield f"{value.dtype} {value.shape} {bytes_sha256(value.tobytes())}"
    elif isinstance(value, os.PathLike | Enum | types.ModuleType):
        yield str(value)
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _describe(pair, seen)
    elif isinstance(value, Set):
        yield from sorted("\n".join(_describe(item, seen)) for item in value)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _describe(item, seen)
    elif isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif id(value) not in seen:  # else it is the same object again, or contains itself
        seen[id(value)] = value
        yield from _object(value, seen)


def _object(value: Any, seen: Seen) -> Iterator[str]:
    """Describe what an object does and holds."""
    if isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _describe((value.__func__, value.__self__), seen)
    elif isinstance(value, types.BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, partial):
        yield from _describe((value.func, value.args, value.keywords), seen)
    elif isinstance(value, property | staticmethod | classmethod):
        wrapped = getattr(value, "fget", None) or getattr(value, "__func__", None)
        yield from _describe(wrapped, seen)
    elif isinstance(value, type):
        yield from _class(value, seen)
    elif hasattr(value, "getstate"):  # a generator of Python
        yield from _describe(value.getstate(), seen)
    elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
        yield from _describe(type(value), seen)
        slots = [slot for kind in type(value).__mro__ for slot in _slots(kind)]
        named = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
        yield from _describe({**named, **getattr(value, "__dict__", {})}, seen)
    elif " at 0x" in repr(value):
        raise Indescribable(repr(value))
    else:
        yield repr(value)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _class(kind: type, seen: Seen) -> Iterator[str]:
    """Code and constants of the classes that a user wrote; names of all others."""
    for base in kind.__mro__:
        yield f"{base.__module__}.{base.__qualname__}"
        if base.__module__.partition(".")[0] in VERSIONED:
            continue
        for name, item in sorted(vars(base).items()):
            if name not in PARTS and not isinstance(item, types.MemberDescriptorType):
                yield name
                yield from _named(item, seen)


def _function(function: types.FunctionType, seen: Seen) -> Iterator[str]:
    """Code of a function, its defaults, its closure, and what it uses of its module."""
    yield from _code(function.__code__, seen)
    yield from _named((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        yield from _named(_content(cell), seen)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            value = function.__globals__[name]
            module = getattr(value, "__module__", function.__module__)
            if module == function.__module__:
                yield from _named(value, seen)


def _named(value: Any, seen: Seen) -> Iterator[str]:
    """Describe what code refers to; its type stands for what cannot be described."""
    try:
        yield "\n".join(list(_describe(value, seen)))
    except Indescribable:
        yield type(value).__qualname__


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None


def _code(code: types.CodeType, seen: Seen) -> Iterator[str]:
    yield code.co_code.hex()
    yield " ".join((*code.co_names, *code.co_varnames))
    for constant in code.co_consts:
        yield from _describe(constant, seen)


def _names(code: types.CodeType) -> set[str]:
    """Global names in a code and in the functions inside it."""
    inside = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*(_names(one) for one in inside))
