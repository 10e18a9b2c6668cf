"""retrain_model: retrain a few parameters of a pruned model, with fixed masks.

Masks come from the journal of the pruning run, never from the zeros. All arguments and
files are checked before any weight is changed.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters.selective_scan import fast_scan
from layerwise.modes import in_ordinary_mode
from layerwise.recovery.output import write_retrained
from layerwise.recovery.pruned import Pruned
from layerwise.recovery.records import UnitRecord
from layerwise.recovery.runner import Callback, Runner, tell
from layerwise.recovery.settings import Settings
from layerwise.recovery.training import split
from layerwise.run.checkpoints.hashes import parameters_sha256
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import Calibration
from layerwise.run.outputs.output import versions
from layerwise.run.pipeline.destination import Destination
from layerwise.run.pipeline.sharing import open_states
from layerwise.run.settings import CalibrationData, choose_device
from layerwise.run.steps import listening, status


@dataclass(frozen=True, eq=False)
class RetrainReport:
    """Result of a retraining.

    Parameters
    ----------
    model
        The retrained model.
    records
        Figures of every unit, in order; one for the objective ``tokens``.
    trained
        Number of trained parameters.
    parameters
        Number of parameters of the model.
    output_dir
        Folder of the retrained model, or None.
    seconds
        Wall time.
    """

    model: nn.Module
    records: tuple[UnitRecord, ...]
    trained: int
    parameters: int
    output_dir: Path | None
    seconds: float

    @property
    def fraction(self) -> float:
        """Fraction of the parameters that was trained."""
        return self.trained / self.parameters


@in_ordinary_mode
def retrain_model(
    model_or_path: nn.Module | str | Path,
    *,
    parameters: str = "masklora",
    objective: str = "block",
    calibration: Any,
    masks: Mapping[str, Tensor] | None = None,
    dense: nn.Module | str | Path | None = None,
    steps: int = 100,
    learning_rate: float | Sequence[float] | None = None,
    rank: int = 16,
    scale: float = 2.0,
    batch_size: int = 8,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    error_correction: str = "sequential",
    tokenizer: Any = None,
    n_sequences: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    save_every: int = 50,
    device: str | torch.device = "auto",
    output_dir: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    callbacks: Iterable[Callback] = (),
) -> RetrainReport:
    """Retrain a small set of parameters of a pruned model, with its masks fixed.

    The problem is ``min over theta`` of one of two losses, where theta are the parameters
    in the sets, and removed weights stay zero. The loss is the mean next-token loss of the
    model, or the distance between the outputs of its blocks, parts or matrices and the
    dense outputs.

    Parameters
    ----------
    model_or_path
        Folder written by `prune_model`, or a model object, which is retrained in place.
    parameters
        Sets joined by ``+``: ``biases``, ``norms``, ``head``, and one of ``lora-prune``,
        ``scale-lora``, ``masklora``, ``full``; see :mod:`layerwise.recovery.trainable`.
    objective
        ``"tokens"``, or a reconstruction: ``"block"``, ``"parts"`` (attention and MLP
        separately) or ``"matrix"``.
    calibration
        Text or token ids, as for `prune_model`.
    masks
        Masks of a model object by parameter name, True = kept: ``report.masks`` of the
        pruning run. A folder has its own.
    dense
        The model before pruning, for a reconstruction. With a folder, the default is the
        model named in its recipe.
    steps
        Updates per learning rate, for the model or for every unit.
    learning_rate
        One or several peak values: the best on the held-out batches is kept, or the
        initial values if none improves them. None: the default of the set, which falls
        as the hidden size grows.
    rank, scale
        Rank and scale of low-rank changes ``scale B A``.
    batch_size
        Sequences per update.
    optimizer
        ``"adamw"`` or ``"adapprox"``.
    checkpointing
        Compute activations twice to save memory (``tokens``).
    error_correction
        Inputs of the dense model in a reconstruction: ``"sequential"`` uses those of the
        pruned model, ``"full"`` the dense model's own.
    tokenizer, n_sequences, sequence_length, seed, bos, device
        As for `prune_model`.
    save_every
        Updates between two saved states (``tokens``).
    output_dir
        New folder; unfinished work is in ``output_dir.partial``.
    resume, force
        As for `prune_model`.
    callbacks
        Called as the retraining progresses.

    Raises
    ------
    UsageError, UnsupportedModelError
        If an argument is impossible; nothing was changed.
    DataError
        If a folder or text is missing or damaged; nothing was changed.
    SolveError
        If no learning rate gives finite losses; finished blocks are kept.

    References
    ----------
    .. [1] M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta, "PERP: Rethinking the
       Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230.
    """
    start = time.perf_counter()
    settings = Settings(
        parameters=parameters,
        objective=objective,
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        scale=scale,
        batch_size=batch_size,
        optimizer=optimizer,
        error_correction=error_correction,
        seed=seed,
        save_every=save_every,
    )
    data = CalibrationData(calibration, n_sequences, sequence_length, seed, bos)
    torch_device = choose_device(device)
    inputs = model_or_path, dense, calibration
    destination = Destination.of(output_dir, resume=resume, force=force, inputs=inputs)
    listeners = tuple(callbacks)
    with destination.held(), listening(partial(tell, listeners, "on_status")):
        status("opening the pruned model")
        pruned = Pruned.open(model_or_path, masks, settings.sets, destination.output)
        model = pruned.model
        width = int(model.config.get_text_config().hidden_size)
        original = None
        if settings.reconstructs:
            status("opening the dense model")
            original = pruned.dense_model(dense)
        tokens = data.windows(pruned.opened, tokenizer)
        batches = torch.split(tokens.tokens, batch_size)
        split(len(batches))  # raises if there are too few
        plain = settings.to_dict(width, tokens)
        identity = {}
        if destination.output is not None:
            identity = _identity(plain, tokens, pruned.source, original, torch_device)
        for text in tokens.notes:
            tell(listeners, "on_note", text)
        with open_states(destination, identity) as store, fast_scan(model, torch_device):
            run = Runner(pruned, batches, torch_device, store, listeners)
            if original is None:
                training = settings.training(width)
                values, records = run.tokens(settings.sets, training, checkpointing)
            else:
                task = settings.reconstruction(width, torch_device)
                values, records = run.blocks(task, original)
            store.publish(partial(write_retrained, pruned, values, records, plain))
    report = RetrainReport(
        model=model,
        records=tuple(records),
        trained=sum(record.trained for record in records),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        output_dir=destination.output,
        seconds=time.perf_counter() - start,
    )
    for listener in listeners:
        listener.on_finish(report)
    return report


def _identity(
    settings: Mapping[str, Any],
    tokens: Calibration,
    source: Checkpoint | None,
    dense: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    return {
        **settings,
        "calibration": tokens.sha256,
        "weights": None if source is None else source.sha256(),
        "dense": parameters_sha256(dense),
        "versions": versions(),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
