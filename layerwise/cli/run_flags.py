"""The options of a run, which ``prune`` and ``plan`` share, and what they ask for."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import typer

from layerwise.cli import options
from layerwise.cli.common import method_options, set_threads, typed_names
from layerwise.errors import UsageError
from layerwise.run.outputs.recipe import Recipe

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunFlags:
    """Values of the options, in the order of the help page."""

    model: options.AnyModel = None
    recipe: options.RecipeFile = None
    targets: options.Targets = None
    ignore: options.Ignore = None
    method: options.Method = "fista"
    sparsity: options.AnySparsity = None
    group: options.Group = "row"
    error_correction: options.ErrorCorrection = "block"
    damping: options.Damping = 0.01
    certify: options.Certify = None
    set_: options.Set = None
    effort: options.Effort = None
    pattern: options.Pattern = None
    keep_zeros: options.KeepZeros = None
    allocation: options.Allocation = None
    format: options.Format = None
    multiple: options.Multiple = None
    unit: options.FormerMultiple = None
    calibration: options.AnyCalibration = None
    n_sequences: options.Windows = 128
    sequence_length: options.WindowLength = None
    seed: options.Seed = 0
    bos: options.Bos = "auto"
    device: options.Device = "auto"
    threads: options.Threads = None
    workers: options.Workers = 1
    ray: options.Ray = None
    memory_budget: options.MemoryBudget = None
    activations: options.Activations = "auto"
    output: options.AnyOutput = None
    resume: options.Resume = True
    force: options.Force = False

    def recipe_with(self, typed: Collection[str]) -> Recipe:
        """Recipe of the run: what was typed wins over the recipe file."""
        given = {name: getattr(self, name) for name in Recipe.names() if name in typed}
        if self.unit is not None:
            if self.multiple not in (None, self.unit):
                message = (
                    f"--unit {self.unit} contradicts --multiple {self.multiple}: leave "
                    f"--unit out, it is the former name of --multiple"
                )
                raise UsageError(message)
            given["multiple"] = self.unit
        if chosen := method_options(self.set_ or [], self.effort):
            given["options"] = chosen
        read = self.recipe and Recipe.read(self.recipe).model_dump(exclude_unset=True)
        return Recipe.check({**(read or {}), **given}, "the command line")


@dataclass(frozen=True)
class RunRequest:
    """What a command line asks for.

    Parameters
    ----------
    command
        Name of the command.
    recipe
        What decides the result.
    flags
        All options; those of the machine and the output decide how and where.
    """

    command: str
    recipe: Recipe
    flags: RunFlags

    def needed(self, name: str, value: Value | None) -> Value:
        """Return the value of an option, which must be given."""
        if value is None:
            message = f"missing {name}; see `layerwise {self.command} --help`"
            raise UsageError(message)
        return value

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``prune_model`` and ``plan_run``, without the model."""
        flags = self.flags
        return {
            **self.recipe.arguments(),
            "device": flags.device,
            "memory_budget": flags.memory_budget,
            "activations": flags.activations,
            "workers": flags.workers,
            "ray": flags.ray,
            "output_dir": flags.output,
            "resume": flags.resume,
            "force": flags.force,
        }


def with_run_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a run; its first parameter is the request they make."""
    _, *own = inspect.signature(command).parameters.values()
    shared = inspect.signature(RunFlags).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    context = inspect.Parameter("context", kind, annotation=typer.Context)
    parameters = [context, *shared, *own]

    @wraps(command)
    def parsed(context: typer.Context, **values: Any) -> None:
        others = {parameter.name: values.pop(parameter.name) for parameter in own}
        flags = RunFlags(**values)
        recipe = flags.recipe_with(typed_names(context))
        set_threads(flags.threads, flags.workers)
        command(RunRequest(command.__name__, recipe, flags), **others)

    # typer reads the options from here
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {each.name: each.annotation for each in parameters}
    return parsed
