"""``layerwise prune``: a model in, a pruned folder out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli.common import (
    Device,
    Force,
    Resume,
    Threads,
    method_options,
    progress_on,
    set_threads,
)
from layerwise.errors import UsageError


def prune(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A solver, or a chain such as wanda+least-squares.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Fraction of zeros (0.5), or n:m: keeps n of every m."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Count zeros per row or per layer (0.5 only).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="columns or heads: a smaller model.")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="optimal, uniform, ul-mm, al-mm, al-am (smaller models)."),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="stock, native or padded (the same).")
    ] = None,
    unit: Annotated[
        int | None, typer.Option(help="Widths are multiples of it (the same).")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="wikitext2, c4, FILE.txt or FILE.jsonl:field.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for the result.")] = None,
    n_sequences: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    error_correction: Annotated[
        str | None, typer.Option(help="none, sequential, block or full.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Class, module name or re:...; may repeat.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="The same, to leave out; may repeat.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration windows.")] = None,
    damping: Annotated[float | None, typer.Option(help="Relative ridge.")] = None,
    certify: Annotated[
        bool | None,
        typer.Option(help="Bound the distance from the best mask and weights."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter name=value.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, balanced or thorough, for best.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with these arguments; flags win.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    memory_budget: Annotated[int | None, typer.Option(help="Bytes for refits.")] = None,
    activations: Annotated[
        str, typer.Option(help="Kept in memory, on disk, or auto: where there is room.")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Blocks that are pruned side by side.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Workers on Ray: local, or the address of a cluster.")
    ] = None,
    resume: Resume = True,
    force: Force = False,
) -> None:
    """Prune a model and write a folder that stock transformers opens."""
    from layerwise.run.outputs.recipe import Recipe

    given = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "group": group,
        "pattern": pattern,
        "allocation": allocation,
        "format": format_,
        "unit": unit,
        "calibration": calibration,
        "n_sequences": n_sequences,
        "sequence_length": sequence_length,
        "error_correction": error_correction,
        "targets": targets or None,
        "ignore": ignore or None,
        "seed": seed,
        "damping": damping,
        "certify": certify,
        "options": method_options(set_ or [], effort) or None,
    }
    flags = {name: value for name, value in given.items() if value is not None}
    base = Recipe.read(recipe).model_dump(exclude_unset=True) if recipe else {}
    arguments = Recipe.check({**base, **flags}, "the command line")
    set_threads(threads, workers)
    machine = {
        "device": device,
        "memory_budget": memory_budget,
        "activations": activations,
        "workers": workers,
        "ray": ray,
        "resume": resume,
        "force": force,
    }
    _prune(arguments, output, machine)


def _prune(recipe: Any, output: Path | None, machine: dict[str, Any]) -> None:
    """Run a recipe; `machine` is how and where, which does not decide the result."""
    for name, value in (
        ("MODEL", recipe.model),
        ("--sparsity", recipe.sparsity),
        ("--calibration", recipe.calibration),
        ("--output", output),
    ):
        if value is None:
            message = f"missing {name}; see `layerwise prune --help`"
            raise UsageError(message)
    from layerwise.reports.progress import PlainProgress, RichProgress
    from layerwise.run.prune import prune_model
    from layerwise.run.workers.ranks import RankEnvironment

    with progress_on(PlainProgress, RichProgress) as progress:
        report = prune_model(
            recipe.model,
            **recipe.arguments(),
            output_dir=output,
            **machine,
            callbacks=(progress,),
        )
    assert report.output_dir is not None
    if RankEnvironment.read().rank == 0:
        _write_run_report(report.output_dir)


def _write_run_report(folder: Path) -> None:
    """report.html beside the manifest, if the plots can be drawn."""
    from layerwise.reports.report import run_page, write_report

    try:
        write_report(folder / "layerwise" / "report.html", run_page(folder))
    except UsageError as error:
        typer.echo(f"report.html was not written: {error}", err=True)
