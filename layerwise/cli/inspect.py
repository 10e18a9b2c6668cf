"""Commands that look and change nothing: evaluate, verify, report, solvers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options
from layerwise.cli.common import check_file, saying_steps
from layerwise.errors import DataError, UsageError, VerificationError
from layerwise.limits import check_limit


def evaluate(
    model: options.Model,
    dataset: options.Dataset = None,
    sequence_length: options.WindowLength = None,
    stride: options.Stride = None,
    bos: options.Bos = "auto",
    device: options.Device = "auto",
    speed: Annotated[
        bool, typer.Option("--speed", help="Size, memory, latency and tokens per second.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="Another model, measured in turns with this one.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task, at most.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of your own tasks, YAML files of lm-eval.")
    ] = None,
    json_: options.Json = None,
) -> None:
    """Measure perplexity, task scores, size and speed of a model."""
    from layerwise.run.data.bos import check_bos
    from layerwise.run.settings import choose_device

    if dataset is None and tasks is None and not speed:
        message = "nothing to evaluate: give --dataset, --tasks or --speed, or several"
        raise UsageError(message)
    if compare is not None and not speed:
        message = "--compare compares speeds: give --speed as well"
        raise UsageError(message)
    if stride is not None and dataset is None:
        message = "--stride is about perplexity: give --dataset as well"
        raise UsageError(message)
    check_bos(bos)
    names, manager = _find_tasks(tasks, limit, task_folder, json_)
    chosen = choose_device(device)
    with saying_steps():
        checkpoint, network = _load(model, chosen)
        if dataset is not None:
            _perplexity(model, checkpoint, network, dataset, sequence_length, stride, bos)
        if names:
            _tasks(model, checkpoint, network, names, manager, limit, bos, json_)
        if speed:
            _speed(model, network, compare, chosen)


def _load(model: str, device: Any) -> tuple[Any, Any]:
    """Checkpoint and its model on a device."""
    from layerwise.run.checkpoints.storage import Checkpoint
    from layerwise.run.models.opening import load_model
    from layerwise.run.steps import status

    status(f"opening {model}")
    checkpoint = Checkpoint.open(model)
    return checkpoint, load_model(checkpoint, device)


def _perplexity(
    model: str,
    checkpoint: Any,
    network: Any,
    dataset: str,
    sequence_length: int | None,
    stride: int | None,
    bos: str,
) -> None:
    from layerwise.run.data.evaluation import evaluation_tokens
    from layerwise.run.data.files import holds_text
    from layerwise.run.data.perplexity import perplexity
    from layerwise.run.data.protocol import Protocol
    from layerwise.run.models.architecture import embedding_rows
    from layerwise.run.models.loading import load_tokenizer
    from layerwise.run.settings import CalibrationData
    from layerwise.run.steps import status

    data = CalibrationData(dataset, sequence_length=sequence_length, bos=bos)
    length = data.check(network)
    named = holds_text(dataset)  # other files may hold token ids
    tokenizer = _tokenizer(model, checkpoint) if named else load_tokenizer(checkpoint)
    first = data.bos_for(network, tokenizer).token
    protocol = Protocol(length, stride, first)
    status(f"reading {dataset}")
    tokens = evaluation_tokens(dataset, tokenizer, embedding_rows(network))
    value = perplexity(network, tokens, sequence_length=length, stride=stride, bos=first)
    windows = len(protocol.windows(tokens))
    typer.echo(
        f"perplexity {value:.4f}  ({dataset}, {windows} windows of {length} tokens, "
        f"{protocol.name})"
    )


def _tokenizer(model: str, checkpoint: Any) -> Any:
    from layerwise.run.models.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        message = f"{model} has no tokenizer, which a text needs"
        raise DataError(message)
    return tokenizer


def _find_tasks(
    tasks: str | None, limit: int | None, folder: Path | None, json_: Path | None
) -> tuple[list[str], Any]:
    """Names and their manager, after all checks that need no model."""
    from layerwise.run.data.tasks import find_tasks

    if tasks is None:
        given = {"--limit": limit, "--task-folder": folder, "--json": json_}
        for flag, value in given.items():
            if value is not None:
                message = f"{flag} is about tasks: give --tasks as well"
                raise UsageError(message)
        return [], None
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        message = f"--tasks takes names with commas between them, got {tasks!r}"
        raise UsageError(message)
    if limit is not None and limit < 1:
        message = f"--limit must be at least 1, got {limit}"
        raise UsageError(message)
    check_limit("--limit", limit or 1)
    check_file("--json", json_)
    return names, find_tasks(names, folder)


def _tasks(
    model: str,
    checkpoint: Any,
    network: Any,
    names: list[str],
    manager: Any,
    limit: int | None,
    bos: str,
    json_: Path | None,
) -> None:
    from layerwise.reports.tables import print_scores
    from layerwise.run.data.tasks import score_tasks
    from layerwise.run.settings import CalibrationData
    from layerwise.run.steps import status

    status(f"scoring {', '.join(names)}")
    tokenizer = _tokenizer(model, checkpoint)
    add_bos = False if bos == "never" else None  # None: as the tokenizer does
    if CalibrationData(None, bos=bos).bos_for(network, tokenizer).token is not None:
        add_bos = True
    found = score_tasks(
        network, tokenizer, names, manager=manager, limit=limit, add_bos=add_bos
    )
    print_scores(found)
    if json_ is not None:
        found.write(json_, model)


def _speed(model: str, network: Any, compare: str | None, device: Any) -> None:
    from layerwise.reports.tables import print_speed
    from layerwise.run.steps import status
    from layerwise.timing.speed import measure_speed

    names, networks = [model], [network]
    if compare is not None:
        names, networks = [*names, compare], [*networks, _load(compare, device)[1]]
    status("measuring size and speed")
    print_speed(names, measure_speed(networks))


def verify(folder: options.PrunedFolder) -> None:
    """Check what `layerwise prune` has written.

    Zeros, pattern, untouched bytes, and that stock transformers opens the folder.
    """
    from layerwise.run.outputs.verify import verify as check_folder

    with saying_steps():
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

    check_file("--output", output)
    path = output or folder / "layerwise" / "report.html"
    write_report(path, run_page(folder))
    typer.echo(f"wrote {path}")


def solvers() -> None:
    """List the methods: what each needs, and what it can do."""
    from layerwise.reports.catalogue import catalogue
    from layerwise.reports.tables import print_solvers

    print_solvers(catalogue())
