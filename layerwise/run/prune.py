"""prune_model: prune a language model layer by layer.

Everything that can be refused is refused before a weight is touched. With a path, the
output folder holds the bytes of the source except for the pruned matrices; a model object
is pruned in place.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.configure import OptionValue
from layerwise.errors import UsageError
from layerwise.modes import in_ordinary_mode
from layerwise.patterns import Pattern
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.architecture import adapter_of, as_stored, is_declared
from layerwise.run.models.headers import Headers
from layerwise.run.models.opening import OpenedModel, open_model
from layerwise.run.models.residency import InMemory
from layerwise.run.outputs.output import Outcome, fingerprint, stored_masks, write_output
from layerwise.run.pipeline.destination import NOWHERE, Destination
from layerwise.run.pipeline.expected import expected_work
from layerwise.run.pipeline.sharing import agree, open_store
from layerwise.run.pipeline.task import ErrorCorrection
from layerwise.run.report import Callback, Listeners, PruneReport
from layerwise.run.settings import Settings
from layerwise.run.steps import listening, status
from layerwise.run.stopwatch import timed
from layerwise.run.workers.ranks import ranks_of_environment
from layerwise.solver import SolverLike

WHOLE = (
    "the whole model is in memory: its checkpoint does not store every parameter as one "
    "tensor, so blocks cannot be loaded one by one"
)


@in_ordinary_mode
def prune_model(
    model_or_path: nn.Module | str | Path,
    method: SolverLike = "fista",
    sparsity: float | str | None = None,
    pattern: Pattern | str | None = None,
    *,
    calibration: Any,
    tokenizer: Any = None,
    n_sequences: int = 128,
    sequence_length: int | None = None,
    error_correction: ErrorCorrection = "block",
    targets: str | Sequence[str] = "Linear",
    ignore: str | Sequence[str] = ("lm_head",),
    seed: int = 0,
    bos: str = "auto",
    damping: float = 0.01,
    certify: bool | None = None,
    options: dict[str, OptionValue] | None = None,
    allocation: str | None = None,
    format: str | None = None,
    multiple: int | None = None,
    unit: int | None = None,
    group: str | None = None,
    keep_zeros: bool | None = None,
    device: str | torch.device = "auto",
    memory_budget: int | None = None,
    activations: str = "auto",
    workers: int = 1,
    ray: str | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    callbacks: Iterable[Callback] = (),
) -> PruneReport:
    """Prune the linear layers of a causal language model.

    Every layer becomes ``min ||W X - What Xhat||_F^2`` under a sparsity pattern, with X
    from the dense and Xhat from the pruned model on calibration text.

    Processes started by torchrun (``WORLD_SIZE`` and its other variables) share one run.
    Each calls this function with the same arguments, sees a part of the sequences and
    solves a part of the matrices. All return the same report; see
    :mod:`layerwise.run.workers.ranks`.

    Parameters
    ----------
    model_or_path
        A model object, pruned in place, or a checkpoint folder or hub name. With a folder
        and an `output_dir`, one decoder block at a time is in memory, if every parameter is
        stored as one tensor and the method needs no gradients.
    method
        Name in :data:`layerwise.SOLVERS`, names joined by ``+`` for a chain, a configured
        solver, or any object with ``solve(problem)``.
    sparsity
        Fraction of zeros, or ``"n:m"`` (keeps n of every m). For a smaller model the
        fraction of the parameters of the decoder blocks to remove.
    pattern
        A :class:`~layerwise.patterns.Pattern` or ``"n:m"``, instead of `sparsity`; or
        ``"columns"`` or ``"heads"`` besides it, for a smaller model: channels of the MLP
        and of the values of attention, or channels of the MLP and whole heads. Methods that
        only remove columns choose one of the two themselves.
    calibration
        ``"wikitext2"``, ``"c4"``, ``"file.txt"``, ``"file.jsonl:field"``, also ``.json``,
        ``.parquet`` and ``.gz``; strings, chats, token ids, a data set or a DataLoader, see
        :func:`layerwise.run.data.calibration.token_windows`.
    tokenizer
        Tokenizer for text; by default the one in the checkpoint folder.
    n_sequences, sequence_length
        Number and length of the windows of calibration text; the default length is the
        longest context of the model, at most 2048.
    error_correction
        ``"none"``, ``"sequential"``, ``"block"`` or ``"full"``; see
        :mod:`layerwise.run.pipeline.blocks`.
    targets, ignore
        Class names, exact module names or ``re:...``; an entry must match something.
        ``"Linear"`` is every linear layer, including the ``Conv1D`` of transformers.
    seed
        Seed of the calibration windows; the global generators are not touched.
    bos
        Whether every window begins with BOS: ``"auto"`` (for text, of families in
        :data:`layerwise.run.data.bos.NEEDS_BOS`), ``"always"`` or ``"never"``, the
        contiguous windows of the papers. The length of the windows is the same.
    damping
        Ridge towards the dense weight, relative to the mean diagonal of the gram.
    certify
        Whether to bound, for every layer, how far its damped objective can be above that of
        the best mask and weights, whatever the method (:func:`layerwise.proven_gap`). By
        default only for ``effort="thorough"``. Not for smaller models.
    options
        Hyper-parameters of a method given by name, such as ``{"block_size": 64}``.
    allocation, format, multiple
        Only for a smaller model, see :class:`layerwise.run.channels.structure.Structure`:
        the rule that spreads the sparsity over the layers; ``"stock"`` (default),
        ``"native"`` or ``"padded"``; the number that must divide all widths (8).
    unit
        Former name of `multiple`.
    group
        Whether a fraction of zeros holds for every ``"row"`` (default) or ``"layer"``.
    keep_zeros
        Whether every zero that a weight has already stays zero, with the pattern on top.
        None: for a folder that layerwise wrote.
    device
        Where blocks are computed; ``"auto"`` is a GPU if one is available.
    memory_budget
        Bytes for the row systems of refits, and for the rows of `certify`; other methods
        do not use it.
    activations
        Where the hidden states between two blocks are kept: ``"memory"``, ``"disk"`` (in
        files that are mapped into memory) or ``"auto"``, the disk where memory is short.
    workers
        Processes that prune blocks in parallel, each on its own GPU if there are several;
        only for ``"none"`` and ``"block"``. Each uses as many CPU threads as this process.
        The result is the same for any number of workers.
    ray
        Address of a Ray cluster for the workers, or ``"local"``, instead of processes.
    output_dir
        New folder for the pruned checkpoint; work happens in ``output_dir.partial``.
    resume
        Continue an unfinished run with the same arguments in the same folder.
    force
        Replace a finished `output_dir`, if layerwise wrote it and no input lies in it.
    callbacks
        Called with the progress of the run; with several ranks only those of rank 0.

    Returns
    -------
    PruneReport
        The pruned model, its masks and the figures of every layer.

    Raises
    ------
    UsageError, InvalidProblemError, UnsupportedModelError
        If an argument is impossible; nothing was touched.
    DataError
        If the text or checkpoint is missing or damaged; nothing was touched.
    SolveError
        If a layer failed numerically; finished blocks are kept for a resumed run.
    WorkerError
        If a worker or another rank is lost or fails; finished blocks are kept.
    """
    settings = Settings.of(
        method,
        sparsity,
        pattern,
        group=group,
        allocation=allocation,
        format=format,
        multiple=_multiple(multiple, unit),
        keep_zeros=keep_zeros,
        damping=damping,
        certify=certify,
        options=options,
        calibration=calibration,
        n_sequences=n_sequences,
        sequence_length=sequence_length,
        error_correction=error_correction,
        targets=targets,
        ignore=ignore,
        seed=seed,
        bos=bos,
        device=device,
        memory_budget=memory_budget,
        activations=activations,
        workers=workers,
        ray=ray,
    )
    inputs = model_or_path, calibration
    destination = Destination.of(output_dir, resume=resume, force=force, inputs=inputs)
    return prune(settings, model_or_path, tokenizer, destination, callbacks)


def prune(
    settings: Settings,
    model_or_path: nn.Module | str | Path,
    tokenizer: Any = None,
    destination: Destination = NOWHERE,
    callbacks: Iterable[Callback] = (),
) -> PruneReport:
    """Prune a model with resolved settings; see :func:`prune_model`."""
    start, output = time.perf_counter(), destination.output
    with ranks_of_environment(settings.device) as ranks, ExitStack() as held:
        from_folder = not isinstance(model_or_path, nn.Module)
        streamed = settings.check_placement(output, from_folder=from_folder, ranks=ranks)
        if ranks.first:
            held.enter_context(destination.held())
        listeners = Listeners(callbacks if ranks.first else ())
        held.enter_context(listening(listeners.on_status))
        with timed("load"):
            given: nn.Module | Checkpoint = (
                model_or_path
                if isinstance(model_or_path, nn.Module)
                else open_headers(model_or_path, settings, tokenizer)
            )
            opened = open_model(given, streamed=streamed)
        settings = settings.for_model(opened)
        run = settings.run_on(opened, tokenizer, ranks, output)
        recipe, identity = settings.recipe(opened.source, run.tokens), {}
        if output is not None or ranks.are_several:
            with timed("hash"):
                solver = settings.removal.method.solver
                identity = agree(ranks, fingerprint(recipe, run, solver))
        needed = settings.removal.disk_needed(run)
        total = len(run.selection.blocks)
        with open_store(destination, identity, ranks, needed, total) as store:
            run = replace(run, on_note=listeners.on_note, states=store)
            listeners.on_notes(filter(None, (store.continued, *run.tokens.notes)))
            listeners.on_notes(settings.removal.notes(run))
            if streamed and from_folder and opened.in_memory:
                listeners.on_note(WHOLE)
            listeners.on_start(expected_work(run))
            hidden = settings.hidden_store(run, store.blocks)
            with evaluation_mode(opened.model):
                step = settings.removal.prepare(run)
                listeners.on_notes(step.findings(run))
                records = settings.workers.prune(
                    run, settings.removal, step, store, hidden, listeners
                )
            with timed("write"):
                status("finishing the result")
                removed = step.finish(run, store)
                outcome = Outcome(recipe, run.tokens, records, opened.source, tokenizer)
                store.publish(partial(write_output, outcome, opened.model, removed))
                ranks.barrier()  # the others continue when the folder exists
                masks = stored_masks(output, removed.masks)
    seconds = time.perf_counter() - start
    model = opened.model if opened.in_memory else None
    left = removed.parameters_left
    report = PruneReport(tuple(records), masks, output, seconds, left, model)
    listeners.on_finish(report)
    return report


def open_headers(
    name_or_path: str | Path, settings: Settings, tokenizer: Any = None
) -> Checkpoint:
    """Open a checkpoint; refuse what needs no weight, which may take long to read."""
    status(f"opening {name_or_path}")
    source = Checkpoint.open(name_or_path)
    model = Headers.read(source).model
    settings.calibration.check(model)
    settings.calibration.check_tokenizer(source, tokenizer)
    if is_declared(model):  # other adapters are found by running the model
        adapter = as_stored(adapter_of(model), model, source)
        settings.check_selection(OpenedModel(InMemory(model), adapter, source))
    return source


def _multiple(multiple: int | None, unit: int | None) -> int | None:
    """Return the multiple by its name or its former name."""
    if unit is not None and multiple not in (None, unit):
        message = (
            f"unit={unit} contradicts multiple={multiple}: leave unit out, which is the "
            f"former name of multiple"
        )
        raise UsageError(message)
    return unit if multiple is None else multiple
