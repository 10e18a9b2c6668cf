"""What a run is asked: resolved from its arguments once, refused before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from layerwise.run.data.calibration import Calibration, check_windows, token_windows
from layerwise.run.data.texts import check_source
from layerwise.run.models.architecture import embedding_rows, model_type_of
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import OpenedModel
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.parallel import Workers
from layerwise.run.pipeline.removal import Amount, Removal, Run
from layerwise.run.pipeline.sharing import check_shared, own_sequences
from layerwise.run.pipeline.task import ERROR_CORRECTIONS, ErrorCorrection, Task, task_of
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.workers.ranks import ALONE, Ranks
from layerwise.solver import SolverLike

LONGEST_DEFAULT = 2048  # of sequence_length; contexts of 131072 tokens fit nowhere
# kinds of removal, each asked in turn whether the arguments mean it; zeros come last
REMOVALS: tuple[type[Removal[Any]], ...] = (RemoveChannels, ZeroWeights)


ONE_WORKER = Workers()


@dataclass(frozen=True)
class Settings:
    """Arguments of a run; make them with :meth:`of`.

    Parameters
    ----------
    removal
        What is removed, and by which method.
    certify
        As it was asked for; the method of the removal has it decided.
    calibration
        The calibration data.
    error_correction, targets, ignore
        As in :func:`layerwise.prune_model`.
    device, activations, workers
        Where and how it is computed, which does not decide the result.
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
        damping: float = 0.01,
        certify: bool | None = None,
        options: Mapping[str, OptionValue] | None = None,
        memory_budget: int | None = None,
        calibration: Any = None,
        n_sequences: int = 128,
        sequence_length: int | None = None,
        seed: int = 0,
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
        chosen = method_of(method, damping, certify, options or {}, memory_budget)
        amount = Amount(sparsity, pattern, group, allocation, format, multiple)
        asked = (kind.asked(chosen, amount) for kind in REMOVALS)
        settings = cls(
            removal=next(removal for removal in asked if removal is not None),
            calibration=CalibrationData(calibration, n_sequences, sequence_length, seed),
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

    def check_place(self, output: Path | None, *, from_folder: bool, ranks: Ranks) -> bool:
        """Refuse what cannot be done where it is asked for.

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

    def for_model(self, opened: OpenedModel) -> "Settings":
        """Return the settings with what papers prescribe for a family of models."""
        model_type = model_type_of(opened.model)
        return replace(self, removal=self.removal.for_model(model_type))

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
            The model does not have what was asked for.
        DataError
            The text is missing or damaged.
        """
        selection = self.removal.select(opened, self.targets, self.ignore)
        tokens = self.calibration.windows(opened, tokenizer)
        own = own_sequences(tokens, ranks)
        return Run(opened, selection, self.task(opened, ranks), tokens, own, output)

    def task(self, opened: OpenedModel, ranks: Ranks = ALONE) -> Task:
        """How every block is run and measured."""
        device = choose_device(self.device)
        method = self.removal.method
        return task_of(method, opened.adapter, self.error_correction, device, ranks)

    def hidden_store(self, run: Run[Any], folder: Path | None) -> HiddenStore:
        """Where the hidden states between two blocks are kept."""
        return hidden_store(
            self.activations,
            folder,
            run.opened.model,
            run.tokens.tokens.numel(),
            self.error_correction,
        )

    def recipe(self, source: Checkpoint | None, tokens: Calibration) -> Recipe:
        """Recipe that repeats the run, with the sizes that the calibration data have."""
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
    """Which calibration data a run reads.

    Parameters
    ----------
    source
        Text or token ids, as in :func:`layerwise.prune_model`.
    n_sequences, sequence_length, seed
        Number and length of the windows, and the seed that draws them.
    """

    source: Any
    n_sequences: int = 128
    sequence_length: int | None = None
    seed: int = 0

    def length_for(self, model: Any) -> int:
        """Length asked for, or the model's own, at most 2048."""
        longest = getattr(model.config, "max_position_embeddings", None)
        asked = self.sequence_length
        if asked is None:
            return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)
        if longest is not None and asked > longest:
            message = (
                f"sequence_length {asked} exceeds the {longest} positions of the model"
            )
            raise UsageError(message)
        return asked

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

    def windows(self, opened: OpenedModel, tokenizer: Any = None) -> Calibration:
        """Token windows for a model.

        Raises
        ------
        UsageError
            A number is impossible, or the source is unknown.
        DataError
            The text is missing, damaged or too short.
        """
        return token_windows(
            self.source,
            tokenizer or self._tokenizer(opened),
            n_sequences=self.n_sequences,
            sequence_length=self.length_for(opened.model),
            seed=self.seed,
            vocab_size=embedding_rows(opened.model),
        )

    def recipe_fields(self, tokens: Calibration) -> dict[str, Any]:
        """Fields of a recipe that read the same data again."""
        named = isinstance(self.source, str | Path)
        return {
            "calibration": str(self.source) if named else tokens.source,
            "n_sequences": tokens.tokens.shape[0],
            "sequence_length": tokens.tokens.shape[1],
            "seed": self.seed,
        }

    def _tokenizer(self, opened: OpenedModel) -> Any:
        """Tokenizer of the checkpoint; token ids do without, should it be damaged."""
        listed = isinstance(self.source, list | tuple)
        first = next(iter(self.source), "") if listed else ""
        ids = isinstance(self.source, Tensor) or not isinstance(first, str)
        return None if opened.source is None or ids else load_tokenizer(opened.source)


def method_of(
    method: SolverLike,
    damping: float = 0.01,
    certify: bool | None = None,
    options: Mapping[str, OptionValue] | None = None,
    memory_budget: int | None = None,
) -> Method:
    """Return a configured solver, and what its answers are measured by."""
    solver = configure(method, options or {})
    if memory_budget is None:
        return Method(solver, damping, certify, MEMORY_BUDGET)
    solver = with_memory_budget(solver, memory_budget)
    return Method(solver, damping, certify, memory_budget)


def check_error_correction(value: str) -> None:
    """Refuse an unknown mode."""
    if value not in ERROR_CORRECTIONS:
        message = (
            f"error_correction is one of {', '.join(ERROR_CORRECTIONS)}, got {value!r}"
        )
        raise UsageError(message)


def as_entries(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def choose_device(device: str | torch.device) -> torch.device:
    """Device by name; ``auto`` is a GPU if there is one. A device must be there."""
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
