"""``layerwise prune``: a model in, a pruned folder out."""

from pathlib import Path

import typer

from layerwise.cli.common import progress_on, saying_steps
from layerwise.cli.run_flags import RunRequest, with_run_flags
from layerwise.errors import UsageError


@with_run_flags
def prune(run: RunRequest) -> None:
    """Prune a model; write a folder that transformers can open.

    MODEL, --sparsity and --calibration must be given here or in --recipe, and --output
    here. `layerwise plan` takes the same options and says what such a run needs.
    """
    model = run.needed("MODEL", run.recipe.model)
    run.needed("--sparsity", run.recipe.sparsity)
    run.needed("--calibration", run.recipe.calibration)
    output = run.needed("--output", run.flags.output)
    from layerwise.reports.progress import PlainProgress, RichProgress
    from layerwise.run.prune import prune_model
    from layerwise.run.workers.ranks import RankEnvironment

    with progress_on(PlainProgress, RichProgress) as progress:
        prune_model(model, **run.arguments(), callbacks=(progress,))
    if RankEnvironment.read().rank == 0:
        _write_run_report(output)


def _write_run_report(folder: Path) -> None:
    """report.html beside the manifest, if the plots can be drawn."""
    from layerwise.reports.report import run_page, write_report
    from layerwise.run.steps import status

    try:
        with saying_steps():
            status("writing report.html")
            write_report(folder / "layerwise" / "report.html", run_page(folder))
    except UsageError as error:
        typer.echo(f"report.html was not written: {error}", err=True)
