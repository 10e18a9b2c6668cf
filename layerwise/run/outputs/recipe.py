"""Recipes: the arguments of a run as a file, and methods with options from text.

A recipe is written into every output folder as ``recipe.yaml`` and can be given back with
``--recipe``; unknown keys are errors.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from layerwise.errors import DataError, UsageError
from layerwise.run.pipeline import ErrorCorrection
from layerwise.run.smaller.structure import Kind, OutputFormat
from layerwise.solve import Chain, resolve, solver_name

OptionValue = bool | int | float | str


class _Loader(yaml.SafeLoader):
    """YAML in which ``2:4`` is text; elsewhere it is 124, a number to base 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the class above declares it
        first: [
            (tag, re.compile(rf"(?!.*:){expression.pattern}", expression.flags))
            if tag.endswith((":int", ":float"))
            else (tag, expression)
            for tag, expression in resolvers
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Recipe(BaseModel):
    """Arguments of a run that decide its result; names as in ``prune_model``."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    method: str = "fista"
    sparsity: float | str | None = None
    group: Literal["row", "layer"] = "row"
    pattern: Kind | None = None
    allocation: str | None = None
    format: OutputFormat | None = None
    unit: int | None = None
    calibration: str | None = None
    n_sequences: int = 128
    sequence_length: int | None = None
    error_correction: ErrorCorrection = "block"
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    seed: int = 0
    damping: float = 0.01
    certify: bool | None = None
    options: dict[str, OptionValue] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Recipe from a YAML file."""
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        except FileNotFoundError:
            message = f"no recipe file {path}"
            raise UsageError(message) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            message = f"cannot read recipe {path}: {' '.join(str(error).split())}"
            raise DataError(message) from error
        if not isinstance(values, dict):
            message = f"recipe {path} is no mapping of names to values"
            raise UsageError(message)
        return cls.check(values, f"recipe {path}")

    @classmethod
    def check(cls, values: Mapping[str, Any], source: str) -> "Recipe":
        """Validate values; errors name the field and the source."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                message = (
                    f"{source}: unknown name {where!r}; known: {', '.join(cls.names())}"
                )
            else:
                message = f"{source}: {where}: {first['msg']}, got {first['input']!r}"
            raise UsageError(message) from None

    @classmethod
    def names(cls) -> list[str]:
        """Names that a recipe may hold."""
        return list(cls.model_fields)

    def to_yaml(self) -> str:
        """YAML text of everything that is set."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)


def configure(method: Any, options: Mapping[str, OptionValue]) -> Any:
    """Solver for a method name, a chain of names or an object, with options applied.

    Parameters
    ----------
    method
        A name, names joined by ``+``, or a solver.
    options
        Hyper-parameters by field name; in a chain ``step.field`` addresses one step.

    Raises
    ------
    UsageError
        If a name is unknown or a value has the wrong type.
    """
    solver = resolve(method)
    for name, value in options.items():
        step, _, field = name.rpartition(".")
        solver, hits = _apply(solver, step, field, value)
        if not hits:
            known = ", ".join(_fields(solver)) or "none"
            message = f"{solver_name(solver)} has no option {name!r}; it has: {known}"
            raise UsageError(message)
    return solver


def takes_option(method: Any, name: str) -> bool:
    """Whether :func:`configure` could apply an option of this name to a method."""
    solver = resolve(method)
    if isinstance(solver, Chain):
        return any(takes_option(step, name) for step in solver.steps)
    step, _, field = name.rpartition(".")
    return step in ("", solver_name(solver)) and field in _fields(solver)


def with_memory_budget(solver: Any, budget: int) -> Any:
    """Give the budget to every step that builds systems in memory; others need none."""
    return _apply(solver, "", "memory_budget", budget)[0]


def with_warm_start(solver: Any, method: str, start: str) -> Any:
    """Name the warm start of every step of a method that leaves it open."""
    if isinstance(solver, Chain):
        steps = tuple(with_warm_start(step, method, start) for step in solver.steps)
        return dataclasses.replace(solver, steps=steps)
    is_open = solver_name(solver) == method and getattr(solver, "warm_start", "") is None
    return _apply(solver, "", "warm_start", start)[0] if is_open else solver


def _apply(solver: Any, step: str, field: str, value: OptionValue) -> tuple[Any, int]:
    if isinstance(solver, Chain):
        results = [_apply(part, step, field, value) for part in solver.steps]
        steps = tuple(part for part, _ in results)
        return dataclasses.replace(solver, steps=steps), sum(hits for _, hits in results)
    if not takes_option(solver, f"{step}.{field}" if step else field):
        return solver, 0
    return dataclasses.replace(solver, **{field: _checked(solver, field, value)}), 1


def _checked(solver: Any, field: str, value: OptionValue) -> Any:
    """Value of the type that the solver declares; YAML takes ``1e-4`` for text."""
    hint = get_type_hints(type(solver))[field]
    try:
        if isinstance(value, bool) and hint is not bool:
            message = f"option {field} of {solver_name(solver)} is no switch, got {value!r}"
            raise UsageError(message)
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        message = f"option {field} of {solver_name(solver)}: {reason}, got {value!r}"
        raise UsageError(message) from None


def _fields(solver: Any) -> list[str]:
    if isinstance(solver, Chain):
        return [
            f"{solver_name(part)}.{name}" for part in solver.steps for name in _fields(part)
        ]
    if not dataclasses.is_dataclass(solver):
        return []
    return [field.name for field in dataclasses.fields(solver) if field.name != "name"]


def options_of(solver: Any) -> dict[str, OptionValue]:
    """Options that differ from the solver's defaults, as :func:`configure` takes them."""
    if isinstance(solver, Chain):
        return {
            f"{solver_name(part)}.{name}": value
            for part in solver.steps
            for name, value in options_of(part).items()
        }
    try:
        default = resolve(solver_name(solver))
    except UsageError:  # a user's own: whatever can be told
        default = None
    return {
        name: getattr(solver, name)
        for name in _fields(solver)
        if getattr(solver, name) != getattr(default, name, None)
        and isinstance(getattr(solver, name), OptionValue)
    }
