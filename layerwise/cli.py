"""The command line: thin commands over :mod:`layerwise.run`.

Errors are one line on stderr, with the exit code of their class; ``--debug`` shows the
traceback.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

import layerwise
from layerwise.errors import DataError, LayerwiseError, UsageError, VerificationError

EXIT_INTERRUPTED = 130
DEBUG = "--debug"

app = typer.Typer(
    name="layerwise",
    help="Prune large language models layer by layer, with errors that are measured.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the hub.")]
Folder = Annotated[Path, typer.Argument(help="Folder written by `layerwise prune`.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option(help="Show the version and exit.")] = False,
) -> None:
    """Prune large language models layer by layer, with errors that are measured."""
    if version:
        typer.echo(f"layerwise {layerwise.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


@app.command()
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    memory_budget: Annotated[int | None, typer.Option(help="Bytes for refits.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue OUTPUT.partial.")] = True,
    force: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
) -> None:
    """Prune a model and write a folder that stock transformers opens."""
    from layerwise.run.recipe import Recipe

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
        "options": _options(set_ or [], effort) or None,
    }
    flags = {name: value for name, value in given.items() if value is not None}
    base = Recipe.read(recipe).model_dump(exclude_unset=True) if recipe else {}
    arguments = Recipe.check({**base, **flags}, "the command line")
    _prune(arguments, output, device, threads, memory_budget, resume=resume, force=force)


def _prune(
    recipe: Any,
    output: Path | None,
    device: str,
    threads: int | None,
    memory_budget: int | None,
    *,
    resume: bool,
    force: bool,
) -> None:
    for name, value in (
        ("MODEL", recipe.model),
        ("--sparsity", recipe.sparsity),
        ("--calibration", recipe.calibration),
        ("--output", output),
    ):
        if value is None:
            message = f"missing {name}; see `layerwise prune --help`"
            raise UsageError(message)
    if recipe.group == "layer" and ":" in str(recipe.sparsity):
        message = (
            f"--group layer leaves open where the zeros are, {recipe.sparsity} says it; "
            f"drop one of them"
        )
        raise UsageError(message)
    from layerwise.run.progress import PlainProgress, RichProgress
    from layerwise.run.prune import prune_model
    from layerwise.run.structure import leaving

    _set_threads(threads)
    with _progress(PlainProgress, RichProgress) as progress:
        report = prune_model(
            recipe.model,
            recipe.method,
            **leaving(
                recipe.method,
                recipe.sparsity,
                group=recipe.group,
                pattern=recipe.pattern,
                allocation=recipe.allocation,
                format=recipe.format,
                unit=recipe.unit,
            ),
            calibration=recipe.calibration,
            n_sequences=recipe.n_sequences,
            sequence_length=recipe.sequence_length,
            error_correction=recipe.error_correction,
            targets=recipe.targets,
            ignore=recipe.ignore,
            seed=recipe.seed,
            damping=recipe.damping,
            certify=recipe.certify,
            options=recipe.options,
            device=device,
            memory_budget=memory_budget,
            output_dir=output,
            resume=resume,
            force=force,
            callbacks=(progress,),
        )
    assert report.output_dir is not None
    _write_run_report(report.output_dir)


@app.command()
def retrain(
    folder: Folder,
    calibration: Annotated[
        str, typer.Option(help="wikitext2, c4, FILE.txt or FILE.jsonl:field.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for the result.")],
    parameters: Annotated[
        str,
        typer.Option(
            help="biases, norms, head, and one of lora-prune, scale-lora, masklora, full; "
            "joined by +."
        ),
    ] = "masklora",
    objective: Annotated[
        str, typer.Option(help="tokens, or dense outputs of a block, parts or matrix.")
    ] = "block",
    steps: Annotated[int, typer.Option(help="Updates per learning rate and unit.")] = 100,
    learning_rate: Annotated[
        str | None, typer.Option(help="One, or several with commas: the best is kept.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of low-rank changes.")] = 16,
    scale: Annotated[float, typer.Option(help="Factor of low-rank changes.")] = 2.0,
    batch_size: Annotated[int, typer.Option(help="Windows per update.")] = 8,
    optimizer: Annotated[str, typer.Option(help="adamw or adapprox.")] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice to save memory (tokens).")
    ] = False,
    dense: Annotated[
        str | None, typer.Option(help="Model before pruning, if it is not in its place.")
    ] = None,
    n_sequences: Annotated[int, typer.Option(help="Token windows.")] = 128,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    error_correction: Annotated[
        str, typer.Option(help="sequential or full (not for tokens).")
    ] = "sequential",
    seed: Annotated[int, typer.Option(help="Of windows, order and factors.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between two states.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue OUTPUT.partial.")] = True,
    force: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
) -> None:
    """Retrain a few parameters of a pruned model; every zero stays."""
    from layerwise.recovery.progress import PlainProgress, RichProgress
    from layerwise.recovery.retrain import retrain_model

    _set_threads(threads)
    with _progress(PlainProgress, RichProgress) as progress:
        retrain_model(
            folder,
            parameters=parameters,
            objective=objective,
            calibration=calibration,
            dense=dense,
            steps=steps,
            learning_rate=_rates(learning_rate),
            rank=rank,
            scale=scale,
            batch_size=batch_size,
            optimizer=optimizer,
            checkpointing=checkpointing,
            error_correction=error_correction,
            n_sequences=n_sequences,
            sequence_length=sequence_length,
            seed=seed,
            save_every=save_every,
            device=device,
            output_dir=output,
            resume=resume,
            force=force,
            callbacks=(progress,),
        )


def _rates(text: str | None) -> list[float] | None:
    """Learning rates from numbers with commas between them."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"--learning-rate takes numbers with commas, got {text!r}"
        raise UsageError(message) from None


@app.command()
def evaluate(
    model: Model,
    dataset: Annotated[
        str | None, typer.Option(help="wikitext2, c4, FILE.txt, FILE.jsonl:field.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    speed: Annotated[
        bool, typer.Option("--speed", help="Size, memory, latency and tokens per second.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="Another model, measured in turns with this one.")
    ] = None,
) -> None:
    """Token perplexity over non-overlapping windows, and what the model costs to run."""
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
    from layerwise.run.storage import Checkpoint

    checkpoint = Checkpoint.open(model)
    return checkpoint, checkpoint.load_model(device)


def _perplexity(
    model: str, checkpoint: Any, network: Any, dataset: str, sequence_length: int | None
) -> None:
    from layerwise.run.calibration import evaluation_text
    from layerwise.run.perplexity import perplexity
    from layerwise.run.settings import choose_sequence_length, embedding_rows
    from layerwise.run.tokens import encode

    length = choose_sequence_length(network, sequence_length)
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        message = f"{model} has no tokenizer, which a text needs"
        raise DataError(message)
    tokens = encode(evaluation_text(dataset), tokenizer, embedding_rows(network))
    value = perplexity(network, tokens, sequence_length=length)
    windows = len(tokens) // length
    typer.echo(f"perplexity {value:.4f}  ({dataset}, {windows} windows of {length} tokens)")


def _speed(model: str, network: Any, compare: str | None, device: Any) -> None:
    from layerwise.run.speed import measure_speed
    from layerwise.run.tables import print_speed

    names, networks = [model], [network]
    if compare is not None:
        names, networks = [*names, compare], [*networks, _load(compare, device)[1]]
    print_speed(names, measure_speed(networks))


@app.command()
def verify(folder: Folder) -> None:
    """Check zeros, pattern, untouched bytes, and that stock transformers opens it."""
    from layerwise.run.verify import verify as check_folder

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


@app.command()
def report(
    folder: Folder,
    output: Annotated[Path | None, typer.Option(help="HTML file to write.")] = None,
) -> None:
    """Write one self-contained HTML page about a pruned model."""
    from layerwise.run.report import run_page, write_report

    path = output or folder / "layerwise" / "report.html"
    write_report(path, run_page(folder))
    typer.echo(f"wrote {path}")


@app.command()
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
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
    _set_threads(threads)
    if methods is None:
        _refuse_given(of_race | {"gap": gap or None, "json": json_, "plot": plot}, "needs")
        _bench(_given(of_prune) | {"shape": shape, "sparsity": sparsity, "device": device})
    else:
        _refuse_given(of_prune, "does not go with")
        arguments = _given(of_race) | {"shape": shape, "sparsity": sparsity, "gap": gap}
        _race(methods, arguments | {"device": device}, json_, plot)


def _bench(arguments: dict[str, Any]) -> None:
    from layerwise.run.bench import bench as measure
    from layerwise.run.tables import print_bench

    print_bench(measure(**arguments))


def _race(
    methods: str, arguments: dict[str, Any], json_: Path | None, plot: Path | None
) -> None:
    from layerwise.run.curves import check_picture, draw_race
    from layerwise.run.race import race
    from layerwise.run.tables import print_race

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


@app.command()
def solvers() -> None:
    """List the methods: what each requires and handles."""
    from layerwise.run.catalogue import catalogue
    from layerwise.run.tables import print_solvers

    print_solvers(catalogue())


@app.command()
def demo(
    everything: Annotated[
        bool, typer.Option("--all", help="Every solver on every packaged model.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for report.html and the results of --all.")
    ] = Path("demo-output"),
) -> None:
    """Prune a packaged trained model by several methods and compare them.

    `--all` takes minutes; what it has finished is kept in the folder and not repeated.
    """
    from layerwise.run.demo import (
        MAIN_METHODS,
        RESULTS,
        all_methods,
        compare,
        demo_models,
    )
    from layerwise.run.report import comparison_page, write_report
    from layerwise.run.results import ResultStore
    from layerwise.run.tables import print_comparison

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


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            message = f"--threads must be at least 1, got {threads}"
            raise UsageError(message)
        torch.set_num_threads(threads)


@contextmanager
def _progress(plain: Any, rich: Any) -> Iterator[Any]:
    """A bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain(sys.stderr)
        return
    progress = rich(console)
    try:
        yield progress
    finally:
        progress.close()


def _write_run_report(folder: Path) -> None:
    """report.html beside the manifest, if the plots can be drawn."""
    from layerwise.run.report import run_page, write_report

    try:
        write_report(folder / "layerwise" / "report.html", run_page(folder))
    except UsageError as error:
        typer.echo(f"report.html was not written: {error}", err=True)


def _options(set_: list[str], effort: str | None) -> dict[str, Any]:
    """Hyper-parameters of the method; `--effort` is one of them with a flag of its own."""
    return _assignments(set_) | ({"effort": effort} if effort else {})


def _assignments(items: list[str]) -> dict[str, Any]:
    """``name=value`` pairs, values read as YAML scalars."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            message = f"--set takes name=value, got {item!r}"
            raise UsageError(message)
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            message = f"--set {name} takes one number or word, got {value!r}"
            raise UsageError(message) from None
    return found


def main() -> None:
    """Entry point: run a command, turn exceptions into one line and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    debug = DEBUG in arguments  # anywhere, also behind the command
    arguments = [argument for argument in arguments if argument != DEBUG]
    try:
        code = int(app(arguments, standalone_mode=False) or 0)
        if code == EXIT_INTERRUPTED:  # typer has caught the interruption
            raise KeyboardInterrupt
        return code
    except LayerwiseError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(
            error, "interrupted; finished blocks are kept", EXIT_INTERRUPTED, debug
        )
    except typer.Exit as error:
        return int(error.exit_code)
    except Exception as error:
        describe: Callable[[], str] | None = getattr(error, "format_message", None)
        if describe is None:
            raise
        return _fail(error, describe(), 2, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    typer.echo(f"layerwise: {' '.join(message.split())}", err=True)
    return code
