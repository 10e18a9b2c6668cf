"""``layerwise demo``: the packaged models, pruned and compared."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options
from layerwise.errors import DataError


def demo(
    everything: Annotated[
        bool, typer.Option("--all", help="Every solver on every packaged model.")
    ] = False,
    output: options.Output = Path("demo-output"),
) -> None:
    """Prune a small packaged model by several methods.

    Prints a table, and writes it to report.html in the folder of `--output`.
    `--all` takes minutes; what it has finished is kept in the folder and not repeated.
    """
    from layerwise.experiments.demo import (
        MAIN_METHODS,
        RESULTS,
        all_methods,
        compare,
        demo_models,
    )
    from layerwise.experiments.results import ResultStore
    from layerwise.reports.report import comparison_page, write_report
    from layerwise.reports.tables import print_comparison

    models = demo_models(everything)
    methods = all_methods() if everything else MAIN_METHODS
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create {output}: {error.strerror}; choose another --output"
        raise DataError(message) from error
    typer.echo(f"pruning {', '.join(models)} by {len(methods)} methods at 0.5 and 2:4")
    store = ResultStore(output / RESULTS if everything else None)
    if len(store):
        typer.echo(f"continuing {output / RESULTS}; delete it to compute all of it again")

    def progress(result: Any, dense: float) -> None:
        typer.echo(
            f"  {result.model:6} {result.pattern:4} {result.method:20} perplexity "
            f"{dense:.3f} -> {result.perplexity:.3f}  relative error "
            f"{result.mean_relative_error:.4f}  {result.seconds:.1f} s"
        )

    comparison = compare(models, methods, on_result=progress, store=store)
    for refusal in comparison.refused:
        asked = refusal.experiment
        typer.echo(
            f"  {asked.model} {asked.pattern} {asked.method}: not done, {refusal.reason}"
        )
    print_comparison(comparison)
    command = "layerwise demo --all" if everything else "layerwise demo"
    path = output / "report.html"
    write_report(
        path, comparison_page(comparison.results, comparison.dense_perplexity, command)
    )
    typer.echo(f"wrote {path}")
