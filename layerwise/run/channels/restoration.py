"""Channels of a block: choose which stay, restore the layers that read them.

Couplings are taken in the order of the data flow. The channels of one are chosen on its
main consumer; further consumers, such as ``x_proj`` of Mamba, are restored on the same
channels before it. The block keeps its shapes here: the columns of removed channels are
exactly zero, which makes the block compute what the smaller one will
(:mod:`layerwise.run.models.surgery`).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from layerwise.accumulator import MomentAccumulator
from layerwise.adapters import Adapter, Channels, Coupling, Stage
from layerwise.evaluate import relative_error
from layerwise.patterns import FixedMask, Pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.models.rewrite import add_bias
from layerwise.run.pipeline.blocks import collect_at_once, collect_pair
from layerwise.run.pipeline.matrix import naming, record_of
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.solve import solve


@dataclass(frozen=True)
class Site:
    """One coupling in one block.

    Parameters
    ----------
    block
        Full name of the block.
    coupling, channels
        The declaration, and what it is in this block.
    allowed
        Numbers of units that the format has a place for; None: any.
    """

    block: str
    coupling: Coupling
    channels: Channels
    allowed: frozenset[int] | None = None

    @property
    def name(self) -> str:
        """Full name, such as ``model.layers.0.mlp``."""
        return f"{self.block}.{self.coupling.name}"

    @property
    def main(self) -> str:
        """Linear on which channels are chosen, relative to the block."""
        return self.coupling.consumers[-1]

    @property
    def heads(self) -> int:
        """Heads that must keep equally many units; 1 where units are free."""
        balance = self.channels.balance
        return 1 if balance is None else int(balance.max()) + 1

    @property
    def rounds(self) -> int:
        """Units of every head: how often all heads can lose one."""
        return self.channels.units // self.heads


@dataclass(frozen=True)
class ChannelTask(Task):
    """What to do to every block of a structured run.

    Parameters
    ----------
    sites
        Couplings by the full name of the block, in the order of the data flow.
    keep
        Units that stay, of every head, by the name of the site.
    holds_bias
        Whether the main consumers can get a bias in the format of the run.
    """

    sites: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    holds_bias: bool = True

    def prune(
        self,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        side: DenseSide | None = None,
    ) -> PrunedBlock:
        """Remove the columns of channels of a block in place."""
        leaving = [
            (site, self.keep[site.name])
            for site in self.sites.get(inputs.name, ())
            if self.keep[site.name] < site.rounds
        ]
        collected = None if self.staged else self.collect(inputs)
        restoration = Restoration(self, inputs, collected, on_layer, side)
        for site, keep in leaving:
            restoration.remove(site, keep)
        return restoration.result

    def collect(self, inputs: BlockInputs) -> dict[str, MomentAccumulator]:
        """Moments of all consumers of a block as it is, by linear."""
        names = [
            name
            for site in self.sites.get(inputs.name, ())
            for name in site.coupling.consumers
        ]
        stages = tuple(Stage((name,)) for name in names)
        accumulators = collect_at_once(self, replace(inputs, stages=stages))
        return dict(zip(names, accumulators, strict=True))

    def dense_side(self, inputs: BlockInputs) -> DenseSide:
        """The block as it is, for the inputs of the consumers that will be restored."""
        stages = tuple(
            Stage((name,))
            for site in self.sites.get(inputs.name, ())
            if self.keep[site.name] < site.rounds
            for name in site.coupling.consumers
        )
        return DenseSide(inputs, stages, self.device)

    def solver_of(self, site: Site, consumer: str) -> Any:
        """The method, without its bias where the layer cannot have one."""
        if consumer == site.main and self.holds_bias:
            return self.solver
        return without_bias(self.solver)


class Restoration:
    """A block while its channels leave.

    Parameters
    ----------
    task, inputs, on_layer
        As for :meth:`ChannelTask.prune`.
    collected
        Moments of the dense block by linear; None: collected when they are needed, from
        the dense block and from the block as it is by then.
    """

    def __init__(
        self,
        task: ChannelTask,
        inputs: BlockInputs,
        collected: Mapping[str, MomentAccumulator] | None,
        on_layer: OnLayer = lambda record: None,
        side: DenseSide | None = None,
    ) -> None:
        self._task, self._inputs, self._on_layer = task, inputs, on_layer
        self._collected = collected
        self._dense: DenseSide | None = None
        if collected is None:
            self._dense = side or task.dense_side(inputs)
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
                    kept = solve(problem, self._task.solver_of(site, main)).mask[0]
            for name in others:
                self._write(site, name, self._fixed(name, kept))
            pattern = self._fixed(main, kept)
        self._write(site, main, pattern)

    def problem(self, name: str, pattern: Pattern) -> LayerProblem:
        """Problem of one consumer of the block as it is now."""
        task, accumulator = self._task, self._collect(name)
        return LayerProblem.from_moments(
            task.adapter.weight(self._inputs.block, name).contiguous(),
            accumulator.moments(),
            pattern=pattern,
            damping=task.damping,
            drift=None if self._collected is not None else accumulator.drift(0),
        )

    def _collect(self, name: str) -> MomentAccumulator:
        if self._collected is not None:
            return self._collected[name]
        assert self._dense is not None
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
                solution = solve(problem, task.solver_of(site, name))
            stored = solution.weight.to(problem.weight.dtype)
            shift = solution.bias
            if shift is not None:
                shift = shift.to(stored.dtype)
            error = relative_error(problem, stored, shift)
            seconds = time.perf_counter() - start
            record = record_of(task, full_name, problem, solution, stored, error, seconds)
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


def without_bias(solver: Any) -> Any:
    """The same method where a layer has no place for a bias."""
    weights_only = {"bias": "none", "intercept": "least-squares"}
    restoration = getattr(solver, "restoration", None)
    if restoration not in weights_only:
        return solver
    return replace(solver, restoration=weights_only[restoration])


def sites_of(
    adapter: Adapter, blocks: Mapping[str, nn.Module], names: tuple[str, ...]
) -> dict[str, tuple[Site, ...]]:
    """Couplings of the given names in every block, in the order of the data flow."""
    order = [name for stage in adapter.stages for name in stage.linears]
    chosen = [coupling for coupling in adapter.couplings if coupling.name in names]
    chosen.sort(key=lambda coupling: order.index(coupling.consumers[-1]))
    return {
        name: tuple(Site(name, c, c.resolve(block, name)) for c in chosen)
        for name, block in blocks.items()
    }
