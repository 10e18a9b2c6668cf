"""Commands that look and change nothing: evaluate, verify, report, solvers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options
from layerwise.errors import DataError, UsageError, VerificationError
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model


def evaluate(
    model: options.Model,
    dataset: Annotated[
        str | None, typer.Option(help="wikitext2, c4, FILE.txt, FILE.jsonl:field.")
    ] = None,
    sequence_length: options.WindowLength = None,
    device: options.Device = "auto",
    speed: Annotated[
        bool, typer.Option("--speed", help="Size, memory, latency and tokens per second.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="Another model, measured in turns with this one.")
    ] = None,
) -> None:
    """Measure the perplexity, the size and the speed of a model."""
    from layerwise.run.settings import choose_device

    if dataset is None and not speed:
        message = "nothing to evaluate: give --dataset, --speed, or both"
        raise UsageError(message)
    if compare is not None and not speed:
        message = "--compare compares speeds: give --speed as well"
        raise UsageError(message)
    chosen = choose_device(device)
    checkpoint, network = _load(model, chosen)
    if dataset is not None:
        _perplexity(model, checkpoint, network, dataset, sequence_length)
    if speed:
        _speed(model, network, compare, chosen)


def _load(model: str, device: Any) -> tuple[Any, Any]:
    """Checkpoint and its model on a device."""
    from layerwise.run.checkpoints.storage import Checkpoint

    checkpoint = Checkpoint.open(model)
    return checkpoint, load_model(checkpoint, device)


def _perplexity(
    model: str, checkpoint: Any, network: Any, dataset: str, sequence_length: int | None
) -> None:
    from layerwise.run.data.calibration import evaluation_text
    from layerwise.run.data.perplexity import perplexity
    from layerwise.run.data.tokens import encode
    from layerwise.run.models.architecture import embedding_rows
    from layerwise.run.settings import CalibrationData

    length = CalibrationData(None, sequence_length=sequence_length).length_for(network)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        message = f"{model} has no tokenizer, which a text needs"
        raise DataError(message)
    tokens = encode(evaluation_text(dataset), tokenizer, embedding_rows(network))
    value = perplexity(network, tokens, sequence_length=length)
    windows = len(tokens) // length
    typer.echo(f"perplexity {value:.4f}  ({dataset}, {windows} windows of {length} tokens)")


def _speed(model: str, network: Any, compare: str | None, device: Any) -> None:
    from layerwise.reports.tables import print_speed
    from layerwise.timing.speed import measure_speed

    names, networks = [model], [network]
    if compare is not None:
        names, networks = [*names, compare], [*networks, _load(compare, device)[1]]
    print_speed(names, measure_speed(networks))


def verify(folder: options.PrunedFolder) -> None:
    """Check what `layerwise prune` has written.

    Zeros, pattern, untouched bytes, and that stock transformers opens the folder.
    """
    from layerwise.run.outputs.verify import verify as check_folder

    checks = check_folder(folder)
    for check in checks:
        typer.echo(f"{'ok  ' if check.holds else 'FAIL'}  {check.claim}")
        for problem in check.problems[:5]:
            typer.echo(f"        {problem}")
        if len(check.problems) > 5:
            typer.echo(f"        and {len(check.problems) - 5} more")
    failed = sum(not check.holds for check in checks)
    if failed:
        message = f"{folder}: {failed} of {len(checks)} checks failed"
        raise VerificationError(message)


def report(
    folder: options.PrunedFolder,
    output: Annotated[
        Path | None,
        options.output("FILE", default="FOLDER/layerwise/report.html"),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a pruned model."""
    from layerwise.reports.report import run_page, write_report

    path = output or folder / "layerwise" / "report.html"
    write_report(path, run_page(folder))
    typer.echo(f"wrote {path}")


def solvers() -> None:
    """List the methods: what each needs, and what it can do."""
    from layerwise.reports.catalogue import catalogue
    from layerwise.reports.tables import print_solvers

    print_solvers(catalogue())
