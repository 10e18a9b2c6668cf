"""prune_model: a language model in, a pruned one out, layer by layer.

Everything that can be refused is refused before a weight is touched. With a path, the
output folder holds the bytes of the source except for the pruned matrices; with a model
object, the model is pruned in place.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.configure import OptionValue, options_of
from layerwise.patterns import NM, Pattern
from layerwise.run.activations.hidden_store import check_activations, hidden_store
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.capacity import refuse_full_disk
from layerwise.run.channels.structure import Structure, StructureOptions, choose_structure
from layerwise.run.channels.structured import (
    ChannelSelection,
    StructuredTask,
    make_smaller,
    structured_task,
)
from layerwise.run.channels.widths import default_rule
from layerwise.run.checkpoints.hashes import digests
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import Calibration, token_windows
from layerwise.run.models.architecture import adapter_in, embedding_rows
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.residency import InMemory, Residency, can_stream, open_resident
from layerwise.run.models.rewrite import parameters_of
from layerwise.run.outputs.output import (
    Outcome,
    fingerprint,
    write_output,
    write_smaller_output,
)
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.journal import MASK, WEIGHT, check_output, read_masks
from layerwise.run.pipeline.parallel import ParallelRun, Workers
from layerwise.run.pipeline.sharing import (
    agree,
    check_shared,
    own_sequences,
    shared_journal,
)
from layerwise.run.pipeline.targets import Selection, note_on
from layerwise.run.pipeline.task import ErrorCorrection, Task
from layerwise.run.pipeline.walk import walk
from layerwise.run.report import Callback, Listeners, PruneReport
from layerwise.run.settings import (
    as_entries,
    budget_of_bounds,
    check_error_correction,
    check_storable,
    choose_certify,
    choose_device,
    choose_pattern,
    choose_sequence_length,
    choose_solver,
    with_published_start,
)
from layerwise.run.stopwatch import timed
from layerwise.run.workers.ranks import ranks_of_environment
from layerwise.solve import resolve, solver_name

WHOLE = (
    "the whole model is in memory: its tensors are not stored as the model has them, so "
    "blocks cannot be loaded one by one"
)


def prune_model(
    model_or_path: nn.Module | str | Path,
    method: Any = "fista",
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
    damping: float = 0.01,
    certify: bool | None = None,
    options: dict[str, OptionValue] | None = None,
    allocation: str | None = None,
    format: str | None = None,
    unit: int | None = None,
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

    Processes that torchrun has started (``WORLD_SIZE`` and what else it sets) share one
    run: each calls this with the same arguments, sees a part of the sequences and solves a
    part of the matrices, and all return the same report; see
    :mod:`layerwise.run.workers.ranks`.

    Parameters
    ----------
    model_or_path
        A model object, pruned in place, or a checkpoint folder or hub name. With a folder
        and an `output_dir`, one decoder block at a time is in memory, wherever its tensors
        are stored as the model has them and the method needs no gradients.
    method
        Name in :data:`layerwise.SOLVERS`, names joined by ``+`` for a chain, a configured
        solver, or any object with ``solve(problem)``.
    sparsity
        Fraction of zeros, or ``"n:m"`` (keeps n of every m). For a smaller model the
        fraction of the parameters of the decoder blocks that leaves.
    pattern
        A :class:`~layerwise.patterns.Pattern` or ``"n:m"``, instead of `sparsity`; or
        ``"columns"`` or ``"heads"`` beside it, for a smaller model: channels of the MLP
        and of attention's values, or channels of the MLP and whole heads. Methods that
        remove columns alone choose one of the two themselves.
    calibration
        ``"wikitext2"``, ``"c4"``, ``"file.txt"``, ``"file.jsonl:field"``, a list of
        strings, or token ids.
    tokenizer
        For text; by default the one in the checkpoint folder.
    n_sequences, sequence_length
        Windows of calibration text; the default length is the model's own, at most 2048.
    error_correction
        ``"none"``, ``"sequential"``, ``"block"`` or ``"full"``; see
        :mod:`layerwise.run.pipeline.blocks`.
    targets, ignore
        Class names, exact module names or ``re:...``; an entry must match something.
        ``"Linear"`` is every linear layer, a ``Conv1D`` of transformers included.
    seed
        Of the calibration windows; the global generators are not touched.
    damping
        Ridge towards the dense weight, relative to the mean diagonal of the gram.
    certify
        Whether to bound, for every layer, how far its damped objective can be above that of
        the best mask and weights, whatever the method (:func:`layerwise.proven_gap`). By
        default only for ``effort="thorough"``. Not for smaller models.
    options
        Hyper-parameters of a method given by name, such as ``{"block_size": 64}``.
    allocation, format, unit
        Of a smaller model, see :class:`layerwise.run.channels.structure.Structure`: the
        rule that spreads the sparsity over the layers, ``"stock"`` (default), ``"native"``
        or ``"padded"``, and the number that widths are multiples of (8).
    device
        Where blocks are computed; ``"auto"`` takes a GPU if there is one.
    memory_budget
        Bytes for the row systems of refits, and for the rows of `certify`; methods
        without them need none.
    activations
        Where the hidden states between two blocks are kept: ``"memory"``, ``"disk"`` (in
        files that are mapped into memory) or ``"auto"``, the disk where memory is short.
    workers
        Processes that prune blocks side by side, on one GPU each where there are several;
        only for ``"none"`` and ``"block"``. Each uses as many CPU threads as this process
        is set to, and the result is the same for any number.
    ray
        Address of a Ray cluster for the workers, or ``"local"``, instead of processes.
    output_dir
        New folder for the pruned checkpoint; work happens in ``output_dir.partial``.
    resume
        Continue an unfinished run with the same arguments in the same folder.
    force
        Replace a finished `output_dir`.
    callbacks
        Told about the progress; with several ranks, those of rank 0 alone.

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
        If workers, or another rank, are lost or fail; finished blocks are kept.
    """
    start = time.perf_counter()
    given = StructureOptions(allocation, format, unit)
    structure = choose_structure(resolve(method), sparsity, pattern, given)
    chosen = structure or choose_pattern(sparsity, pattern)
    solver = choose_solver(method, chosen, damping, options, memory_budget)
    certified = choose_certify(certify, solver, chosen)
    check_error_correction(error_correction)
    check_activations(activations)
    output = None if output_dir is None else Path(output_dir)
    streamed = output is not None and can_stream(chosen, solver)
    crew = Workers(workers, ray)
    crew.check(
        error_correction,
        streamable=streamed and not isinstance(model_or_path, nn.Module),
    )
    if output is not None:
        check_storable(chosen)
    with ranks_of_environment(device) as ranks:
        check_shared(ranks, solver, chosen, workers=crew.are_others)
        if output is not None and ranks.first:
            check_output(output, force=force)
        with timed("load"):
            source, residency = _open(model_or_path, streamed=streamed)
            model = residency.model
            adapter = adapter_in(residency)
        solver = with_published_start(solver, model, chosen)
        entries = as_entries(targets), as_entries(ignore)
        selection: Selection | ChannelSelection
        if isinstance(chosen, Structure):
            selection = ChannelSelection(model, adapter, *entries, chosen)
        else:
            selection = Selection(model, adapter, *entries, chosen)
        tokens = token_windows(
            calibration,
            tokenizer or _own_tokenizer(source, calibration),
            n_sequences=n_sequences,
            sequence_length=choose_sequence_length(model, sequence_length),
            seed=seed,
            vocab_size=embedding_rows(model),
        )
        own_tokens = own_sequences(tokens, ranks)
        task = Task(
            adapter,
            solver,
            chosen,
            damping,
            error_correction,
            choose_device(device),
            certify=certified,
            memory_budget=budget_of_bounds(memory_budget),
            ranks=ranks,
        )
        if isinstance(selection, ChannelSelection):
            task = structured_task(task, model, selection)
        recipe = _recipe(task, calibration, tokens, selection, seed, source)
        recipe = recipe.model_copy(update={"certify": certify})
        journal, identity = None, {}
        if output is not None or ranks.are_several:
            with timed("hash"):
                identity = fingerprint(recipe, tokens, source, model, task.device)
            identity = agree(ranks, identity)
        if output is not None:
            journal = shared_journal(ranks, output, identity, force=force, resume=resume)
        listeners = Listeners(callbacks if ranks.first else ())
        for note in _notes(model, task, selection):
            listeners.on_note(note)
        if streamed and source is not None and isinstance(residency, InMemory):
            listeners.on_note(WHOLE)
        listeners.on_start(len(selection.names))
        smaller = isinstance(selection, ChannelSelection)
        before = digests(model) if smaller and journal is not None else {}
        try:
            if journal is not None and source is not None and not smaller:
                needed = _bytes_written(source, model, selection.names)
                refuse_full_disk(journal.folder, needed)
            folder = None if journal is None else journal.blocks
            store = hidden_store(activations, folder, model, tokens, task)
            with evaluation_mode(model):
                task = task.prepared(model, selection, tokens)
                if isinstance(task, StructuredTask) and task.allocation is not None:
                    for note in task.notes():
                        listeners.on_note(note)
                if crew.are_others:
                    assert isinstance(selection, Selection)
                    assert journal is not None
                    assert source is not None
                    parallel = ParallelRun(
                        residency, selection, task, tokens, journal, store, source.path
                    )
                    blocks = parallel.walk(crew, listeners.on_layer, listeners.on_note)
                else:
                    told = listeners.on_layer
                    blocks = walk(
                        residency, selection, task, own_tokens, journal, told, store
                    )
        except BaseException:
            if journal is not None:
                journal.discard_if_empty()
            raise
        records = tuple(record for block in blocks for record in block.records)
        left = 1.0
        optimised = task.allocation if isinstance(task, StructuredTask) else None
        outcome = Outcome(recipe, tokens, records, source, tokenizer, optimised)
        masks: Mapping[str, Tensor] = {}
        with timed("write"):
            if isinstance(selection, ChannelSelection):
                masks = selection.by_parameter([block.masks for block in blocks])
                cuts = selection.cuts(blocks)
                make_smaller(model, adapter, cuts, selection.structure)
                left = parameters_of(selection.blocks) / selection.total
                if journal is not None:
                    write_smaller_output(journal, outcome, model, cuts, before, selection)
                    journal.finish()
            elif journal is not None:
                masks = selection.by_parameter(partial(journal.read_tensor, MASK))
                if ranks.first:
                    weights = selection.by_parameter(partial(journal.read_tensor, WEIGHT))
                    write_output(journal, outcome, model, weights, masks)
                    journal.finish()
                ranks.meet()  # the others go on when the folder is there
                masks = LazyTensors(masks, read_masks(journal.output).__getitem__)
            else:
                masks = dict(selection.by_parameter(lambda i, name: blocks[i].masks[name]))
    seconds = time.perf_counter() - start
    opened = model if isinstance(residency, InMemory) else None
    report = PruneReport(records, masks, output, seconds, left, opened)
    listeners.on_finish(report)
    return report


def _notes(
    model: nn.Module, task: Task, selection: Selection | ChannelSelection
) -> list[str]:
    """What a reader of the log should know before the run."""
    notes = []
    if isinstance(selection, Selection) and task.adapter.found:
        notes.append(note_on(model, task.adapter, selection))
    if isinstance(task, StructuredTask):
        notes += task.notes()
    return notes


def _open(
    model_or_path: nn.Module | str | Path, *, streamed: bool
) -> tuple[Checkpoint | None, Residency]:
    """Checkpoint and model of a path; a model object stands for itself."""
    if isinstance(model_or_path, nn.Module):
        return None, InMemory(model_or_path)
    source = Checkpoint.open(model_or_path)
    return source, open_resident(source, streamed=streamed)


def _bytes_written(source: Checkpoint, model: Any, names: Sequence[str]) -> int:
    """Copy of the checkpoint, and weights and masks of the finished blocks."""
    copy = sum(entry.n_bytes for entry in source.entries().values())
    pruned = [model.get_parameter(f"{name}.weight") for name in names]
    blocks = sum(p.numel() * p.element_size() + p.numel() // 8 for p in pruned)
    return int(copy + blocks)


def _own_tokenizer(source: Checkpoint | None, calibration: Any) -> Any:
    """Tokenizer of the checkpoint; token ids do without, should it be damaged."""
    first = next(iter(calibration), "") if isinstance(calibration, list | tuple) else ""
    ids = isinstance(calibration, Tensor) or not isinstance(first, str)
    return None if source is None or ids else load_tokenizer(source)


def _recipe(
    task: Task,
    calibration: Any,
    tokens: Calibration,
    selection: Selection | ChannelSelection,
    seed: int,
    source: Checkpoint | None,
) -> Recipe:
    """Arguments that would repeat this run."""
    pattern = task.pattern
    named = isinstance(calibration, str | Path)
    sparsity = (
        str(pattern) if isinstance(pattern, NM) else getattr(pattern, "sparsity", None)
    )
    structure: dict[str, Any] = {}
    if isinstance(pattern, Structure):
        rule = pattern.allocation or default_rule(pattern, solver_name(task.solver))
        structure = {
            "pattern": pattern.kind,
            "allocation": rule,
            "format": pattern.format,
            "unit": pattern.unit,
        }
    return Recipe(
        **structure,
        model=str(source.path) if source else None,
        method=solver_name(task.solver),
        sparsity=sparsity,
        group=getattr(pattern, "group", "row"),
        calibration=str(calibration) if named else tokens.source,
        n_sequences=tokens.tokens.shape[0],
        sequence_length=tokens.tokens.shape[1],
        error_correction=task.error_correction,
        targets=list(selection.targets),
        ignore=list(selection.ignore),
        seed=seed,
        damping=task.damping,
        options=options_of(task.solver),
    )
