"""Channels of a block: choose the kept ones, restore the layers that read them.

Couplings are processed in the order of the data flow. The channels of a coupling are chosen
on its main consumer; further consumers, such as ``x_proj`` of Mamba, are restored on the
same channels before it. The block keeps its shapes here. The columns of removed channels
are exactly zero, so the block computes the same as the smaller one
(:mod:`layerwise.run.models.surgery`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.adapters import Stage
from layerwise.evaluate import relative_error
from layerwise.patterns import FixedMask, Pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.channels.sites import Site
from layerwise.run.models.rewrite import add_bias
from layerwise.run.pipeline.blocks import collect_at_once, collect_pair
from layerwise.run.pipeline.matrix import naming, record_of
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.solve import solve
from layerwise.solver import Solver
from layerwise.solvers.columns import ColumnPruning


@dataclass(frozen=True)
class ChannelMethod:
    """How channels are chosen and their consumers restored.

    Parameters
    ----------
    method
        Solver and damping.
    label
        What is removed, in words, for the records.
    holds_bias
        Whether the main consumers can get a bias in the format of the run.
    """

    method: Method
    label: str
    holds_bias: bool = True

    def solver_of(self, site: Site, consumer: str) -> Any:
        """The solver, without its bias where the layer cannot have one."""
        if consumer == site.main and self.holds_bias:
            return self.method.solver
        return without_bias(self.method.solver)


class Restoration:
    """A block while channels are removed from it.

    Parameters
    ----------
    method, task, inputs, on_layer
        Method and task, the block, and the function that is called after every matrix.
    collected
        Moments of the dense block by linear, for independent stages.
    dense
        The dense side of the block. With it, moments are collected when they are needed,
        from the dense block and from the block with the weights written so far.
    """

    def __init__(
        self,
        method: ChannelMethod,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        *,
        collected: Mapping[str, MomentAccumulator] | None = None,
        dense: DenseSide | None = None,
    ) -> None:
        self._method = method
        self._task, self._inputs, self._on_layer = task, inputs, on_layer
        self._collected, self._dense = collected or {}, dense
        self._pruned = PrunedSide(inputs, task.device)
        self._same = inputs.pruned is inputs.dense  # until the first weight is written
        self.result = PrunedBlock()

    def remove(self, site: Site, keep: int) -> None:
        """Choose the channels of a coupling and restore its consumers."""
        main, others = site.main, site.coupling.consumers[:-1]
        pattern: Pattern = site.channels.pattern(keep)
        if others:
            with naming(f"{self._inputs.name}.{main}"):
                problem = self.problem(main, pattern)
                with timed("solve"):
                    kept = solve(problem, self._method.solver_of(site, main)).mask[0]
            for name in others:
                self._write(site, name, self._fixed(name, kept))
            pattern = self._fixed(main, kept)
        self._write(site, main, pattern)

    def problem(self, name: str, pattern: Pattern) -> LayerProblem:
        """Problem of one consumer of the block with its current weights."""
        accumulator = self._collect(name)
        return LayerProblem.from_moments(
            self._weight(name).contiguous(),
            accumulator.moments(),
            pattern=pattern,
            damping=self._method.method.damping,
            drift=None if self._dense is None else accumulator.drift(0),
        )

    def _weight(self, name: str) -> Tensor:
        """Weight of a consumer with what was written so far, in the type of the files."""
        own = self._task.adapter.weight(self._inputs.block, name)
        written = self.result.weights.get(name)
        if written is None:
            return self._inputs.weight(self._task.adapter, name)
        return own if written.dtype == own.dtype else written.to(own.device)

    def _collect(self, name: str) -> MomentAccumulator:
        if self._dense is None:
            return self._collected[name]
        pruned = None if self._same else self._pruned
        return collect_pair(self._task, self._inputs, self._dense, pruned, Stage((name,)))

    def _fixed(self, name: str, kept: Tensor) -> FixedMask:
        weight = self._task.adapter.weight(self._inputs.block, name)
        return FixedMask(kept.expand(weight.shape).clone())

    def _write(self, site: Site, name: str, pattern: Pattern) -> None:
        """Solve the problem of one consumer and write its weight and bias."""
        task, full_name = self._task, f"{self._inputs.name}.{name}"
        with naming(full_name):
            problem = self.problem(name, pattern)
            start = time.perf_counter()
            with timed("solve"):
                solution = solve(problem, self._method.solver_of(site, name))
            stored = solution.weight.to(problem.weight.dtype)
            shift = solution.bias
            if shift is not None:
                shift = shift.to(stored.dtype)
            error = relative_error(problem, stored, shift)
            seconds = time.perf_counter() - start
            record = record_of(
                self._method.method,
                full_name,
                problem,
                solution,
                stored,
                error,
                seconds,
                self._method.label,
            )
        linear = task.adapter.linear(self._inputs.block, name)
        task.adapter.weight(self._inputs.block, name).copy_(stored)
        self._same = False
        self.result.weights[name] = stored.cpu()
        self.result.masks[name] = solution.mask.cpu()
        if shift is not None:
            add_bias(linear, shift)
            self.result.biases[name] = linear.get_parameter("bias").detach().cpu().clone()
        self.result.records.append(record)
        self._on_layer(record)


def without_bias(solver: Solver) -> Solver:
    """Return the method for a layer that cannot have a bias."""
    if not isinstance(solver, ColumnPruning):
        return solver
    if solver.restoration == "bias":
        return replace(solver, restoration="none")
    if solver.restoration == "intercept":
        return replace(solver, restoration="least-squares")
    return solver


def stages_at(sites: Iterable[Site]) -> tuple[Stage, ...]:
    """Consumers of channels, each a stage of its own."""
    return tuple(Stage((name,)) for site in sites for name in site.coupling.consumers)


def collect(
    task: Task, inputs: BlockInputs, sites: Sequence[Site]
) -> dict[str, MomentAccumulator]:
    """Moments of all consumers of a block with its current weights, by linear."""
    stages = stages_at(sites)
    accumulators = collect_at_once(task, replace(inputs, stages=stages))
    names = [stage.linears[0] for stage in stages]
    return dict(zip(names, accumulators, strict=True))
