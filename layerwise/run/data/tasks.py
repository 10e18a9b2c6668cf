"""Scores on benchmark tasks, as lm-eval (the extra ``eval``) computes them.

The model and its tokenizer are handed over as objects, so that every folder which
layerwise opens can be scored, also one in the native format. What lm-eval sets for a whole
process (seeds, environment, log, warning filters) is put back.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.atomic import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8
CLOSE = 0.6  # similarity of a name that may have been meant


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks.

    Parameters
    ----------
    task, metric, filter
        Names of lm-eval; the filter is what extracts answers from generated text, and
        ``none`` where there is nothing to extract.
    value
        The metric over all examples.
    stderr
        Its standard error; None where lm-eval knows none.
    higher_is_better
        None where the task does not say.
    n_examples, n_shots
        Examples that were scored, and solved examples in front of each.
    version
        Of the definition of the task: compare equal versions only.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    n_examples: int
    n_shots: int
    version: str


@dataclass(frozen=True)
class TaskScores:
    """Scores, and how they were measured.

    Parameters
    ----------
    lm_eval
        Version of lm-eval.
    limit
        Most examples per task; None for all.
    add_bos
        Whether every text begins with BOS; None if the tokenizer decided.
    scores
        In the order of lm-eval: tasks, then groups.
    """

    lm_eval: str
    limit: int | None
    add_bos: bool | None
    scores: tuple[Score, ...]

    def write(self, path: Path, model: str) -> None:
        """Write everything as JSON, with the name of the model."""
        content = {"model": model, **asdict(self)}
        atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def find_tasks(names: Sequence[str], folder: Path | None = None) -> TaskManager:
    """Task manager of lm-eval that knows all `names`, tasks and groups.

    Parameters
    ----------
    names
        Names of lm-eval, or of YAML files in the `folder`.
    folder
        More tasks, which win over those of lm-eval. A task can name Python code in its
        folder, and that code is executed.

    Raises
    ------
    UsageError
        lm-eval is not installed, there is no such folder, or a name is unknown.
    """
    if folder is not None and not folder.is_dir():
        message = f"there is no task folder {folder}"
        raise UsageError(message)
    with _kept_apart():
        task_manager = _import_lm_eval().tasks.TaskManager
        if folder is not None:  # its own tasks do not need the index of all others
            manager: TaskManager = task_manager(include_path=folder, include_defaults=False)
            if not manager.all_tasks:
                message = f"{folder} defines no task: it needs a readable .yaml file"
                raise UsageError(message)
            if set(names) <= set(manager.all_subtasks):
                return manager
        manager = task_manager(include_path=folder)
    _refuse_unknown(names, manager.all_tasks)
    return manager


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    manager: TaskManager,
    limit: int | None = None,
    add_bos: bool | None = None,
) -> TaskScores:
    """Scores of a causal language model, without solved examples unless a task has them.

    Parameters
    ----------
    model
        The model, on its device; scored in evaluation mode, which is undone.
    tokenizer
        Its tokenizer.
    names
        Tasks or groups that the `manager` knows.
    manager
        Of :func:`find_tasks`.
    limit
        Most examples per task; None for all.
    add_bos
        Whether every text begins with BOS; None: the tokenizer decides.

    Raises
    ------
    DataError
        A data set cannot be loaded, or a task cannot be evaluated.
    """
    with _kept_apart(), evaluation_mode(model):
        lm_eval = _import_lm_eval()
        try:
            evaluated = lm_eval.simple_evaluate(
                model=lm_eval.models.huggingface.HFLM(
                    pretrained=model,
                    tokenizer=_adding(tokenizer, add_bos),
                    add_bos_token=add_bos,
                    batch_size=BATCH_SIZE,
                ),
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                log_samples=False,
            )
        except Exception as error:
            message = (
                f"{', '.join(names)} cannot be evaluated: {one_line(error)}; "
                f"go online once to cache a data set, or mend the task"
            )
            raise DataError(message) from error
    return TaskScores(lm_eval.__version__, limit, add_bos, tuple(_scores(evaluated)))


def _adding(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> Any:
    """Copy of a tokenizer, which lm-eval gives a padding token; it adds BOS as asked."""
    copy: Any = deepcopy(tokenizer)
    if add_bos and hasattr(copy, "add_bos_token"):
        copy.add_bos_token = True
    return copy


def _import_lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        message = 'tasks are evaluated by lm-eval: pip install "layerwise[eval]"'
        raise UsageError(message) from error
    return lm_eval


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    problems = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=CLOSE)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            problems.append(f"{name!r}{hint}")
    if problems:
        message = f"unknown task {', '.join(problems)}; `lm-eval ls tasks` lists all"
        raise UsageError(message)


def _scores(evaluated: Mapping[str, Any]) -> Iterator[Score]:
    """Every number among the results, whose keys are ``metric,filter``."""
    for task, figures in evaluated["results"].items():
        directions = evaluated["higher_is_better"].get(task) or {}
        for key, value in figures.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = figures.get(f"{metric}_stderr,{filter_}")
            yield Score(
                task=task,
                metric=metric,
                filter=filter_,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, Real) else None,
                higher_is_better=directions.get(metric),
                n_examples=int(figures["sample_len"]),
                n_shots=int(evaluated["n-shot"].get(task, 0)),
                version=str(evaluated["versions"].get(task)),
            )


@contextmanager
def _kept_apart() -> Iterator[None]:
    """Put back what lm-eval sets; show its progress bars on a terminal only."""
    python, numpy = random.getstate(), np.random.get_state()
    variables, disabled = set(os.environ), logging.root.manager.disable
    logging.disable(logging.WARNING)
    gpus = range(torch.cuda.device_count())
    try:
        with (
            ExitStack() as streams,
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=gpus),
        ):
            if not sys.stderr.isatty():
                nowhere = streams.enter_context(open(os.devnull, "w"))
                streams.enter_context(redirect_stderr(nowhere))
            streams.enter_context(redirect_stdout(sys.stderr))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        logging.disable(disabled)
        for name in set(os.environ) - variables:
            del os.environ[name]
