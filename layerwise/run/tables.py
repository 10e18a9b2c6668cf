"""Tables on the terminal: the list of solvers and the comparison of the demonstration."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from layerwise.run.catalogue import Entry
from layerwise.run.demo import Comparison


def print_solvers(entries: Sequence[Entry]) -> None:
    """One line per method."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "patterns", "needs", "guarantee", "what it does"):
        table.add_column(heading, no_wrap=heading == "name")
    for entry in entries:
        table.add_row(
            entry.name, entry.patterns, entry.needs, entry.guarantee, entry.summary
        )
    _console().print(table)


def print_comparison(comparison: Comparison) -> None:
    """One table per model, a section per pattern."""
    for model, dense in comparison.dense_perplexity.items():
        table = Table(title=f"{model}: dense perplexity {dense:.3f}", title_justify="left")
        table.add_column("pattern")
        table.add_column("method")
        for heading in ("perplexity", "mean relative error", "seconds"):
            table.add_column(heading, justify="right")
        results = [result for result in comparison.results if result.model == model]
        for index, result in enumerate(results):
            last = index + 1 == len(results) or results[index + 1].pattern != result.pattern
            table.add_row(
                result.pattern,
                result.method,
                f"{result.perplexity:.3f}",
                f"{result.mean_relative_error:.4f}",
                f"{result.seconds:.1f}",
                end_section=last,
            )
        _console().print(table)


def _console() -> Console:
    """As wide as tables need where nobody folds lines."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
