"""``layerwise retrain``: train a few parameters of a pruned folder."""

from typing import Annotated

from layerwise.cli import options
from layerwise.cli.common import progress_on, set_threads
from layerwise.cli.options import MACHINE, METHOD, MODEL, OUTPUT, option
from layerwise.errors import UsageError


def retrain(
    folder: options.PrunedFolder,
    calibration: options.Calibration,
    output: options.Output,
    dense: Annotated[
        str | None,
        option(MODEL, "MODEL", "The model before pruning.", default="that of the recipe"),
    ] = None,
    parameters: Annotated[
        str,
        option(
            METHOD,
            "NAMES",
            "What is trained: biases, norms, head, and one of lora-prune, scale-lora, "
            "masklora, full; joined by +.",
        ),
    ] = "masklora",
    objective: Annotated[
        str,
        option(
            METHOD,
            "NAME",
            "What is matched: the tokens, or dense outputs of a block, of its parts or "
            "of every matrix.",
        ),
    ] = "block",
    error_correction: options.ErrorCorrection = "sequential",
    steps: Annotated[
        int, option(METHOD, "N", "Updates per learning rate and per trained part.")
    ] = 100,
    learning_rate: Annotated[
        str | None,
        option(
            METHOD,
            "X",
            "One, or several with commas: the best is kept.",
            default="that of the parameters",
        ),
    ] = None,
    rank: Annotated[int, option(METHOD, "N", "Rank of low-rank changes.")] = 16,
    scale: Annotated[float, option(METHOD, "X", "Factor of low-rank changes.")] = 2.0,
    batch_size: Annotated[int, option(METHOD, "N", "Token windows per update.")] = 8,
    optimizer: Annotated[str, option(METHOD, "NAME", "adamw or adapprox.")] = "adamw",
    n_sequences: options.Windows = 128,
    sequence_length: options.WindowLength = None,
    seed: options.Seed = 0,
    bos: options.Bos = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    checkpointing: Annotated[
        bool,
        option(MACHINE, None, "Save memory, compute activations twice; only for tokens."),
    ] = False,
    save_every: Annotated[
        int,
        option(OUTPUT, "N", "Updates between two saved states; only for tokens."),
    ] = 50,
    resume: options.Resume = True,
    force: options.Force = False,
) -> None:
    """Retrain a few parameters of a pruned model; every zero stays.

    --error-correction is sequential or full here, and not used for tokens.
    """
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
            bos=bos,
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
