"""Settings of a run: resolved once from its arguments, and checked before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.configure import OptionValue, configure, with_memory_budget
from layerwise.errors import UsageError
from layerwise.lower_bounds import MEMORY_BUDGET
from layerwise.run.activations.hidden_store import (
    HiddenStore,
    check_activations,
    hidden_store,
)
from layerwise.run.channels.removal import RemoveChannels
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.bos import Bos, check_bos
from layerwise.run.data.calibration import Calibration, cut
from layerwise.run.data.context import context_length
from layerwise.run.data.files import GIVEN, check_source, holds_text
from layerwise.run.data.material import material_of
from layerwise.run.data.windows import Request, check_windows
from layerwise.run.models.architecture import embedding_rows, model_type_of
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import OpenedModel
from layerwise.run.models.surgery import steps_of
from layerwise.run.models.writable import check_writable
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.destination import is_ours
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.parallel import Workers
from layerwise.run.pipeline.removal import Amount, Removal, Run
from layerwise.run.pipeline.sharing import check_shared, own_sequences
from layerwise.run.pipeline.task import ERROR_CORRECTIONS, ErrorCorrection, Task, task_of
from layerwise.run.pipeline.trim import trim_memory
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.steps import status
from layerwise.run.workers.ranks import ALONE, Ranks
from layerwise.solver import SolverLike

LONGEST_DEFAULT = 2048  # of sequence_length; contexts of 131072 tokens need too much memory
# kinds of removal: the first one that the arguments describe is used; zeros come last
REMOVALS: tuple[type[Removal[Any]], ...] = (RemoveChannels, ZeroWeights)
ONE_WORKER = Workers()


@dataclass(frozen=True)
class Settings:
    """Resolved arguments of a run; made by :meth:`of`.

    Parameters
    ----------
    removal
        What is removed, and by which method.
    certify
        The argument as it was given; the method of the removal has the resolved value.
    calibration
        The calibration data.
    error_correction, targets, ignore
        As in :func:`layerwise.prune_model`.
    device, activations, workers
        Where and how the run computes. Only another kind of device rounds differently.
    """

    removal: Removal[Any]
    calibration: "CalibrationData"
    certify: bool | None = None
    error_correction: ErrorCorrection = "block"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    device: str | torch.device = "auto"
    activations: str = "auto"
    workers: Workers = ONE_WORKER

    @classmethod
    def of(
        cls,
        method: SolverLike = "fista",
        sparsity: float | str | None = None,
        pattern: Any = None,
        *,
        group: str | None = None,
        allocation: str | None = None,
        format: str | None = None,
        multiple: int | None = None,
        keep_zeros: bool | None = None,
        damping: float = 0.01,
        certify: bool | None = None,
        options: Mapping[str, OptionValue] | None = None,
        memory_budget: int | None = None,
        calibration: Any = None,
        n_sequences: int = 128,
        sequence_length: int | None = None,
        seed: int = 0,
        bos: str = "auto",
        targets: str | Sequence[str] = "Linear",
        ignore: str | Sequence[str] = ("lm_head",),
        workers: int = 1,
        ray: str | None = None,
        error_correction: ErrorCorrection = "block",
        device: str | torch.device = "auto",
        activations: str = "auto",
    ) -> "Settings":
        """Resolve arguments with the names and defaults of :func:`layerwise.prune_model`.

        Raises
        ------
        UsageError, InvalidProblemError
            If an argument is impossible or contradicts another one.
        """
        configured = method_of(method, damping, certify, options or {}, memory_budget)
        check_pattern_name(pattern)
        amount = Amount(sparsity, pattern, group, allocation, format, multiple, keep_zeros)
        removals = (kind.from_arguments(configured, amount) for kind in REMOVALS)
        settings = cls(
            removal=next(removal for removal in removals if removal is not None),
            calibration=CalibrationData(
                calibration, n_sequences, sequence_length, seed, bos
            ),
            certify=certify,
            targets=as_entries(targets),
            ignore=as_entries(ignore),
            workers=Workers(workers, ray),
            error_correction=error_correction,
            device=device,
            activations=activations,
        )
        check_error_correction(settings.error_correction)
        check_activations(settings.activations)
        return settings

    def check_placement(
        self, output: Path | None, *, from_folder: bool, ranks: Ranks
    ) -> bool:
        """Refuse outputs, workers and ranks that the removal does not support.

        Returns
        -------
        bool
            Whether the blocks of the model can be loaded one by one.
        """
        streamed = output is not None and not self.removal.needs_whole_model
        self.workers.check(self.error_correction, streamable=streamed and from_folder)
        if output is not None:
            self.removal.check_storable()
        refusal = self.removal.refused_by_ranks
        check_shared(ranks, refusal, workers=self.workers.are_others)
        return streamed

    def check_selection(self, opened: OpenedModel) -> None:
        """Refuse what :meth:`run_on` would refuse, for a model without parameters."""
        chosen = self.for_model(opened)
        chosen.removal.select(opened, self.targets, self.ignore)

    def for_model(self, opened: OpenedModel) -> "Settings":
        """Return the settings with what papers prescribe for the family of a model."""
        model_type, source = model_type_of(opened.model), opened.source
        ours = source is not None and is_ours(source.path)
        return replace(self, removal=self.removal.for_model(model_type, ours=ours))

    def run_on(
        self,
        opened: OpenedModel,
        tokenizer: Any = None,
        ranks: Ranks = ALONE,
        output: Path | None = None,
    ) -> Run[Any]:
        """Check everything against a model, and read the calibration data.

        Raises
        ------
        UsageError, InvalidProblemError, UnsupportedModelError
            The settings do not fit the model.
        DataError
            The text is missing or damaged.
        """
        selection = self.removal.select(opened, self.targets, self.ignore)
        if output is not None and opened.source is None:
            cut_again = self.removal.pattern is None and steps_of(opened.model)
            if not cut_again:  # its writer knows the record of the cuts
                check_writable(opened.model, tokenizer)
        tokens = self.calibration.windows(opened, tokenizer)
        trim_memory()  # an encoded text takes many times its size
        own = own_sequences(tokens, ranks)
        return Run(opened, selection, self.task(opened, ranks), tokens, own, output)

    def task(self, opened: OpenedModel, ranks: Ranks = ALONE) -> Task:
        """Task of the run: how every block is run and measured."""
        device = choose_device(self.device)
        method = self.removal.method
        return task_of(method, opened.adapter, self.error_correction, device, ranks)

    def hidden_store(self, run: Run[Any], folder: Path | None) -> HiddenStore:
        """Store for the hidden states between two blocks."""
        return hidden_store(
            self.activations,
            folder,
            run.opened.model,
            run.tokens.tokens.numel(),
            self.error_correction,
        )

    def recipe(self, source: Checkpoint | None, tokens: Calibration) -> Recipe:
        """Recipe that repeats the run, with the actual sizes of the calibration data."""
        return Recipe(
            **self.removal.recipe_fields(),
            **self.calibration.recipe_fields(tokens),
            model=None if source is None else str(source.path),
            error_correction=self.error_correction,
            targets=list(self.targets),
            ignore=list(self.ignore),
            certify=self.certify,
        )


@dataclass(frozen=True)
class CalibrationData:
    """Calibration data of a run.

    Parameters
    ----------
    source
        Text or token ids, as in :func:`layerwise.prune_model`.
    n_sequences, sequence_length, seed
        Number and length of the windows, and the seed by which they are drawn.
    bos
        ``"auto"``, ``"always"`` or ``"never"``: whether every window begins with BOS.
    """

    source: Any
    n_sequences: int = 128
    sequence_length: int | None = None
    seed: int = 0
    bos: str = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)

    def length_for(self, model: Any) -> int:
        """Given length, or the longest context of the model, at most 2048."""
        longest = context_length(model.config)
        length = self.sequence_length
        if length is None:
            return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)
        if longest is not None and length > longest:
            message = (
                f"sequence_length {length} exceeds the {longest} positions of the model"
            )
            raise UsageError(message)
        return length

    def check(self, model: Any) -> int:
        """Refuse what :meth:`windows` would refuse before it reads a text.

        Returns
        -------
        int
            Length of the windows.
        """
        length = self.length_for(model)
        check_windows(self.n_sequences, length, self.seed)
        if isinstance(self.source, str | Path):
            check_source(self.source)
        return length

    def check_tokenizer(self, checkpoint: Checkpoint, tokenizer: Any = None) -> None:
        """Refuse a tokenizer that is damaged, or missing for a text that is named.

        Without a source, a text may be named later.
        """
        if tokenizer is not None or not isinstance(self.source, str | Path | None):
            return
        missing = load_tokenizer(checkpoint) is None
        if missing and self.source is not None and holds_text(self.source):
            message = f"{self.source} needs a tokenizer: pass one"
            raise UsageError(message)

    def windows(self, opened: OpenedModel, tokenizer: Any = None) -> Calibration:
        """Read the token windows for a model.

        Raises
        ------
        UsageError
            A value is impossible, or the source is unknown.
        DataError
            The text is missing, damaged or too short.
        """
        model = opened.model
        request = Request(
            self.n_sequences,
            self.length_for(model),
            self.seed,
            vocab_size=embedding_rows(model),
        )
        named = isinstance(self.source, str | Path)
        status(f"reading the calibration data{f' in {self.source}' if named else ''}")
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws its seed from there
            material = material_of(self.source, "train", request.characters)
            if tokenizer is None and material.needs_tokenizer and opened.source is not None:
                tokenizer = load_tokenizer(opened.source)
            request.bos = self.bos_for(model, tokenizer)
            return cut(material, tokenizer, request)

    def bos_for(self, model: Any, tokenizer: Any) -> Bos:
        """BOS for the windows of a model."""
        return Bos.of(self.bos, model_type_of(model), tokenizer, model.config)

    def recipe_fields(self, tokens: Calibration) -> dict[str, Any]:
        """Fields of a recipe by which a run reads the same data again."""
        named = isinstance(self.source, str | Path)
        return {
            "calibration": str(self.source) if named else tokens.source + GIVEN,
            "n_sequences": tokens.tokens.shape[0],
            "sequence_length": tokens.tokens.shape[1],
            "seed": self.seed,
            "bos": "never" if tokens.bos is None else "always",
        }


def method_of(
    method: SolverLike,
    damping: float = 0.01,
    certify: bool | None = None,
    options: Mapping[str, OptionValue] | None = None,
    memory_budget: int | None = None,
) -> Method:
    """Return the method: a configured solver, its damping and its certificates."""
    solver = configure(method, options or {})
    if memory_budget is None:
        return Method(solver, damping, certify, MEMORY_BUDGET)
    solver = with_memory_budget(solver, memory_budget)
    return Method(solver, damping, certify, memory_budget)


def check_pattern_name(pattern: Any) -> None:
    """Refuse a word that is neither a pattern nor the name of a kind of removal."""
    names = [name for kind in REMOVALS for name in kind.names()]
    if not isinstance(pattern, str) or pattern in names or ":" in pattern:
        return
    try:
        float(pattern)
    except ValueError:
        message = f'pattern is {", ".join(names)}, "n:m" or a Pattern, got {pattern!r}'
        raise UsageError(message) from None


def check_error_correction(value: str) -> None:
    """Refuse an unknown mode."""
    if value not in ERROR_CORRECTIONS:
        message = (
            f"error_correction is one of {', '.join(ERROR_CORRECTIONS)}, got {value!r}"
        )
        raise UsageError(message)


def as_entries(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def choose_device(device: str | torch.device) -> torch.device:
    """Device by name, which must be available; ``auto`` is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {str(device)!r} cannot be used: {reason}; try auto or cpu"
        raise UsageError(message) from None
    return chosen
