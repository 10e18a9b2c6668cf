"""One run of a real model: what is asked, and what is measured.

A :class:`Cell` names the arguments of :func:`layerwise.prune_model`, and perhaps a
retraining after it. :func:`measure` does it in a process of its own, as the command line
would, from a folder to a folder.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import LayerwiseError
from layerwise.experiments.experiment import DENSE
from layerwise.experiments.sources import code_identity
from layerwise.planning.plan import plan_run
from layerwise.recovery.retrain import retrain_model
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.evaluation import evaluation_tokens
from layerwise.run.data.perplexity import perplexity
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from layerwise.run.prune import prune_model
from tests.benchmarks.real_checkpoint import digest
from tests.benchmarks.streamed_memory import anonymous_memory

LENGTH = 512  # tokens of a window
WINDOWS = 16  # of calibration
EVALUATION_WINDOWS = 64
PROMPT, NEW_TOKENS = "The history of the city begins", 60
RETRAIN = {"steps": 40, "batch_size": 4, "n_sequences": 184, "sequence_length": 256}


@dataclass(frozen=True)
class Cell:
    """One run; the defaults are those of the main tables.

    Parameters
    ----------
    method, sparsity
        As on the command line; the method ``dense`` prunes nothing.
    error_correction, damping, n_sequences, targets, format, certify
        As for `prune_model`.
    effort
        The option `effort` of ``best``.
    retrain
        Set of parameters that is retrained on the next token, see docs/recovery.md.
    """

    method: str
    sparsity: str = "0.5"
    error_correction: str = "block"
    damping: float = 0.01
    n_sequences: int = WINDOWS
    targets: str = "Linear"
    format: str | None = None
    effort: str | None = None
    certify: bool = False
    retrain: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        default = {field.name: field.default for field in fields(self)[1:]}
        changed = {name: v for name, v in values.items() if v != default[name]}
        return {"method": self.method, **changed}

    def label(self) -> str:
        """Name for the log."""
        return " ".join(f"{value}" for value in self.to_dict().values())

    def arguments(self) -> dict[str, Any]:
        """Arguments of `prune_model` besides model, texts and folder."""
        options = None if self.effort is None else {"effort": self.effort}
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "error_correction": self.error_correction,
            "damping": self.damping,
            "n_sequences": self.n_sequences,
            "sequence_length": LENGTH,
            "targets": self.targets,
            "format": self.format,
            "options": options,
            "certify": self.certify or None,
        }


@dataclass(frozen=True)
class Setting:
    """Files of all runs.

    Parameters
    ----------
    checkpoint, calibration, evaluation
        The model, and the texts to calibrate and to evaluate on.
    folder
        Where pruned models are written, and removed once they are measured.
    """

    checkpoint: Path
    calibration: Path
    evaluation: Path
    folder: Path

    def fingerprint(self, cell: Cell) -> str:
        """Hash of model, texts, the code of the method and the settings of a run.

        The code around the methods is not in it, so that a long table can be completed
        while that code is worked on: `--check` runs cells of the table again.
        """
        method = None if cell.method == DENSE else cell.method
        settings = [LENGTH, EVALUATION_WINDOWS, PROMPT, NEW_TOKENS, RETRAIN]
        decisive = [_data(self), _code(method), settings]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@cache
def _data(setting: Setting) -> list[str]:
    texts = (setting.calibration, setting.evaluation)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in texts]
    return [digest(setting.checkpoint), *hashes]


@cache
def _code(method: str | None) -> dict[str, Any]:
    return code_identity(method, [])


def measure(setting: Setting, cell: Cell) -> dict[str, Any]:
    """Do a run, evaluate its model and remove it.

    Returns
    -------
    dict
        Plain values for JSON: ``perplexity`` and ``text`` of the model; ``seconds``,
        ``cpu_seconds``, ``peak_bytes`` and ``plan`` of the run; ``mean_relative_error``,
        and figures by matrix. Only ``refused`` if layerwise refused the run.
    """
    if cell.method == DENSE:
        return _evaluated(setting, setting.checkpoint)
    out = setting.folder / hashlib.sha256(repr(cell).encode()).hexdigest()[:16]
    try:
        result = _pruned(setting, cell, out)
        if cell.retrain is not None:
            result["retrain"], out = _retrained(setting, cell, out)
        return {**result, **_evaluated(setting, out)}
    except LayerwiseError as error:
        return {"refused": str(error)}
    finally:
        for folder in setting.folder.glob(f"{out.name[:16]}*"):
            shutil.rmtree(folder)


def _pruned(setting: Setting, cell: Cell, out: Path) -> dict[str, Any]:
    """Prune, as a plan and a run."""
    arguments = {**cell.arguments(), "calibration": str(setting.calibration)}
    plan: dict[str, Any] = {}
    try:
        planned = plan_run(setting.checkpoint, device="cpu", **arguments).to_dict()
        stages = planned["stages"]
        plan["bytes"] = planned["memory"]["host"]["peak"]
        plan["floor"] = sum(stage["floor_seconds"] for stage in stages)
        times = [stage["expected_seconds"] for stage in stages]
        plan["seconds"] = None if None in times else sum(times)
    except LayerwiseError as error:
        plan["refused"] = str(error)
    started = time.process_time()
    with peak_memory() as peak:
        report = prune_model(setting.checkpoint, device="cpu", output_dir=out, **arguments)
    return {
        "plan": plan,
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - started,
        "peak_bytes": max(peak),
        "mean_relative_error": report.mean_relative_error,
        "parameters_left": report.parameters_left,
        "sparsity": report.sparsity,
        "median_proven_gap": report.median_proven_gap,
        "layers": {
            record.name: [record.relative_error, record.proven_gap, record.seconds]
            for record in report.records
        },
    }


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Anonymous memory of this process while the context lasts, in bytes.

    Pages of mapped files do not count: the system takes them back where it needs them.
    """
    seen, ended = [anonymous_memory(os.getpid())], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen[0] = max(seen[0], anonymous_memory(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _retrained(setting: Setting, cell: Cell, out: Path) -> tuple[dict[str, Any], Path]:
    """Retrain a folder on the next token; figures, and the new folder."""
    again = out.with_name(f"{out.name}-retrained")
    started = time.process_time()
    report = retrain_model(
        out,
        parameters=cell.retrain or "",
        objective="tokens",
        calibration=str(setting.calibration),
        device="cpu",
        output_dir=again,
        **RETRAIN,  # type: ignore[arg-type]
    )
    seconds = time.process_time() - started
    return {"cpu_seconds": seconds, "fraction": report.fraction}, again


def _evaluated(setting: Setting, folder: Path) -> dict[str, Any]:
    """Perplexity in the stored types, and text that a reader can judge."""
    checkpoint = Checkpoint.open(folder)
    model: Any = load_model(checkpoint)
    tokenizer: Any = load_tokenizer(checkpoint)
    tokens = evaluation_tokens(str(setting.evaluation), tokenizer)
    tokens = tokens[: EVALUATION_WINDOWS * LENGTH]
    value = perplexity(model, tokens, sequence_length=LENGTH, batch_size=4)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"perplexity": value, "text": tokenizer.decode(ids[0])}
