"""``layerwise plan``: what a prune would do and take, before it touches a weight."""

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.common import Device, Threads, method_options, set_threads
from layerwise.errors import UsageError


def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the hub.")],
    sparsity: Annotated[
        str | None,
        typer.Option(help="Fraction of zeros (0.5), or n:m: keeps n of every m."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="A solver, or a chain such as wanda+least-squares.")
    ] = "fista",
    group: Annotated[
        str, typer.Option(help="Count zeros per row or per layer (0.5 only).")
    ] = "row",
    n_sequences: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    error_correction: Annotated[
        str, typer.Option(help="none, sequential, block or full.")
    ] = "block",
    targets: Annotated[
        list[str] | None, typer.Option(help="Class, module name or re:...; may repeat.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="The same, to leave out; may repeat.")
    ] = None,
    certify: Annotated[
        bool | None, typer.Option(help="With proofs of the distance from the best.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter name=value.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, balanced or thorough, for best.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="auto, memory or disk: hidden states between blocks.")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that prune at a time.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Where the result would go, for its free space.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    memory_budget: Annotated[int | None, typer.Option(help="Bytes for refits.")] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="File for all figures.")
    ] = None,
) -> None:
    """Say what a prune would do and take: layers, memory, disk, time. Reads no weight."""
    if sparsity is None:
        message = "missing --sparsity; see `layerwise plan --help`"
        raise UsageError(message)
    from layerwise.planning.plan import plan_run
    from layerwise.reports.plan_text import print_plan

    set_threads(threads, workers)
    found = plan_run(
        model,
        method,
        sparsity,
        group=group,
        n_sequences=n_sequences,
        sequence_length=sequence_length,
        error_correction=error_correction,
        targets=targets or "Linear",
        ignore=("lm_head",) if ignore is None else ignore,
        certify=certify,
        options=method_options(set_ or [], effort),
        activations=activations,
        workers=workers,
        device=device,
        memory_budget=memory_budget,
        output_dir=output,
    )
    print_plan(found)
    if json_ is not None:
        found.write(json_)
    found.check()
