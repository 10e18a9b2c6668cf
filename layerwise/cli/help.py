"""Pages of ``--help``: options in groups, and examples at the end."""

from typing import Any

from typer.core import TyperCommand

from layerwise.cli.options import CALIBRATION, MACHINE, METHOD, MODEL, OUTPUT, RACE

GROUPS = (MODEL, METHOD, CALIBRATION, RACE, MACHINE, OUTPUT)
OTHERS = "Other"
WIDEST = 26  # names that are longer get a line of their own
EXAMPLES = {
    "prune": """
layerwise prune facebook/opt-125m --sparsity 0.5 --calibration wikitext2 \\
    --output opt-pruned
layerwise prune ./llama --method sparsegpt --sparsity 2:4 \\
    --calibration texts.jsonl:body --n-sequences 64 --output llama-pruned
""",
    "plan": """
layerwise plan facebook/opt-125m --sparsity 0.5
layerwise plan ./llama --method sparsegpt --sparsity 2:4 \\
    --calibration texts.jsonl:body --n-sequences 64 --output llama-pruned
""",
    "solve": """
layerwise solve GRAMS --method wanda --method fista --sparsity 0.5
layerwise solve GRAMS --method fista --sparsity 2:4 --model ./llama \\
    --output llama-pruned
""",
}


class GroupedCommand(TyperCommand):
    """A command whose page lists its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, each under the heading of its group."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (*GROUPS, OTHERS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # hidden
                continue
            name, text = record
            if parameter.param_type_name == "argument":  # without its type
                name = parameter.metavar or name
            group = getattr(parameter, "rich_help_panel", None) or OTHERS
            groups[group].append((name, text))
        names = [name for rows in groups.values() for name, _ in rows]
        width = max(len(name) for name in names if len(name) <= WIDEST)
        for group, rows in groups.items():
            if rows:
                aligned = [(name.ljust(width), text) for name, text in rows]
                with formatter.section(group):
                    formatter.write_dl(aligned, col_max=width)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are; long lines are not joined."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"  {line}\n")
