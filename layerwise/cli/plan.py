"""``layerwise plan``: what a prune would do and take, before it touches a weight."""

from layerwise.cli.common import check_file, saying_steps
from layerwise.cli.options import Json
from layerwise.cli.run_flags import RunRequest, with_run_flags


@with_run_flags
def plan(run: RunRequest, json_: Json = None) -> None:
    """Say what a prune would do, and what it would need.

    Takes the options of `layerwise prune`; --calibration and --output may be left out. It
    reads no weight and no text, and writes nothing but the file of --json.
    """
    check_file("--json", json_)
    model = run.needed("MODEL", run.recipe.model)
    run.needed("--sparsity", run.recipe.sparsity)
    from layerwise.planning.plan import plan_run
    from layerwise.reports.plan_text import print_plan

    with saying_steps():
        found = plan_run(model, **run.arguments())
    print_plan(found)
    if json_ is not None:
        found.write(json_)
    found.check()
