"""``layerwise bench``: stages of a prune, or a race of solvers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options
from layerwise.cli.common import check_file, set_threads, typed_names
from layerwise.cli.options import MODEL, RACE, option, window_length
from layerwise.errors import UsageError

OF_PRUNE = (
    "model",
    "blocks",
    "method",
    "n_sequences",
    "sequence_length",
    "error_correction",
)
OF_RACE = ("layers", "grams", "damping", "gap", "json_", "plot")


def bench(
    context: typer.Context,
    model: options.AnyModel = None,
    shape: Annotated[
        str | None,
        option(MODEL, "NAME", "A random model of this shape: opt-125m, llama-7b, ..."),
    ] = None,
    blocks: Annotated[
        int | None, option(MODEL, "N", "Blocks of the shape.", default="all")
    ] = None,
    method: options.Method = "wanda",
    sparsity: options.Sparsity = "0.5",
    error_correction: options.ErrorCorrection = "block",
    damping: options.Damping = 0.01,
    n_sequences: options.Windows = 16,
    sequence_length: Annotated[int | None, window_length(512)] = None,
    methods: Annotated[
        str | None, option(RACE, "NAMES", "Solvers and chains, with commas: race them.")
    ] = None,
    layers: Annotated[
        str | None, option(RACE, "SIZES", "Random layers: 2048x2048,1024x4096.")
    ] = None,
    grams: Annotated[
        Path | None, option(RACE, "PATH", "Stored layers: a file or a folder.")
    ] = None,
    gap: Annotated[
        bool, option(RACE, None, "Prove how far each answer is from the best.", "--gap")
    ] = False,
    plot: Annotated[
        Path | None, option(RACE, "FILE", "Picture of error against time.")
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json_: options.Json = None,
) -> None:
    """Time the stages of a prune, or race several solvers.

    --methods makes it a race on single layers; --damping and --json are for races only.
    """
    typed = typed_names(context)
    check_file("--json", json_)
    check_file("--plot", plot)
    set_threads(threads)
    arguments = {"shape": shape, "sparsity": sparsity, "device": device}
    if methods is None:
        _refuse_typed(typed.intersection(OF_RACE), "needs")
        of_prune = {name: context.params[name] for name in OF_PRUNE}
        _bench(arguments | of_prune)
    else:
        _refuse_typed(typed.intersection(OF_PRUNE), "does not go with")
        of_race = {"layers": layers, "grams": grams, "damping": damping, "gap": gap}
        _race(methods, arguments | of_race, json_, plot)


def _bench(arguments: dict[str, Any]) -> None:
    from layerwise.reports.tables import print_bench
    from layerwise.timing.bench import bench as measure

    print_bench(measure(**arguments))


def _race(
    methods: str, arguments: dict[str, Any], json_: Path | None, plot: Path | None
) -> None:
    from layerwise.reports.curves import check_picture, draw_race
    from layerwise.reports.tables import print_race
    from layerwise.timing.race import race

    if plot is not None:
        check_picture(plot)
    found = race(methods, **arguments)
    print_race(found)
    if json_ is not None:
        found.write(json_)
    if plot is not None:
        draw_race(found, plot)


def _refuse_typed(names: set[str], how: str) -> None:
    """Raise if there is an option of the other kind of bench."""
    if names:
        first = min(names)
        name = "MODEL" if first == "model" else f"--{first.strip('_').replace('_', '-')}"
        message = f"{name} {how} --methods, which makes a bench a race of solvers"
        raise UsageError(message)
