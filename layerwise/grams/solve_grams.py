"""Solve stored layers by many methods and patterns, without the model and its data.

The layers of a gram folder (:func:`layerwise.grams.collect_grams.collect_grams`) do not
depend on each other, so every layer, method and pattern is a separate job
(:mod:`layerwise.grams.layer_jobs`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerwise.configure import OptionValue, takes_option
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.grams.gram_folder import GramManifest, read_manifest
from layerwise.grams.layer_files import missing_statistic, read_file
from layerwise.grams.layer_jobs import (
    LayerJob,
    SolvedLayer,
    forget_files,
    open_layers,
    solve_layer,
)
from layerwise.grams.solved_folder import SolvedFolder, recipe_of
from layerwise.grams.sweep import Sweep
from layerwise.limits import MOST_THREADS, MOST_WORKERS, check_limit
from layerwise.modes import in_ordinary_mode
from layerwise.run.pipeline.destination import Destination
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.removal import Amount
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.remaining import Remaining
from layerwise.run.settings import (
    choose_device,
    method_of,
)
from layerwise.run.steps import listening, status
from layerwise.run.workers.executor import Job
from layerwise.run.workers.processes import local_workers
from layerwise.run.workers.schedule import run_jobs
from layerwise.solve import resolve

OnLayer = Callable[[LayerRecord], None]


@in_ordinary_mode
def solve_grams(
    grams: str | Path,
    methods: Any = "fista",
    sparsities: float | str | Sequence[float | str] = 0.5,
    *,
    group: str = "row",
    damping: float = 0.01,
    options: Mapping[str, OptionValue] | None = None,
    certify: bool | None = None,
    memory_budget: int | None = None,
    device: str | torch.device = "auto",
    workers: int = 1,
    threads: int | None = None,
    output_dir: str | Path | None = None,
    model: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    on_start: Callable[[int], None] = lambda n_jobs: None,
    on_layer: OnLayer = lambda record: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_status: Callable[[str], None] = lambda text: None,
    on_left: Callable[[float], None] = lambda seconds: None,
) -> Sweep:
    """Prune the layers of a gram folder by every method at every sparsity.

    Parameters
    ----------
    grams
        Folder of :func:`~layerwise.grams.collect_grams.collect_grams`.
    methods
        A method as in :func:`layerwise.prune_model`, or several.
    sparsities
        A fraction or ``"n:m"``, or several.
    group
        Whether fractions hold for every ``"row"`` or ``"layer"``.
    damping, certify, memory_budget, device
        As in :func:`layerwise.prune_model`.
    options
        Hyper-parameters; each is given to the methods that have it; at least one must.
    workers
        Processes that share the layers; 1 is this process.
    threads
        CPU threads of each worker, by default an equal share of those of this process. With
        one worker it is ignored: this process keeps its threads.
    output_dir
        New folder for the pruned weights; only for one method and one sparsity.
    model
        The checkpoint that was calibrated. `output_dir` then becomes a copy of it with the
        pruned weights, as ``prune --error-correction none`` would write it.
    resume
        Continue ``output_dir.partial``.
    force
        Replace a finished `output_dir`.
    on_start, on_layer
        Called with the number of layers to solve, and after every solved layer.
    on_note
        Called with one line if a run is continued, and for every layer that is repeated
        because a worker was lost.
    on_status
        Called with what is done now.
    on_left
        Called before `on_layer` with the expected seconds to the end.

    Returns
    -------
    Sweep
        The figures of all layers.

    Raises
    ------
    UsageError, InvalidProblemError
        If an argument is impossible or does not fit the layers; nothing was solved.
    DataError
        If the folder is damaged, or `model` is not the calibrated one.
    SolveError
        If a layer failed numerically.
    WorkerError
        If workers are lost repeatedly.
    """
    start = time.perf_counter()
    folder = Path(grams)
    inputs = grams, model
    destination = Destination.of(output_dir, resume=resume, force=force, inputs=inputs)
    single = isinstance(methods, str) or callable(getattr(methods, "solve", None))
    names = [methods] if single else list(methods)
    amounts = [sparsities] if isinstance(sparsities, int | float | str) else [*sparsities]
    _check_target(destination, model, len(names) * len(amounts))
    with destination.held(), listening(on_status):
        status(f"checking the files of {folder}")
        torch_device = choose_device(device)
        each = _threads(workers, threads)
        manifest = read_manifest(folder)
        studies = _studies(
            names, amounts, group, options or {}, damping, certify, memory_budget
        )
        studies = [study.for_model(manifest.model_type) for study in studies]
        _check_layers(folder, manifest, studies)
        threads_matter = torch_device.type == "cpu"
        machine = {"device": torch_device.type, "threads": each if threads_matter else None}
        solved = None
        if destination.output is not None:
            recipe = recipe_of(manifest, studies[0], certify)
            solver = studies[0].method.solver
            solved = SolvedFolder(
                destination, folder, manifest, recipe, solver, model, machine
            )
        jobs = _jobs(folder, manifest, studies, torch_device, solved)
        if solved is not None and solved.journal.continued:
            on_note(solved.journal.continued)
        on_start(len(jobs))
        done: dict[tuple[str, str, str], LayerRecord] = {}
        remaining = Remaining(_work(manifest, studies))

        def on_done(record: LayerRecord) -> None:
            done[record.method, record.pattern, record.name] = record
            name = f"{record.method} {record.pattern} {record.name}"
            if (left := remaining.after(name, record.seconds)) is not None:
                on_left(left)
            on_layer(record)

        def keep(job: LayerJob, result: SolvedLayer) -> None:
            if solved is not None and result.file is not None:
                solved.journal.add_file(job.index, result.file)
            on_done(result.record)

        left = _unfinished(jobs, solved, on_done)
        try:
            if workers == 1:
                for job in left:
                    keep(job, solve_layer(job))
            elif left:
                name = "auto" if device == "auto" else str(torch_device)
                run_jobs(
                    (Job(key, job) for key, job in enumerate(left)),
                    local_workers(open_layers, workers, threads=each, device=name),
                    on_done=lambda job, result: keep(job.payload, result),
                    on_note=on_note,
                )
        except BaseException as error:
            if solved is not None:
                solved.journal.stop(error)
            raise
        finally:
            forget_files()
        if solved is not None:
            solved.finish()
    order = [
        (*_label(study), name) for study in studies for _, name, _ in manifest.layers()
    ]
    return Sweep(
        folder,
        damping,
        str(torch_device),
        each,
        tuple(done[key] for key in order),
        time.perf_counter() - start,
        destination.output,
    )


def _jobs(
    folder: Path,
    manifest: GramManifest,
    studies: Sequence[ZeroWeights],
    device: torch.device,
    solved: SolvedFolder | None,
) -> list[LayerJob]:
    """All layers by all studies, in the order of the files."""
    return [
        LayerJob(
            file=folder / file,
            name=name,
            zeros=study,
            device=str(device),
            folder=None if solved is None else solved.journal.blocks,
            index=0 if solved is None else solved.index(name),
            run="" if solved is None else solved.journal.run,
        )
        for file, stage in manifest.files.items()
        for study in studies
        for name in stage.layers
    ]


def _work(manifest: GramManifest, studies: Sequence[ZeroWeights]) -> dict[str, float]:
    """Expected work of every layer by method, pattern and name."""
    return {
        " ".join((*_label(study), name)): float(layer.shape[0] * layer.shape[1] ** 2)
        for _, name, layer in manifest.layers()
        for study in studies
    }


def _label(study: ZeroWeights) -> tuple[str, str]:
    """Method and pattern, as records name them."""
    return study.method.name, str(study.pattern)


def _studies(
    methods: Sequence[Any],
    sparsities: Sequence[float | str],
    group: str,
    options: Mapping[str, OptionValue],
    damping: float,
    certify: bool | None,
    memory_budget: int | None,
) -> list[ZeroWeights]:
    """Configured methods at all patterns; refuse options that no method has."""
    for name in options:
        if len(methods) > 1 and not any(takes_option(method, name) for method in methods):
            names = ", ".join(resolve(method).name for method in methods)
            message = f"none of {names} has an option {name!r}: leave it out"
            raise UsageError(message)
    studies = []
    for method in methods:
        own = {
            name: value
            for name, value in options.items()
            if len(methods) == 1 or takes_option(method, name)
        }
        for sparsity in sparsities:
            configured = method_of(method, damping, certify, own, memory_budget)
            amount = Amount(sparsity, group=group)
            studies.append(ZeroWeights.from_arguments(configured, amount))
    labels = [_label(study) for study in studies]
    if twice := [label for label in labels if labels.count(label) > 1]:
        message = f"{twice[0][0]} at {twice[0][1]} is requested twice: leave one out"
        raise UsageError(message)
    if not studies:
        message = "nothing to solve: give a method and a sparsity"
        raise UsageError(message)
    return studies


def _check_layers(
    folder: Path, manifest: GramManifest, studies: Sequence[ZeroWeights]
) -> None:
    """Refuse methods and patterns that do not fit the layers, before the first one."""
    for study in studies:
        for _, name, layer in manifest.layers():
            try:
                study.pattern.check(layer.shape)
            except InvalidProblemError as error:
                message = f"{name}: {error}"
                raise InvalidProblemError(message) from None
    first = next(read_file(folder / next(iter(manifest.files))))
    for study in studies:
        if missing := missing_statistic(study.method.solver, first.moments):
            message = (
                f"{missing}, which a gram folder does not have: use layerwise prune "
                f"--error-correction none"
            )
            raise UsageError(message)


def _check_target(
    destination: Destination, model: str | Path | None, n_studies: int
) -> None:
    if destination.output is None:
        if model is not None:
            message = "the copy of the model needs a folder: give an output as well"
            raise UsageError(message)
        return
    if n_studies != 1:
        message = (
            f"an output holds the weights of one method at one sparsity, got {n_studies}: "
            f"leave the output out, or give one method and one sparsity"
        )
        raise UsageError(message)


def _threads(workers: int, threads: int | None) -> int:
    """CPU threads of each worker."""
    if workers < 1:
        message = f"workers must be at least 1, got {workers}"
        raise UsageError(message)
    check_limit("workers", workers, MOST_WORKERS)
    if workers == 1:
        return torch.get_num_threads()
    if threads is not None and threads < 1:
        message = f"threads must be at least 1, got {threads}"
        raise UsageError(message)
    check_limit("threads", threads or 1, MOST_THREADS)
    return threads or max(1, torch.get_num_threads() // workers)


def _unfinished(
    jobs: Sequence[LayerJob], solved: SolvedFolder | None, on_done: OnLayer
) -> list[LayerJob]:
    """Jobs that are not finished; report those that a resumed run has finished."""
    left = []
    for job in jobs:
        record = None if solved is None else solved.finished(job.name)
        if record is None:
            left.append(job)
        else:
            on_done(record)
    return left
