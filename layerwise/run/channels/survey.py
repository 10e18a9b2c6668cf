"""Survey: the cost of removing channels, at every site and for every number of them.

One pass through the dense model collects the inputs of all consumers. A site is then
described by the scores of its units, by its error curve
(:func:`layerwise.solvers.column.curve.error_curve`), and by the gain: the growth of the
loss of the whole model if a part of the units is removed at this site only.

Errors of different layers are squares of different outputs and cannot be added. Each curve
is therefore scaled to pass through the measured gain. The scaled errors are losses, and
losses of several sites nearly add up.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.streams import BATCH, capture
from layerwise.run.channels.restoration import ChannelMethod, Restoration, collect
from layerwise.run.channels.sites import Site
from layerwise.run.data.calibration import Calibration
from layerwise.run.data.perplexity import mean_loss
from layerwise.run.pipeline.blocks import advance
from layerwise.run.pipeline.matrix import naming
from layerwise.run.pipeline.removal import Run
from layerwise.solvers.column.curve import error_curve

PROBE_SHARE = 0.4  # of the units of a site is removed to measure the gain
PROBE_SEQUENCES = 16  # of the calibration text are used to measure the loss


@dataclass(frozen=True, eq=False)
class Finding:
    """Findings about one site before anything is removed.

    Parameters
    ----------
    scores
        Scores of all columns of the main consumer by the method, shape (in,).
    errors
        Objective after the removal of 0, 1, ... units of every head; None without curves.
    gain
        Growth of the mean loss of a token without `probed` units of every head.
    probed
        Number of units per head that were removed to measure the gain.
    """

    scores: Tensor
    errors: Tensor | None = None
    gain: float = 0.0
    probed: int = 0


def survey(
    run: Run[Any],
    method: ChannelMethod,
    sites: Mapping[str, tuple[Site, ...]],
    *,
    curves: bool,
) -> dict[str, Finding]:
    """Findings by the name of the site; the model is not changed.

    Parameters
    ----------
    run, method
        The dense model with its calibration data, and the method of the removal.
    sites
        Sites of channels, by the full name of the block.
    curves
        Whether to compute error curves and gains; per site they take a factorization and
        a pass of a part of the data through the model.
    """
    model, task, blocks = run.opened.model, run.task, run.selection.blocks
    batches = torch.split(run.tokens.tokens, BATCH)
    stream = capture(model, list(blocks.values()), batches)
    hidden: Sequence[Tensor] = stream.hidden
    probe = _Probe(model, run.tokens)
    dense_loss = probe.loss() if curves else 0.0
    findings: dict[str, Finding] = {}
    for index, (name, block) in enumerate(blocks.items()):
        run.on_note(f"survey of block {index + 1} of {len(blocks)}")
        calls = stream.calls[index]
        inputs = BlockInputs(
            name, block, (), calls, hidden, hidden, stored=run.stored_weights
        )
        home = next(block.parameters()).device
        block.to(task.device)
        inside = sites.get(name, ())
        collected = collect(task, inputs, inside)
        if index < len(blocks) - 1:
            hidden = list(advance(task, inputs, hidden))
        for site in inside:
            restoration = Restoration(method, task, inputs, collected=collected)
            with naming(f"{name}.{site.main}"):
                finding = _look(method, site, restoration, curves=curves)
            if curves:
                with _undone(block):
                    restoration.remove(site, site.rounds - finding.probed)
                    block.to(home)
                    gain = probe.loss() - dense_loss
                    block.to(task.device)
                finding = replace(finding, gain=gain)
            findings[site.name] = finding
        block.to(home)
    return findings


def _look(
    method: ChannelMethod, site: Site, restoration: Restoration, *, curves: bool
) -> Finding:
    """Finding of one site without its gain."""
    solver = method.solver_of(site, site.main)
    problem = restoration.problem(site.main, site.channels.pattern(1))
    single = torch.arange(problem.shape[1], device=problem.weight.device)
    scores = solver.scores(problem, single).cpu()
    if not curves:
        return Finding(scores)
    errors = error_curve(problem, solver).cpu()
    return Finding(scores, errors, probed=max(1, int(PROBE_SHARE * site.rounds)))


class _Probe:
    """Mean loss of a model on a part of the calibration data."""

    def __init__(self, model: Any, tokens: Calibration) -> None:
        self._model, self._windows = model, tokens.tokens[:PROBE_SEQUENCES]

    def loss(self) -> float:
        length = self._windows.shape[1]
        return mean_loss(self._model, self._windows.reshape(-1), sequence_length=length)


@contextmanager
def _undone(block: nn.Module) -> Iterator[None]:
    """Restore the parameters of a block at the end of the context."""
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in list(block.named_parameters()):
                if name in before:
                    parameter.copy_(before[name])
                else:  # a bias that was added
                    path, _, own = name.rpartition(".")
                    setattr(block.get_submodule(path), own, None)
