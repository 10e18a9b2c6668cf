"""``layerwise calibrate`` and ``layerwise solve``: one pass of the model, many solves."""

from pathlib import Path
from typing import Annotated

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


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    calibration: Annotated[
        str, typer.Option(help="wikitext2, c4, FILE.txt or FILE.jsonl:field.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for grams and weights.")],
    n_sequences: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Class, module name or re:...; may repeat.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="The same, to leave out; may repeat.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration windows.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = True,
    force: Force = False,
) -> None:
    """Store the layer problems of a dense model, to solve them without it."""
    from layerwise.grams.collect_grams import collect_grams

    set_threads(threads)
    done = 0

    def on_stage(name: str, width: int) -> None:
        nonlocal done
        done += 1
        typer.echo(f"[{done}]  {name}  {width} inputs", err=True)

    chosen = {
        name: entries
        for name, entries in (("targets", targets), ("ignore", ignore))
        if entries
    }
    manifest = collect_grams(
        model,
        output,
        calibration=calibration,
        n_sequences=n_sequences,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        resume=resume,
        force=force,
        on_start=lambda count: typer.echo(f"storing {count} files of grams", err=True),
        on_stage=on_stage,
        **chosen,
    )
    typer.echo(f"wrote {output}: {len(list(manifest.layers()))} layers")


def solve(
    grams: Annotated[Path, typer.Argument(help="Folder of `layerwise calibrate`.")],
    method: Annotated[list[str], typer.Option(help="A solver or a chain; may repeat.")],
    sparsity: Annotated[
        list[str], typer.Option(help="Fraction of zeros, or n:m; may repeat.")
    ],
    group: Annotated[str, typer.Option(help="Count zeros per row or per layer.")] = "row",
    damping: Annotated[float, typer.Option(help="Relative ridge.")] = 0.01,
    certify: Annotated[
        bool | None,
        typer.Option(help="Bound the distance from the best mask and weights."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Hyper-parameter name=value of all that have it."),
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, balanced or thorough, for best.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="File for the figures of all layers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the weights of one method.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its checkpoint: OUTPUT becomes a pruned copy.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the layers.")] = 1,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of each worker.")] = None,
    memory_budget: Annotated[int | None, typer.Option(help="Bytes for refits.")] = None,
    resume: Resume = True,
    force: Force = False,
) -> None:
    """Prune stored layers by methods and sparsities, without model and data."""
    from layerwise.grams.solve_grams import solve_grams
    from layerwise.reports.progress import PlainProgress, RichProgress
    from layerwise.reports.tables import print_sweep

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
        )
    print_sweep(sweep)
    if json_ is not None:
        sweep.write(json_)
    if output is not None:
        typer.echo(f"wrote {output}")
