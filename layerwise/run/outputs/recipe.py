"""Recipes: the arguments of a run as a file, and methods with options from text.

A recipe is written into every output folder as ``recipe.yaml`` and can be given back with
``--recipe``; unknown keys are errors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from layerwise.configure import OptionValue
from layerwise.errors import DataError, UsageError, one_line, quoted
from layerwise.run.checkpoints.files import read_bytes
from layerwise.run.data.bos import BosMode
from layerwise.run.models.stock import OutputFormat
from layerwise.run.outputs.strict_yaml import LONGEST, parse_yaml
from layerwise.run.pipeline.task import ErrorCorrection


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# one entry may stand alone, as in `prune_model`
Entries = Annotated[list[str], BeforeValidator(_listed)]


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
    targets: Entries = Field(default_factory=lambda: ["Linear"])
    ignore: Entries = Field(default_factory=lambda: ["lm_head"])
    seed: int = 0
    bos: BosMode = "auto"
    damping: float = 0.01
    certify: bool | None = None
    options: dict[str, OptionValue] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe from a YAML file."""
        values = parse_yaml(_text_of(path), f"recipe {path}") or {}
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
                given = quoted(first["input"])
                message = f"{source}: {where}: {first['msg']}, got {given}"
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


def _text_of(path: Path) -> str:
    """Text of a recipe file, which must not be longer than a recipe can be."""
    if not path.exists():
        message = f"there is no recipe file {path}: correct the path"
        raise UsageError(message)
    try:
        return read_bytes(path, 4 * LONGEST).decode()
    except UnicodeDecodeError as error:
        message = f"cannot read recipe {path}: {one_line(error)}; check the file"
        raise DataError(message) from error
