"""Recipes: the arguments of a run as a file, and methods with options from text.

A recipe is written into every output folder as ``recipe.yaml`` and can be given back with
``--recipe``; unknown keys are errors.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from layerwise.configure import OptionValue
from layerwise.errors import DataError, UsageError
from layerwise.run.data.bos import BosMode
from layerwise.run.models.stock import OutputFormat
from layerwise.run.pipeline.task import ErrorCorrection


class _Loader(yaml.SafeLoader):
    """YAML in which ``2:4`` is text; by default it is 124, a number to base 60."""

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
    pattern: str | None = None
    keep_zeros: bool | None = None
    allocation: str | None = None
    format: OutputFormat | None = None
    multiple: int | None = Field(
        default=None, validation_alias=AliasChoices("multiple", "unit")
    )  # `unit` is its name of version 0.1
    calibration: str | None = None
    n_sequences: int = 128
    sequence_length: int | None = None
    error_correction: ErrorCorrection = "block"
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    seed: int = 0
    bos: BosMode = "auto"
    damping: float = 0.01
    certify: bool | None = None
    options: dict[str, OptionValue] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe from a YAML file."""
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        except FileNotFoundError:
            message = f"there is no recipe file {path}: correct the path"
            raise UsageError(message) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            message = f"cannot read recipe {path}: {' '.join(str(error).split())}"
            raise DataError(message) from error
        if not isinstance(values, dict):
            message = f"recipe {path} is not a mapping: write lines NAME: VALUE"
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

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``prune_model`` that repeat the run, without the model."""
        return self.model_dump(exclude={"model"})

    def to_yaml(self) -> str:
        """YAML text of everything that is set."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)
