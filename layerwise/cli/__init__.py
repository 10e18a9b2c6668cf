"""The command line: thin commands over :mod:`layerwise.run`.

Errors are one line on stderr, with the exit code of their class; ``--debug`` shows the
traceback.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

import layerwise
from layerwise import first_line
from layerwise.cli import bench, demo, grams, inspect, plan, prune, retrain
from layerwise.cli.help import EXAMPLES, GroupedCommand
from layerwise.cli.signals import stopping_in_order
from layerwise.cli.streams import lasting, open_standard_files
from layerwise.errors import (
    LONGEST_MESSAGE,
    DataError,
    LayerwiseError,
    MemoryBudgetError,
    UsageError,
    one_line,
    shortened,
)

EXIT_UNEXPECTED = 1
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
    first_line.timer.cancel()
    open_standard_files()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    debug = DEBUG in arguments  # anywhere, also behind the command
    arguments = [argument for argument in arguments if argument != DEBUG]
    with lasting("stderr", results=False):
        return _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        with lasting("stdout", results=True), stopping_in_order():
            code = int(app(arguments, standalone_mode=False) or 0)
        if code == EXIT_INTERRUPTED:  # typer has caught an interruption without a signal
            raise KeyboardInterrupt
        return code
    except LayerwiseError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(error, str(error) or "interrupted", EXIT_INTERRUPTED, debug)
    except typer.Exit as error:
        return int(error.exit_code)
    except OSError as error:
        return _fail(error, _of_system(error), DataError.exit_code, debug)
    except MemoryError as error:
        message = f"there is too little memory: {one_line(error)}"
        return _fail(error, message, MemoryBudgetError.exit_code, debug)
    except Exception as error:
        describe: Callable[[], str] | None = getattr(error, "format_message", None)
        if describe is not None:
            return _fail(error, _with_hint(error, describe()), UsageError.exit_code, debug)
        message = (
            f"unexpected {type(error).__name__}: {one_line(error)}; this is a fault of "
            f"layerwise, and --debug shows where"
        )
        return _fail(error, message, EXIT_UNEXPECTED, debug)


def _of_system(error: OSError) -> str:
    """Message of an error of the operating system, with the whole path."""
    where = "a file or the output" if error.filename is None else error.filename
    return f"cannot read or write {where}: {error.strerror or one_line(error)}"


def _with_hint(error: Exception, message: str) -> str:
    """Message of the parser, and where an option belongs that stands before a command."""
    context = getattr(error, "ctx", None)
    if message.startswith("No such option") and context and context.parent is None:
        return f"{message.rstrip('.')}; options go after the command: layerwise prune ..."
    return message


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    line = shortened(" ".join(message.split()), LONGEST_MESSAGE)
    typer.echo(f"layerwise: {_printable(line)}", err=True)
    return code


def _printable(text: str) -> str:
    """Text whose control characters, and bytes that are not text, are escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
