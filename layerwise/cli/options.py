"""Options that several commands have: one declaration each, with one help text.

A command sets the default in its signature. A default in words is part of the declaration.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

# groups of a help page
MODEL = "Model"
METHOD = "Method"
CALIBRATION = "Calibration"
RACE = "Race of solvers"
MACHINE = "Machine"
OUTPUT = "Output"


def argument(metavar: str, text: str) -> Any:
    """Declare a positional argument."""
    return typer.Argument(metavar=metavar, help=text, rich_help_panel=MODEL)


def option(
    group: str, metavar: str | None, text: str, *names: str, default: str | None = None
) -> Any:
    """Declare an option; `default` is in words, where the signature cannot say it."""
    shown = True if default is None else default
    return typer.Option(
        *names, metavar=metavar, help=text, show_default=shown, rich_help_panel=group
    )


def window_length(longest: int) -> Any:
    """Declare the length of the token windows, which models limit."""
    default = f"the model's own, at most {longest}"
    return option(CALIBRATION, "N", "Tokens per window.", default=default)


def output(metavar: str, default: str | None = None) -> Any:
    """Declare where the result goes, to a folder or a file."""
    return option(OUTPUT, metavar, "Where to write the result.", default=default)


_MODEL = argument("MODEL", "Model folder, or name on the Hugging Face hub.")
Model = Annotated[str, _MODEL]
AnyModel = Annotated[str | None, _MODEL]
PrunedFolder = Annotated[
    Path, argument("FOLDER", "Folder of a pruned model, written by `layerwise prune`.")
]
RecipeFile = Annotated[
    Path | None,
    option(MODEL, "FILE", "YAML file with options; the command line wins."),
]
Targets = Annotated[
    list[str] | None,
    option(
        MODEL,
        "NAME",
        "Layers to prune: a class, a module name or re:PATTERN. May repeat.",
        default="Linear",
    ),
]
Ignore = Annotated[
    list[str] | None,
    option(
        MODEL,
        "NAME",
        "Layers to leave dense, named in the same way. May repeat.",
        default="lm_head",
    ),
]

_METHOD = option(METHOD, "NAME", "A solver, or a chain such as wanda+least-squares.")
Method = Annotated[str, _METHOD]
Methods = Annotated[list[str], _METHOD]
_SPARSITY = option(
    METHOD, "AMOUNT", "Fraction of zeros (0.5), or n:m: n of every m weights stay (2:4)."
)
Sparsity = Annotated[str, _SPARSITY]
AnySparsity = Annotated[str | None, _SPARSITY]
Sparsities = Annotated[list[str], _SPARSITY]
Group = Annotated[
    str, option(METHOD, "GROUP", "Count the zeros of a fraction per row or per layer.")
]
ErrorCorrection = Annotated[
    str,
    option(
        METHOD,
        "MODE",
        "How a layer makes up for errors of the layers before it: none, sequential, "
        "block or full.",
    ),
]
Damping = Annotated[
    float, option(METHOD, "X", "How strongly weights are held near the dense ones.")
]
Certify = Annotated[
    bool | None,
    option(
        METHOD,
        None,
        "Prove how far each layer is from the best answer.",
        default="on for --effort thorough",
    ),
]
Set = Annotated[
    list[str] | None,
    option(METHOD, "NAME=VALUE", "An option of the method. May repeat.", "--set"),
]
Effort = Annotated[
    str | None,
    option(
        METHOD, "LEVEL", "How hard the method `best` tries: fast, balanced or thorough."
    ),
]
Pattern = Annotated[
    str | None,
    option(METHOD, "KIND", "Make a smaller model: remove columns or heads."),
]
KeepZeros = Annotated[
    bool | None,
    option(
        METHOD,
        None,
        "Let every zero that is there already stay zero.",
        "--keep-zeros/--no-keep-zeros",
        default="for a folder that layerwise wrote",
    ),
]
Allocation = Annotated[
    str | None,
    option(
        METHOD,
        "RULE",
        "How a smaller model spreads its sparsity: optimal, uniform, ul-mm, al-mm, "
        "al-am or al-am:compat.",
        default="that of the method",
    ),
]
Format = Annotated[
    str | None,
    option(
        METHOD,
        "NAME",
        "Shapes of a smaller model: stock, native or padded.",
        default="stock",
    ),
]
Multiple = Annotated[
    int | None,
    option(
        METHOD,
        "N",
        "Widths of a smaller model are multiples of this number.",
        default="8",
    ),
]
FormerMultiple = Annotated[int | None, typer.Option("--unit", hidden=True)]

SOURCES = (
    "wikitext2, c4, FILE.txt, or FILE.jsonl, FILE.json or FILE.parquet with :FIELD; .gz is "
    "read too."
)
_CALIBRATION = option(CALIBRATION, "TEXT", f"Calibration data: {SOURCES}")
Calibration = Annotated[str, _CALIBRATION]
AnyCalibration = Annotated[str | None, _CALIBRATION]
Dataset = Annotated[str | None, typer.Option(help=SOURCES)]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Tokens between two windows, which then overlap; only new tokens count."
    ),
]
Windows = Annotated[int, option(CALIBRATION, "N", "Number of token windows.")]
WindowLength = Annotated[int | None, window_length(2048)]
Seed = Annotated[int, option(CALIBRATION, "N", "Seed of all random choices.")]
Bos = Annotated[
    str,
    option(
        CALIBRATION,
        "MODE",
        "Whether every window begins with BOS: auto (for families that need it), always "
        "or never.",
    ),
]

Device = Annotated[
    str, option(MACHINE, "NAME", "Where to compute: auto, cpu, cuda, cuda:1, ...")
]
Threads = Annotated[
    int | None,
    option(
        MACHINE,
        "N",
        "CPU threads of each worker.",
        default="PyTorch's choice, shared by the workers",
    ),
]
Workers = Annotated[int, option(MACHINE, "N", "Processes that share the work.")]
Ray = Annotated[
    str | None,
    option(MACHINE, "ADDRESS", "Run the workers on a Ray cluster; local starts one here."),
]
MemoryBudget = Annotated[
    int | None,
    option(MACHINE, "BYTES", "Memory for refits of layers.", default="1 GiB"),
]
Activations = Annotated[
    str,
    option(
        MACHINE,
        "PLACE",
        "Where hidden states are kept between blocks: memory, disk or auto.",
    ),
]

_OUTPUT = output("FOLDER")
Output = Annotated[Path, _OUTPUT]
AnyOutput = Annotated[Path | None, _OUTPUT]
Json = Annotated[
    Path | None, option(OUTPUT, "FILE", "Also write the figures as JSON.", "--json")
]
Resume = Annotated[
    bool, option(OUTPUT, None, "Continue an unfinished run from OUTPUT.partial.")
]
Force = Annotated[bool, option(OUTPUT, None, "Replace an existing output of layerwise.")]
