"""Survey: the cost of removing channels, at every site and for every number of them.

One pass through the dense model collects the inputs of all consumers. A site is then
described by the scores of its units, by its error curve
(:func:`layerwise.solvers.column.curve.error_curve`), and by the gain: the growth of the
loss of the whole model if a part of the units is removed at this site only.

Errors of different layers are squares of different outputs and cannot be added. Each curve
is therefore scaled to pass through the measured gain. The scaled errors are losses, and
losses of several sites nearly add up.

The findings of a block are kept as soon as they are complete, and a resumed run continues
with the next one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.streams import BATCH, capture, starting_at
from layerwise.run.channels.findings import Finding, read_findings, write_findings
from layerwise.run.channels.restoration import ChannelMethod, Restoration, collect
from layerwise.run.channels.sites import Site
from layerwise.run.data.perplexity import mean_loss
from layerwise.run.pipeline.blocks import advance
from layerwise.run.pipeline.matrix import naming
from layerwise.run.pipeline.removal import Run
from layerwise.run.steps import about
from layerwise.solvers.column.curve import error_curve

PROBE_SHARE = 0.4  # of the units of a site is removed to measure the gain
PROBE_SEQUENCES = 16  # of the calibration text are used to measure the loss


def survey(
    run: Run[Any],
    method: ChannelMethod,
    sites: Mapping[str, tuple[Site, ...]],
    *,
    curves: bool,
) -> dict[str, Finding]:
    """Findings by the name of the site; the model is not changed.

    What an earlier run has kept is not done again.

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
    blocks = run.selection.blocks
    known: Sequence[dict[str, Finding] | None]
    known = [read_findings(run.states, index) for index in range(len(blocks))]
    if None in known:
        known = _Survey(run, method, sites, curves=curves).complete(known)
    return {name: one for found in known if found for name, one in found.items()}


class _Survey:
    """One pass through the dense model, block by block."""

    def __init__(
        self,
        run: Run[Any],
        method: ChannelMethod,
        sites: Mapping[str, tuple[Site, ...]],
        *,
        curves: bool,
    ) -> None:
        self._run, self._method, self._sites = run, method, sites
        self._blocks: Mapping[str, nn.Module] = run.selection.blocks
        self._probe = _Probe(run) if curves else None

    def complete(
        self, known: Sequence[dict[str, Finding] | None]
    ) -> list[dict[str, Finding]]:
        """Findings of all blocks: those that are known, and the others."""
        run, blocks = self._run, self._blocks
        missing = [index for index, found in enumerate(known) if found is None]
        if (there := len(known) - len(missing)) > 0:
            run.on_note(f"continuing the survey: {there} of {len(known)} blocks are there")
        batches = torch.split(run.tokens.tokens, BATCH)
        stream = capture(run.opened.model, list(blocks.values()), batches)
        hidden: Sequence[Tensor] = stream.hidden
        start, results = time.perf_counter(), list(known)
        for index, (name, block) in enumerate(list(blocks.items())[: missing[-1] + 1]):
            calls = stream.calls[index]
            inputs = BlockInputs(
                name, block, (), calls, hidden, hidden, stored=run.stored_weights
            )
            home = next(block.parameters()).device
            block.to(run.task.device)
            if index in missing:
                done = missing.index(index)
                run.on_note(_progress(index, len(blocks), start, done, len(missing)))
                results[index] = found = self._look_at(index, inputs, home)
                write_findings(run.states, index, found)
            if index < missing[-1]:
                hidden = list(advance(run.task, inputs, hidden))
            block.to(home)
        return [found for found in results if found is not None]

    def _look_at(
        self, index: int, inputs: BlockInputs, home: torch.device
    ) -> dict[str, Finding]:
        """Findings of one block, which is left as it was."""
        method, task, block = self._method, self._run.task, inputs.block
        sites, findings = self._sites.get(inputs.name, ()), {}
        collected = collect(task, inputs, sites)
        for site in sites:
            restoration = Restoration(method, task, inputs, collected=collected)
            with naming(f"{inputs.name}.{site.main}"):
                finding = _look(method, site, restoration, curves=self._probe is not None)
            if self._probe is not None:
                with _undone(block):
                    restoration.remove(site, site.rounds - finding.probed)
                    block.to(home)
                    gain = self._probe.gain(index, inputs.dense)
                    block.to(task.device)
                finding = replace(finding, gain=gain)
            findings[site.name] = finding
        return findings


def _progress(index: int, total: int, start: float, done: int, asked: int) -> str:
    """Line for the log before a block, with the time that the rest may take."""
    text = f"survey of block {index + 1} of {total}"
    if done == 0:
        return text
    left = (time.perf_counter() - start) / done * (asked - done)
    return f"{text}, {about(left)} left"


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
    """Growth of the mean loss of a model on a part of the calibration data."""

    def __init__(self, run: Run[Any]) -> None:
        self._model = run.opened.model
        self._blocks = list(run.selection.blocks.values())
        self._windows = run.tokens.tokens[:PROBE_SEQUENCES]
        self._dense_loss = self._loss()

    def gain(self, index: int, hidden: Sequence[Tensor]) -> float:
        """Growth by what was done to one block, whose inputs are those of the dense model.

        The blocks before it do not run again.
        """
        with starting_at(self._model, self._blocks, index, self._windows, hidden):
            return self._loss() - self._dense_loss

    def _loss(self) -> float:
        length = self._windows.shape[1]
        ids = self._windows.reshape(-1)
        return mean_loss(self._model, ids, sequence_length=length, batch_size=BATCH)


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
