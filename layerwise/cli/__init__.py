"""The command line: thin commands over :mod:`layerwise.run`.

Errors are one line on stderr, with the exit code of their class; ``--debug`` shows the
traceback.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

import layerwise
from layerwise.cli import bench, demo, grams, inspect, plan, prune, retrain
from layerwise.cli.help import EXAMPLES, GroupedCommand
from layerwise.cli.signals import stopping_on_signals
from layerwise.errors import LayerwiseError, UsageError

EXIT_INTERRUPTED = 130
DEBUG = "--debug"
COMMANDS = (  # in the order of --help
    plan.plan,
    prune.prune,
    retrain.retrain,
    grams.calibrate,
    grams.solve,
    inspect.evaluate,
    inspect.verify,
    inspect.report,
    bench.bench,
    inspect.solvers,
    demo.demo,
)
# whose options are too many for one list
GROUPED = (
    plan.plan,
    prune.prune,
    retrain.retrain,
    grams.calibrate,
    grams.solve,
    bench.bench,
)

app = typer.Typer(
    name="layerwise",
    help="Prune large language models layer by layer, with errors that are measured.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def top_level(
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


for command in COMMANDS:
    kind = GroupedCommand if command in GROUPED else None
    app.command(cls=kind, epilog=EXAMPLES.get(command.__name__))(command)


def main() -> None:
    """Entry point: run a command, turn exceptions into one line and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    debug = DEBUG in arguments  # anywhere, also behind the command
    arguments = [argument for argument in arguments if argument != DEBUG]
    try:
        with stopping_on_signals():
            code = int(app(arguments, standalone_mode=False) or 0)
        if code == EXIT_INTERRUPTED:  # typer has caught the interruption
            raise KeyboardInterrupt
        return code
    except LayerwiseError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(
            error,
            "interrupted; what is finished of an output is kept",
            EXIT_INTERRUPTED,
            debug,
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
