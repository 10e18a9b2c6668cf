"""``layerwise bench``: stages of a prune, or a race of solvers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli.common import Device, Threads, set_threads
from layerwise.errors import UsageError


def bench(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="A random model instead: opt-125m, llama-7b, ...")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of the shape.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A solver or a chain; wanda by default.")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Fraction of zeros, or n:m.")] = "0.5",
    n_sequences: Annotated[int | None, typer.Option(help="Random token windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    error_correction: Annotated[
        str | None, typer.Option(help="none, sequential, block or full.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="A race instead: solvers and chains, with commas.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Of a race: random ones, 2048x2048,1024x4096.")
    ] = None,
    grams: Annotated[
        Path | None, typer.Option(help="Of a race: stored layers, a file or a folder.")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Of a race: ridge.")] = None,
    gap: Annotated[
        bool, typer.Option("--gap", help="Of a race: prove how far answers can be off.")
    ] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Of a race: file for all figures.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Of a race: picture, error against time.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Time the stages of a prune, or race solvers, next to what this machine could do."""
    of_race = {"layers": layers, "grams": grams, "damping": damping}
    of_prune = {
        "model": model,
        "blocks": blocks,
        "method": method,
        "n_sequences": n_sequences,
        "sequence_length": sequence_length,
        "error_correction": error_correction,
    }
    set_threads(threads)
    if methods is None:
        _refuse_given(of_race | {"gap": gap or None, "json": json_, "plot": plot}, "needs")
        _bench(_given(of_prune) | {"shape": shape, "sparsity": sparsity, "device": device})
    else:
        _refuse_given(of_prune, "does not go with")
        arguments = _given(of_race) | {"shape": shape, "sparsity": sparsity, "gap": gap}
        _race(methods, arguments | {"device": device}, json_, plot)


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


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _refuse_given(arguments: dict[str, Any], how: str) -> None:
    """Raise if a flag of the other kind of bench is given."""
    if given := sorted(_given(arguments)):
        name = "MODEL" if given[0] == "model" else f"--{given[0].replace('_', '-')}"
        message = f"{name} {how} --methods, which makes a bench a race of solvers"
        raise UsageError(message)
