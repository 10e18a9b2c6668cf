"""``layerwise calibrate`` and ``layerwise solve``: one pass of the model, many solves."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli import options
from layerwise.cli.common import check_file, method_options, progress_on, set_threads
from layerwise.cli.options import MODEL, argument, option


def calibrate(
    model: options.Model,
    calibration: options.Calibration,
    output: options.Output,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    n_sequences: options.Windows = 128,
    sequence_length: options.WindowLength = None,
    seed: options.Seed = 0,
    bos: options.Bos = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    resume: options.Resume = True,
    force: options.Force = False,
) -> None:
    """Store the layer problems of a model, to solve them later."""
    from layerwise.grams.collect_grams import collect_grams
    from layerwise.reports.lines import Lines
    from layerwise.reports.progress import StageCounter

    set_threads(threads)
    chosen = {
        name: entries
        for name, entries in (("targets", targets), ("ignore", ignore))
        if entries
    }
    with Lines(sys.stderr) as lines:
        counter = StageCounter(lines)
        manifest = collect_grams(
            model,
            output,
            calibration=calibration,
            n_sequences=n_sequences,
            sequence_length=sequence_length,
            seed=seed,
            bos=bos,
            device=device,
            resume=resume,
            force=force,
            on_note=lines.write,
            on_start=counter.on_start,
            on_stage=counter.on_stage,
            on_left=counter.on_left,
            on_status=lines.now,
            **chosen,
        )
    typer.echo(f"wrote {output}: {len(list(manifest.layers()))} layers")


def solve(
    grams: Annotated[Path, argument("GRAMS", "Folder written by `layerwise calibrate`.")],
    method: options.Methods,
    sparsity: options.Sparsities,
    group: options.Group = "row",
    damping: options.Damping = 0.01,
    certify: options.Certify = None,
    set_: options.Set = None,
    effort: options.Effort = None,
    model: Annotated[
        str | None,
        option(MODEL, "MODEL", "The model of these layers: writes a pruned copy of it."),
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    workers: options.Workers = 1,
    memory_budget: options.MemoryBudget = None,
    output: options.AnyOutput = None,
    json_: options.Json = None,
    resume: options.Resume = True,
    force: options.Force = False,
) -> None:
    """Prune stored layers by several methods, and compare them.

    --method and --sparsity may repeat; --set is for all methods that have the option.
    --output takes one method and one sparsity.
    """
    from layerwise.grams.solve_grams import solve_grams
    from layerwise.reports.progress import PlainProgress, RichProgress
    from layerwise.reports.tables import print_sweep

    check_file("--json", json_)
    if workers == 1:
        set_threads(threads)
    with progress_on(PlainProgress, RichProgress) as progress:
        sweep = solve_grams(
            grams,
            method,
            sparsity,
            group=group,
            damping=damping,
            options=method_options(set_ or [], effort),
            certify=certify,
            memory_budget=memory_budget,
            device=device,
            workers=workers,
            threads=threads,
            output_dir=output,
            model=model,
            resume=resume,
            force=force,
            on_start=progress.on_start,
            on_layer=progress.on_layer,
            on_note=progress.on_note,
            on_status=progress.on_status,
            on_left=progress.on_left,
        )
    print_sweep(sweep)
    if json_ is not None:
        sweep.write(json_)
    if output is not None:
        typer.echo(f"wrote {output}")
