"""``layerwise retrain``: train a few parameters of a pruned folder."""

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.common import (
    Device,
    Folder,
    Force,
    Resume,
    Threads,
    progress_on,
    set_threads,
)
from layerwise.errors import UsageError


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
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = True,
    force: Force = False,
) -> None:
    """Retrain a few parameters of a pruned model; every zero stays."""
    from layerwise.recovery.retrain import retrain_model
    from layerwise.reports.retrain_progress import PlainProgress, RichProgress

    set_threads(threads)
    with progress_on(PlainProgress, RichProgress) as progress:
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
