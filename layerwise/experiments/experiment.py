"""One experiment on a packaged model: prune it, and measure error and perplexity.

A :class:`PackagedModel` is opened once for many experiments: its texts are encoded once,
and only when needed. Its fingerprints cover everything that decides the result of an
experiment, so that results can be stored.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import ADAPTERS
from layerwise.demo import calibration_text, evaluation_text, model_path
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.experiments.sources import code_identity
from layerwise.patterns import parse_pattern
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.perplexity import perplexity
from layerwise.run.data.tokens import encode
from layerwise.run.models.architecture import embedding_rows
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from layerwise.run.pipeline.task import ErrorCorrection
from layerwise.run.prune import prune_model

DENSE = "dense"  # the method that does not prune
N_SEQUENCES = 64
LENGTH = 256  # tokens of a window: the context length of the packaged models
EVALUATION_TOKENS = 32768  # tokens of the held-out text


@dataclass(frozen=True)
class Experiment:
    """Settings of an experiment: one packaged model, pruned by one method.

    Parameters
    ----------
    model
        Name of a packaged model.
    method
        Name of a solver, names joined by ``+``, or ``"dense"`` for no pruning.
    pattern
        As on the command line.
    error_correction, seed, kind, allocation, format
        As for `prune_model`. To remove channels, `kind` is the pattern of `prune_model`
        and `pattern` the sparsity.
    """

    model: str
    method: str
    pattern: str = ""
    error_correction: ErrorCorrection = "block"
    seed: int = 0
    kind: str | None = None
    allocation: str | None = None
    format: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def removal(self) -> dict[str, Any]:
        """Arguments of `prune_model` that decide what is removed."""
        if self.kind is None:
            return {"pattern": parse_pattern(self.pattern)}
        return {
            "sparsity": self.pattern,
            "pattern": self.kind,
            "allocation": self.allocation,
            "format": self.format,
        }


class PackagedModel:
    """A packaged model with its calibration and evaluation text.

    Parameters
    ----------
    name
        One of `layerwise.demo.MODELS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.checkpoint = Checkpoint.open(model_path(name))

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Calibration stream and evaluation stream."""
        tokenizer = load_tokenizer(self.checkpoint)
        assert tokenizer is not None  # every packaged model has one
        rows = embedding_rows(load_model(self.checkpoint))
        evaluation = encode(evaluation_text(), tokenizer, rows)[:EVALUATION_TOKENS]
        return encode(calibration_text(), tokenizer, rows), evaluation

    @property
    def calibration(self) -> Tensor:
        """Token ids of the training text of the models."""
        return self._tokens[0]

    @property
    def evaluation(self) -> Tensor:
        """Token ids of the held-out text."""
        return self._tokens[1]

    @cached_property
    def _data(self) -> dict[str, Any]:
        """Hashes of the files and texts."""
        texts = (calibration_text(), evaluation_text())
        return {
            "files": self.checkpoint.sha256(),
            "texts": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        }

    def fingerprint(self, method: str) -> str:
        """Hash of everything outside the :class:`Experiment` that decides its result.

        This covers weights, tokenizer, texts, settings, versions, threads, the code of
        the run, and the code of the method with its hyper-parameters.
        """
        modules = ["layerwise.run.prune", "layerwise.run.data.perplexity"]
        adapter = ADAPTERS[self.checkpoint.config["model_type"]]
        modules.append(adapter.partition(":")[0])
        decisive = {
            **self._data,
            **code_identity(None if method == DENSE else method, modules),
            "settings": [N_SEQUENCES, LENGTH, EVALUATION_TOKENS],
            "threads": torch.get_num_threads(),  # they change the order of rounding
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def answer(self, experiment: Experiment) -> dict[str, Any]:
        """Do an experiment; the result consists of plain values for JSON.

        Returns
        -------
        dict
            ``perplexity``, and for a pruned model ``mean_relative_error``, ``seconds``,
            ``records`` and ``parameters_left``; or only ``refused``, the reason of a
            refusal.

        Raises
        ------
        SolveError
            A layer failed numerically.
        """
        calibration, evaluation = self._tokens
        model = load_model(self.checkpoint)
        if experiment.method == DENSE:
            return {"perplexity": perplexity(model, evaluation, sequence_length=LENGTH)}
        try:
            report = prune_model(
                model,
                experiment.method,
                **experiment.removal(),
                calibration=calibration,
                n_sequences=N_SEQUENCES,
                sequence_length=LENGTH,
                error_correction=experiment.error_correction,
                seed=experiment.seed,
            )
        except (InvalidProblemError, UsageError) as error:
            return {"refused": str(error)}
        return {
            "perplexity": perplexity(model, evaluation, sequence_length=LENGTH),
            "mean_relative_error": report.mean_relative_error,
            "seconds": report.seconds,
            "records": [record.to_dict() for record in report.records],
            "parameters_left": report.parameters_left,
        }
